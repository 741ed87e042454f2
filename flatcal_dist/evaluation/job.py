"""Evaluation as a job of its own, on one process or under `accelerate launch`.

Of the data sets named, the first that is not a shifted one is the clean one: the report is about
it, and its temperature is applied to all others. A run's own validation data is the clean one where
none is named. One shifted data set alone, for a network without a run, gets a report of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from flatcal_dist import config as configuration
from flatcal_dist import inputs
from flatcal_dist.calibration.confidence.sources import requested
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints import resharding
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.data import Index
from flatcal_dist.data.sets.variants import (
    DataSet,
    Variant,
    find,
    local_shards,
    of_index,
    open_variant,
    path_of,
)
from flatcal_dist.evaluation import reporting as evaluation
from flatcal_dist.evaluation.passes import Ensemble
from flatcal_dist.evaluation.provenance import EVALUATED_DATA, UNKNOWN, Provenance
from flatcal_dist.files import refuse_no_directory
from flatcal_dist.networks import pretrained
from flatcal_dist.networks.registry import build
from flatcal_dist.networks.weights import load_weights
from flatcal_dist.ranks import distributed
from flatcal_dist.ranks.distributed import ending_together, on_all_ranks
from flatcal_dist.runs.directory import RunDirectory, RunError
from flatcal_dist.tracking.tracker import read_metrics
from flatcal_dist.urls import public


@dataclass(frozen=True)
class Wanted:
    """What to evaluate on.

    data: PATH or NAME=PATH each, see `data.variants`. corruptions, severities: of ImageNet-C, by
    default all that there are. real_file: other ReaL labels than timm's. save_logits: also write
    the clean images' logits. class_names: of the network's classes, in their order. confidence:
    scores to compute beside those of logits, instead of what the configuration says.
    """

    data: Sequence[str] = ()
    corruptions: Sequence[str] | None = None
    severities: Sequence[int] | None = None
    real_file: Path | None = None
    save_logits: bool = False
    class_names: Sequence[str] | None = None
    confidence: Sequence[str] | None = None


@dataclass(frozen=True)
class Network:
    """A network to evaluate.

    weights: a file, or a checkpoint of any engine, or None for those that its library publishes.
    trained: how; by default unknown. key: which of several weights in the file. members: the
    networks of an ensemble, which has no weights of its own.
    """

    title: str
    config: Config
    weights: Path | None
    output: Path
    trained: Provenance = UNKNOWN
    log: Path | None = None  # of its training, for the curves in the report
    key: str | None = None
    members: tuple["Network", ...] = ()


def evaluate_runs(
    runs: Sequence[Path], wanted: Wanted, output: Path | None = None, ensemble: bool = False
) -> None:
    """Write the report of each run's model.safetensors, or of a checkpoint RUN/checkpoints/step_N.

    Into RUN/report, or RUN/report_step_N; with `output` into that directory, one folder each if
    there are several. ensemble: instead, one report on all of them together, into `output`.
    """
    networks = [_of_run(run) for run in runs]
    if ensemble:
        networks = [ensemble_of(networks, output, own_data=not wanted.data)]
    if output is not None:
        networks = [_into(output, network, len(networks) > 1) for network in networks]
    _evaluate(networks, wanted, needs_output=output is None)


def _of_run(run: Path) -> Network:
    step = run.name if run.parent.name == "checkpoints" else None
    directory = RunDirectory(run.parent.parent if step else run)
    if not directory.config_file.exists():
        raise RunError(f"{directory.path} is not a run directory: it has no config.yaml")
    config = configuration.load(directory.config_file, recorded=True)
    title = directory.path.name
    if step is not None:
        checkpoint.verify(run)
        output = directory.path / f"report_{step}"
        trained = Provenance.of_run(config, None)
        return Network(f"{title} {step}", config, run, output, trained, directory.metrics_file)
    if not directory.weights_file.exists():
        raise RunError(
            f"{run} has no model.safetensors: training writes it at its end. Name a checkpoint, "
            f"such as {run}/checkpoints/step_00000100, or write it with `flatcal export`"
        )
    seconds = state.seconds if (state := directory.state()) else None
    trained, weights = Provenance.of_run(config, seconds), directory.weights_file
    return Network(title, config, weights, directory.report, trained, directory.metrics_file)


def evaluate_model(
    name: str | None,
    weights: Sequence[Path],
    wanted: Wanted,
    output: Path | None,
    overrides: Sequence[str] = (),
    key: str | None = None,
    trained: Provenance | None = None,
) -> None:
    """Write the report of any weights of a network.

    Image size, crop and normalization are the library's for this network, unless overrides say
    otherwise.

    Args:
        name: of timm (or "mlp"), timm:NAME or torchvision:NAME; the latter two without weights have
            those that the library publishes.
        weights: files. Several of them are reported on one after another.
        wanted: what to evaluate on.
        output: directory of the report, or of a folder for each of several.
        overrides: of the configuration, `key.sub=value` each.
        key: which of several weights in a file to take, see `weights.load_weights`.
        trained: how the network was trained, as far as the user tells.
    """
    published = name is not None and ":" in name and not weights
    missing = [
        option
        for option, there in (
            ("--model", name),
            ("--weights", weights or published),
            ("--data", wanted.data),
            ("--output", output),
        )
        if not there
    ]
    if missing:
        hint = ""
        if name and "--weights" in missing:
            hint = f" (--model timm:{name} has the weights that timm publishes)"
        raise ConfigError(f"evaluate needs a run directory, or also {', '.join(missing)}{hint}")
    settings = pretrained.settings(name, published)
    config = configuration.load(None, [f"model.name={name}", *settings, *overrides])
    trained = trained or UNKNOWN
    networks = [
        Network(file.stem if file else name, config, file, output, trained, key=key)
        for file in weights or [None]
    ]
    if len(networks) > 1:
        networks = [_into(output, network, True) for network in networks]
    _evaluate(networks, wanted)


def ensemble_of(members: Sequence[Network], output: Path | None, own_data: bool) -> Network:
    """The networks of several runs as one, evaluated as the first of them is.

    Raises ConfigError unless there are two or more, each once, that look at images in the same way,
    have as many classes and, with `own_data`, the same validation data; and without `output`.
    """
    if len(members) < 2:
        raise ConfigError("--ensemble needs two runs or more")
    if output is None:
        raise ConfigError("--ensemble also needs --output: its report belongs to no single run")
    titles = [member.title for member in members]
    if twice := [m.title for m in members if [n.weights for n in members].count(m.weights) > 1]:
        raise ConfigError(f"--ensemble has {twice[0]} twice")
    first = _how_evaluated(members[0].config, own_data)
    for member in members[1:]:
        for key, value in _how_evaluated(member.config, own_data).items():
            if value != first[key]:
                raise ConfigError(
                    f"these runs cannot be one ensemble: {key} is {first[key]} in {titles[0]} and "
                    f"{value} in {member.title}"
                )
    methods = [member.trained.method for member in members]
    listed = methods[0] if len(set(methods)) == 1 else ", ".join(map(str, methods))
    trained = Provenance(method=f"ensemble of {len(members)} ({listed})")
    title = f"Ensemble of {', '.join(titles)}"
    config = members[0].config
    if config.evaluate.confidence:  # which is of one network; what an ensemble has comes by itself
        cut = config.evaluate.model_copy(update={"confidence": []})
        config = config.model_copy(update={"evaluate": cut})
    return Network(title, config, None, output, trained, members=tuple(members))


def _how_evaluated(config: Config, own_data: bool) -> dict[str, Any]:
    """What decides the images that a network sees, and what its logits stand for, by key."""
    seen = sorted(EVALUATED_DATA - {"decoder"} | ({"validation"} if own_data else set()))
    return {
        "model.num_classes": config.model.num_classes,
        "train.precision": config.train.precision,
        **{f"data.{key}": getattr(config.data, key) for key in seen},
    }


def _into(output: Path, network: Network, several: bool) -> Network:
    target = output / network.title.replace(" ", "_") if several else output
    return replace(network, output=target)


def _evaluate(networks: Sequence[Network], wanted: Wanted, needs_output: bool = False) -> None:
    if wanted.confidence is not None:
        networks = [_asked(network, wanted.confidence) for network in networks]
    _refuse_clashes(networks)
    for network in networks:
        refuse_no_directory(network.output)
    for classes in {network.config.model.num_classes for network in networks}:
        if wanted.class_names is not None and len(wanted.class_names) != classes:
            raise ConfigError(
                f"--classes has {len(wanted.class_names)} names, and the network {classes} classes"
            )
    accelerator = distributed.start("ddp", networks[0].config.train.precision)
    with ending_together(accelerator):
        for network in networks:
            for path in filter(inputs.remote, map(path_of, wanted.data)):
                inputs.download(_on(network.config, path).data, accelerator, "validation")
            clean, shifted = on_all_ranks(lambda n=network: _sets(n.config, wanted))
            if needs_output and clean is not None:
                raise RunError(
                    "other clean data also needs --output: RUN/report is for the run's own "
                    "validation data"
                )
            _evaluate_one(network, clean, shifted, wanted, accelerator)


def _asked(network: Network, confidence: Sequence[str]) -> Network:
    scores = requested(confidence)
    if network.members and scores:
        raise ConfigError(
            f"{scores[0].key} is a score of one network, and this is an ensemble: leave it out"
        )
    evaluate = network.config.evaluate.model_copy(update={"confidence": list(confidence)})
    return replace(network, config=network.config.model_copy(update={"evaluate": evaluate}))


def _refuse_clashes(networks: Sequence[Network]) -> None:
    outputs = [network.output for network in networks]
    if twice := [path for path in outputs if outputs.count(path) > 1]:
        raise ConfigError(f"two reports would go to {twice[0]}: evaluate them one at a time")
    if len({network.config.train.precision for network in networks}) > 1:
        raise ConfigError("these runs have different train.precision: evaluate them one at a time")


def _sets(config: Config, wanted: Wanted) -> tuple[Variant | None, list[Variant]]:
    """The clean data set (None: the run's own) and the others."""
    classes = config.model.num_classes
    groups = [
        find(text, classes, wanted.corruptions, wanted.severities, _shards(config))
        for text in wanted.data
    ]
    names = [group[0].name for group in groups]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two data sets are called {twice[0]}: write --data NAME=PATH")
    first = next((group[0] for group in groups if not group[0].shifted), None)
    variants = [variant for group in groups for variant in group]
    narrowed = wanted.corruptions is not None or wanted.severities is not None
    if narrowed and not any(variant.corruption for variant in variants):
        raise ConfigError(
            "--corruptions and --severities choose from ImageNet-C, and none is given: add --data "
            "imagenet_c=PATH, or imagenet_c_generated=PATH to corrupt clean images"
        )
    if first is None and config.data.validation is None and variants:
        if len(variants) > 1 or variants[0].corruption:
            raise ConfigError(
                f"{', '.join(names)}: name clean data as well, such as --data imagenet=PATH, whose "
                "temperature is applied to these"
            )
        first = variants[0]
    if any(v.generated or v.kind == "imagenet_c" for v in variants) and config.data.channels != 3:
        raise ConfigError("the corruptions of ImageNet-C need data.channels=3")
    return first, [variant for variant in variants if variant is not first]


def _shards(config: Config) -> Callable[[str, int], Index]:
    """What opens shards: those from URLs have been downloaded into the configuration's cache."""

    def opened(path: str, classes: int) -> Index:
        if inputs.remote(path):
            return inputs.open_index(_on(config, path).data, "validation", classes)
        return local_shards(path, classes)

    return opened


def _on(config: Config, path: str) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"validation": path})})


def _evaluate_one(
    network: Network,
    clean: Variant | None,
    shifted: Sequence[Variant],
    wanted: Wanted,
    accelerator: Accelerator,
) -> None:
    config, classes = network.config, network.config.model.num_classes
    module = _on_device(network, accelerator)
    if clean is None:
        inputs.download(config.data, accelerator, "validation")

    def opened() -> DataSet:
        if clean is not None:
            return open_variant(clean, classes, wanted.real_file, _shards(config))
        index = inputs.open_index(config.data, "validation", classes)
        return of_index(index, str(public(config.data.validation)), classes, wanted.real_file)

    data = on_all_ranks(opened)
    weights_file = network.weights if network.weights and network.weights.is_file() else None
    written = evaluation.report(
        config, module, data, accelerator, network.output,
        title=network.title, weights_file=weights_file, trained=network.trained,
        training=_log(network, accelerator), class_names=wanted.class_names,
        logits_file=network.output / "logits.npz" if wanted.save_logits else None,
    )  # fmt: skip
    if shifted:
        records = written[0] if written else None
        evaluation.report_shift(
            config, module, shifted, accelerator, network.output, records, data.identity,
            _shards(config),
        )  # fmt: skip
    accelerator.print(network.output / "index.html")


def _log(network: Network, accelerator: Accelerator) -> list[dict]:
    """The records of the training, on rank 0."""
    if network.log is None or not accelerator.is_main_process:
        return []
    return read_metrics(network.log)


def _on_device(network: Network, accelerator: Accelerator) -> nn.Module:
    if network.members:
        return Ensemble([_on_device(member, accelerator) for member in network.members])
    model, data = network.config.model, network.config.data

    def built() -> nn.Module:
        if network.weights is None:
            return pretrained.build_pretrained(model.name, data.channels, model.options)
        module = build(model.name, model.num_classes, data.channels, data.image_size, model.options)
        if network.weights.is_dir():
            resharding.fill_network(module, network.weights)
        else:
            taken = str(load_weights(module, network.weights, network.key))
            if taken:
                accelerator.print(f"{network.weights}: {taken}")
        return module

    if network.weights is None:  # one process of a machine fetches, the others find it there
        on_all_ranks(lambda: built() if accelerator.is_local_main_process else None)
    return on_all_ranks(built).to(accelerator.device)
