"""What is known of an evaluated network: how it was trained, on what it was evaluated, by what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from flatcal_dist.calibration.report.summary import About
from flatcal_dist.config import Config, method_of
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


@dataclass(frozen=True)
class Provenance:
    """How a network was trained, as far as that is known; by default nothing is.

    method: as `config.method_of` names it. seconds: of training. configuration: the run's own.
    Nothing of an evaluation's configuration tells how the weights came about, so it stands for none
    of these.
    """

    method: str | None = None
    rho: float | None = None
    gamma: float | None = None
    seed: int | None = None
    seconds: float | None = None
    configuration: Config | None = None

    @classmethod
    def of_run(cls, config: Config, seconds: float | None) -> "Provenance":
        """Of a network that this configuration trained."""
        sharpness = config.sharpness
        plain = sharpness.rule == "none"
        return cls(
            method=method_of(config),
            rho=None if plain else sharpness.rho,
            gamma=getattr(sharpness, "gamma", None),
            seed=config.run.seed,
            seconds=seconds,
            configuration=config,
        )


UNKNOWN = Provenance()


def describe(
    config: Config,
    module: nn.Module,
    data: DataSet,
    accelerator: Accelerator,
    title: str,
    weights_file: Path | None,
    trained: Provenance,
) -> About:
    """What the report says of itself; called by one rank, reads the weights file."""
    identity, known = data.identity, trained.configuration
    return About(
        title=title,
        model=config.model.name,
        method=trained.method,
        rho=trained.rho,
        gamma=trained.gamma,
        seed=trained.seed,
        data=f"{shown(data.variant.path)} ({identity[:16]})",
        data_identity=identity,
        known_by="images",
        class_names=data.class_names,
        image_size=config.data.image_size,
        crop_pct=config.data.crop_pct,
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
    if weights_file is None or weights_file.name.endswith(INDEX):  # which holds names alone
        return weights_hash(module)
    return sha256(weights_file)


def _of_evaluation(config: Config) -> dict[str, Any]:
    """What of a configuration decides the logits of a network that it did not train."""
    data = config.data.model_dump(include=EVALUATED_DATA)
    evaluate = {"folds": config.evaluate.folds}
    return {"model": config.model.model_dump(), "data": data, "evaluate": evaluate}
