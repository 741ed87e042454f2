"""What is known of an evaluated network: how it was trained, on what it was evaluated, by what."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from flatcal_dist.calibration.report.about import About, Setting
from flatcal_dist.config import Config, method_of
from flatcal_dist.config.checking.conditions import unread
from flatcal_dist.config.choice_sections import ChoiceSection, Perturbation
from flatcal_dist.config.kinds import Section
from flatcal_dist.data.sets.variants import DataSet
from flatcal_dist.networks.registry import parameter_count
from flatcal_dist.networks.weight_files import INDEX
from flatcal_dist.networks.weights import sha256, weights_hash
from flatcal_dist.runs.environment import describe_environment
from flatcal_dist.urls import public, shown

# The settings of the data that evaluation depends on; all others belong to a training.
EVALUATED_DATA = {
    "image_size",
    "channels",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "decoder",
}
# Keys that change nothing at these values: every step, every epoch, every pair of images, the whole
# batch, no plain epoch.
NEUTRAL = {"every": 1, "every_epochs": 1, "probability": 1.0, "share": 1.0, "plain_epochs": 0}


@dataclass(frozen=True)
class Provenance:
    """How a network was trained, as far as that is known. By default nothing is known.

    The configuration of an evaluation does not tell how the weights were trained, so no field is
    taken from it.

    Args:
        method: The method, as `config.method_of` names it.
        settings: The numbers of the method, as `settings_of` returns them.
        seed: The seed of the training.
        seconds: How long the training took.
        configuration: The configuration of the training run.
    """

    method: str | None = None
    settings: dict[str, Setting] = field(default_factory=dict)
    seed: int | None = None
    seconds: float | None = None
    configuration: Config | None = None

    @classmethod
    def of_run(cls, config: Config, seconds: float | None) -> "Provenance":
        """Return the provenance of a network that this configuration trained."""
        return cls(
            method=method_of(config),
            settings=settings_of(config),
            seed=config.run.seed,
            seconds=seconds,
            configuration=config,
        )


UNKNOWN = Provenance()


def settings_of(config: Config) -> dict[str, Setting]:
    """Return the numbers of a method: `{"rho": 0.05, "gamma": 1.0, "swa.start": 0.75}`.

    They are the numeric keys of the rule, objective, average and mixing that the configuration
    chooses. A key of the rule stands alone. Any other key follows the name of its choice, because
    two choices can have the same key. Keys that change nothing, because of their own value or that
    of another key, are left out.
    """
    rule = config.sharpness
    settings = _numbers(rule)
    if isinstance(rule, Perturbation):
        settings |= {"rho_min": rule.rho_min} if rule.rho_schedule != "constant" else {}
        settings |= {"scope": rule.scope} if rule.scope != "global" else {}
    for section in (config.objective, config.average, config.mixing):
        settings |= {f"{section.name}.{key}": value for key, value in _numbers(section).items()}
    if "average.start" in unread(config):
        settings.pop(f"{config.average.name}.start", None)
    return settings


def _numbers(section: Section) -> dict[str, Setting]:
    """The numeric keys of what a section chooses; none where it chooses nothing."""
    if not isinstance(section, ChoiceSection):
        return {}
    values = {one.name: getattr(section, one.name) for one in fields(section.choice) if one.init}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and NEUTRAL.get(key) != value
    }


def describe(
    config: Config,
    module: nn.Module,
    data: DataSet,
    accelerator: Accelerator,
    title: str,
    weights_file: Path | None,
    trained: Provenance,
) -> About:
    """Return what a report says about the network and the images.

    One rank alone calls this function, because it reads the weights file.

    Args:
        config: The configuration of the evaluation.
        module: The network with its weights.
        data: The evaluated images.
        accelerator: The ranks of the evaluation.
        title: The title of the report.
        weights_file: The file of the weights. None: the hash is computed from the network.
        trained: How the network was trained.
    """
    identity, known = data.identity, trained.configuration
    return About(
        title=title,
        model=config.model.name,
        method=trained.method,
        settings=trained.settings,
        seed=trained.seed,
        data=f"{shown(data.variant.path)} ({identity[:16]})",
        data_identity=identity,
        known_by="images",
        class_names=data.class_names,
        image_size=config.data.image_size,
        crop_pct=config.data.crop_pct if config.data.augmentation == "resized_crop" else None,
        interpolation=config.data.interpolation,
        parameters=parameter_count(module),
        checkpoint=_checkpoint(weights_file, module),
        precision=config.train.precision,
        engine=None if known is None else known.train.engine,
        world_size=accelerator.num_processes,
        training_seconds=trained.seconds,
        versions=describe_environment()["packages"],
        configuration=public(_of_evaluation(config) if known is None else known.model_dump()),
    )


def _checkpoint(weights_file: Path | None, module: nn.Module) -> str:
    if weights_file is None or weights_file.name.endswith(INDEX):  # an index holds names alone
        return weights_hash(module)
    return sha256(weights_file)


def _of_evaluation(config: Config) -> dict[str, Any]:
    """The part of a configuration that decides the logits of a network from elsewhere."""
    data = config.data.model_dump(include=EVALUATED_DATA)
    evaluate = {"folds": config.evaluate.folds}
    return {"model": config.model.model_dump(), "data": data, "evaluate": evaluate}
