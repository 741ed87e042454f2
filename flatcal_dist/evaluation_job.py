"""Evaluation as a job of its own, on one process or under `accelerate launch`."""

from collections.abc import Sequence
from pathlib import Path

import timm
from torch import nn

from flatcal_dist import config as configuration
from flatcal_dist import distributed, evaluation, inputs
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.distributed import ending_together, on_all_ranks
from flatcal_dist.models import build
from flatcal_dist.run_directory import RunDirectory, RunError
from flatcal_dist.weights import load_weights


def evaluate_run(run: Path, data: str | None = None, output: Path | None = None) -> None:
    """Write the report of a run's model.safetensors, on its own validation shards or on `data`."""
    directory = RunDirectory(run)
    if not directory.config_file.exists():
        raise RunError(f"{run} is not a run directory: it has no config.yaml")
    if not directory.weights_file.exists():
        raise RunError(f"{run} has no model.safetensors yet: training writes it at its end")
    if data is not None and output is None:
        raise RunError(
            "--data also needs --output: RUN/report is for the run's own validation data"
        )
    config = configuration.load(directory.config_file)
    if data is not None:
        config = _on(config, data)
    seconds = state.seconds if (state := directory.state()) else None
    _evaluate(config, directory.weights_file, output or directory.report, seconds)


def evaluate_model(
    name: str | None,
    weights: Path | None,
    data: str | None,
    output: Path | None,
    overrides: Sequence[str] = (),
) -> None:
    """Write the report of any weights of a network, on any indexed shards.

    Image size, crop and normalization are those that timm records for the network, unless
    overrides say otherwise.
    """
    missing = [
        option
        for option, value in (
            ("--model", name),
            ("--weights", weights),
            ("--data", data),
            ("--output", output),
        )
        if value is None
    ]
    if missing:
        raise ConfigError(f"evaluate needs a run directory, or also {', '.join(missing)}")
    defaults = [f"model.name={name}", f"data.validation={data}", *_preprocessing(name)]
    config = configuration.load(None, [*defaults, *overrides])
    _evaluate(config, weights, output)


def _evaluate(config: Config, weights: Path, output: Path, seconds: float | None = None) -> None:
    accelerator = distributed.start("ddp", config.train.precision)
    model, data = config.model, config.data
    with ending_together(accelerator):

        def prepared() -> nn.Module:
            network = build(
                model.name, model.num_classes, data.channels, data.image_size, model.options
            )
            load_weights(network, weights)
            return network.to(accelerator.device)

        network = on_all_ranks(prepared)
        inputs.download(data, accelerator, "validation")
        index = on_all_ranks(lambda: inputs.open_index(data, "validation", model.num_classes))
        evaluation.report(
            config, network, index, accelerator, output,
            weights_file=weights, training_seconds=seconds,
        )  # fmt: skip
        accelerator.print(output / "index.html")


def _on(config: Config, data: str) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"validation": data})})


def _preprocessing(name: str) -> list[str]:
    """timm's evaluation settings of a network, as overrides; none for others' networks."""
    if not timm.is_model(name):
        return []
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        return []
    if cfg.crop_mode != "center":
        raise ConfigError(
            f"timm evaluates {name} with crop mode '{cfg.crop_mode}', which is not supported: its "
            "figures would not be the network's; choose a network evaluated on a centre crop"
        )
    size = (cfg.test_input_size or cfg.input_size)[-1]
    return [
        f"data.image_size={size}",
        f"data.mean={list(cfg.mean)}",
        f"data.std={list(cfg.std)}",
        f"data.crop_pct={min(cfg.test_crop_pct or cfg.crop_pct, 1.0)}",
        f"data.interpolation={cfg.interpolation}",
    ]
