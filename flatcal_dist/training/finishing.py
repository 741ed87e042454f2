"""The end of a run: weights that other programs can load, and the report on them."""

import shlex

from accelerate import Accelerator

from flatcal_dist import inputs
from flatcal_dist.config import Config
from flatcal_dist.data import Index
from flatcal_dist.data.sets.variants import of_index
from flatcal_dist.evaluation import reporting as evaluation
from flatcal_dist.evaluation.provenance import Provenance
from flatcal_dist.networks.weights import save_weights
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.sharpness.engines.base import Engine
from flatcal_dist.tracking.tracker import Tracker, read_metrics
from flatcal_dist.urls import public


def export_and_report(
    config: Config,
    directory: RunDirectory,
    engine: Engine,
    validation: Index,
    accelerator: Accelerator,
    tracker: Tracker,
    step: int,
    training_seconds: float,
) -> None:
    """Write the weights of the engine as they are now, and evaluate them if the run is to.

    All ranks call this.

    Args:
        config: The configuration.
        directory: The run directory.
        engine: The engine, which holds the weights.
        validation: The data to evaluate on.
        accelerator: This rank among the others.
        tracker: It logs the figures.
        step: The number of steps that were taken.
        training_seconds: The time of training, over all starts.
    """
    weights = engine.full_weights()
    if accelerator.is_main_process:
        save_weights(weights, directory.weights_file)
    if not config.evaluate.at_end:
        return
    written = evaluation.report(
        config,
        engine.inference,
        of_index(validation, str(public(config.data.validation)), config.model.num_classes),
        accelerator,
        directory.report,
        weights_file=directory.weights_file,
        trained=Provenance.of_run(config, training_seconds),
        apart=inputs.images_apart(config, accelerator),
        training=read_metrics(directory.metrics_file) if accelerator.is_main_process else (),
    )
    if written is None:
        return
    _, metrics = written
    figures = {k: value for k, value in metrics.as_json().items() if isinstance(value, float | int)}
    tracker.log(step, {f"calibration/{key}": value for key, value in figures.items()})
    tracker.say(f"report: {directory.report / 'index.html'}")


def missing(config: Config, directory: RunDirectory) -> str:
    """Say what a finished run no longer has, and how to make it again."""
    commands, path = [], shlex.quote(str(directory.path))
    if not directory.weights_file.exists():
        commands.append(f"flatcal export {path} {shlex.quote(str(directory.weights_file))}")
    if config.evaluate.at_end and not (directory.report / "metrics.json").exists():
        commands.append(f"flatcal evaluate {path}")
    return f"; what is missing of it is made by: {' && '.join(commands)}" if commands else ""
