"""The job of `flatcal evaluate`, on one process or under `accelerate launch`.

The clean data set is the first one that is not under shift. The report is about it, and its
temperature is applied to all others. If no clean data set is named, it is the validation data of
the run. If a network without a run is evaluated on one data set under shift alone, the report is
about that data set.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from flatcal_dist import config as configuration
from flatcal_dist import inputs
from flatcal_dist.calibration.confidence.score import OF_FEATURES
from flatcal_dist.calibration.confidence.sources import requested
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints import resharding
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.data import Index
from flatcal_dist.data.sets.people import read_people
from flatcal_dist.data.sets.variants import (
    DataSet,
    Variant,
    find,
    is_alone,
    local_shards,
    of_index,
    open_variant,
    path_of,
)
from flatcal_dist.evaluation import reporting as evaluation
from flatcal_dist.evaluation.ensembles import ensemble_of, refuse_twins
from flatcal_dist.evaluation.evaluated_images import (
    refuse_changed_training,
    refuse_other_classes,
)
from flatcal_dist.evaluation.passes import Ensemble
from flatcal_dist.evaluation.provenance import UNKNOWN, Provenance
from flatcal_dist.evaluation.wanted import Network, Wanted
from flatcal_dist.files import refuse_no_directory
from flatcal_dist.networks import pretrained
from flatcal_dist.networks.registry import build
from flatcal_dist.networks.weights import load_weights
from flatcal_dist.ranks import distributed
from flatcal_dist.ranks.distributed import ending_together, on_all_ranks
from flatcal_dist.runs.directory import RunDirectory, RunError
from flatcal_dist.tracking.tracker import read_metrics
from flatcal_dist.urls import public


def evaluate_runs(
    runs: Sequence[Path], wanted: Wanted, output: Path | None = None, ensemble: bool = False
) -> None:
    """Write the reports of runs, or of checkpoints RUN/checkpoints/step_N.

    The report of a run is about its model.safetensors.

    Args:
        runs: The directories of the runs or checkpoints.
        wanted: What to evaluate on.
        output: The directory of the report, or of one folder for each of several runs. By default
            reports go to RUN/report or RUN/report_step_N.
        ensemble: Whether one report is written on all networks together. It needs `output`.

    Raises:
        RunError: A directory is no run, or the run has no weights.
        ConfigError: The options do not fit each other or the networks.
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

    The library says which image size, crop and normalization the network needs, unless overrides
    say otherwise.

    Args:
        name: NAME, timm:NAME or torchvision:NAME. For the latter two, no weights stand for those
            that the library publishes.
        weights: Files of weights. Several files are evaluated one after another.
        wanted: What to evaluate on.
        output: The directory of the report, or of one folder for each of several files.
        overrides: Overrides of the configuration, each as `key.sub=value`.
        key: Which of several weights in a file to take (see `load_weights`).
        trained: How the network was trained, as far as the user tells.

    Raises:
        ConfigError: An option is missing or wrong.
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
    if missing or name is None or output is None:
        hint = ""
        if name and "--weights" in missing:
            hint = f" (--model timm:{name} has the weights that timm publishes)"
        raise ConfigError(f"evaluate needs a run directory, or also {', '.join(missing)}{hint}")
    settings = pretrained.settings(name, published)
    config = configuration.load(None, [f"model.name={name}", *settings, *overrides])
    trained = trained or UNKNOWN
    files: Sequence[Path | None] = weights or [None]
    networks = [
        Network(file.stem if file else name, config, file, output, trained, key=key)
        for file in files
    ]
    if len(networks) > 1:
        networks = [_into(output, network, True) for network in networks]
    _evaluate(networks, wanted)


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
            own = on_all_ranks(partial(_of_own_images, network.config, wanted))
            for path in filter(inputs.remote, map(path_of, own.data)):
                inputs.download(_on(network.config, path).data, accelerator, "validation")
            clean, shifted = on_all_ranks(partial(_sets, network.config, own))
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


def _of_own_images(config: Config, wanted: Wanted) -> Wanted:
    """Give generated corruptions that are named without a path the run's own validation images."""
    if not any(map(is_alone, wanted.data)):
        return wanted
    own = config.data.validation
    if not isinstance(own, str):
        name = next(filter(is_alone, wanted.data))
        raise ConfigError(
            f"--data {name} alone is about the run's validation images, which have to be one "
            f"pattern or directory, not {own}: write --data {name}=PATH"
        )
    data = [f"{text}={own}" if is_alone(text) else text for text in wanted.data]
    return replace(wanted, data=data)


def _sets(config: Config, wanted: Wanted) -> tuple[Variant | None, list[Variant]]:
    """Return the clean data set (None for that of the run) and the others."""
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
            "--corruptions and --severities choose from ImageNet-C or CIFAR-C, and none is given: "
            "add --data imagenet_c=PATH, cifar_c=PATH, imagenet_c_generated or cifar_c_generated"
        )
    if first is None and config.data.validation is None and variants:
        if len(variants) > 1 or variants[0].corruption:
            raise ConfigError(
                f"{', '.join(names)}: name clean data as well, such as --data imagenet=PATH, whose "
                "temperature is applied to these"
            )
        first = variants[0]
    of_colours = [v for v in variants if v.kind in ("imagenet_c", "imagenet_c_generated")]
    if of_colours and config.data.channels != 3:
        raise ConfigError(
            f"{of_colours[0].kind}: the corruptions of ImageNet-C need data.channels=3, not "
            f"{config.data.channels}. For gray images there is --data cifar_c_generated"
        )
    return first, [variant for variant in variants if variant is not first]


def _shards(config: Config) -> Callable[[str, int], Index]:
    """Return what opens shards. Shards from URLs have been downloaded into the cache before."""

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
            data = open_variant(clean, classes, wanted.real_file, _shards(config))
        else:
            index = inputs.open_index(config.data, "validation", classes)
            name = str(public(config.data.validation))
            data = of_index(index, name, classes, wanted.real_file)
        if wanted.people_file is None:
            return data
        return replace(data, people=read_people(wanted.people_file, data.index.keys(), classes))

    data = on_all_ranks(opened)
    members = network.members or (network,)
    on_all_ranks(partial(refuse_other_classes, [one.config for one in members], data))
    apart = inputs.images_apart(config, accelerator)
    of_training = [s for s in requested(config.evaluate.confidence) if s.needs in OF_FEATURES]
    if config.data.train is not None and (apart is not None or of_training):
        if inputs.remote(config.data.train) and config.data.cache:
            inputs.download(config.data, accelerator, "train")
        runs = [(one.config, RunDirectory(one.log.parent)) for one in members if one.log]
        on_all_ranks(partial(refuse_changed_training, runs))
    weights_file = network.weights if network.weights and network.weights.is_file() else None
    written = evaluation.report(
        config, module, data, accelerator, network.output,
        title=network.title, weights_file=weights_file, trained=network.trained,
        training=_log(network, accelerator), class_names=wanted.class_names,
        logits_file=network.output / "logits.npz" if wanted.save_logits else None,
        apart=apart, sharpness=wanted.sharpness,
    )  # fmt: skip
    if shifted:
        records = written[0] if written else None
        evaluation.report_shift(
            config, module, shifted, accelerator, network.output, records, data.identity,
            _shards(config),
        )  # fmt: skip
    accelerator.print(network.output / "index.html")


def _log(network: Network, accelerator: Accelerator) -> list[dict]:
    """Return the records of the training on rank 0, and nothing on other ranks."""
    if network.log is None or not accelerator.is_main_process:
        return []
    return read_metrics(network.log)


def _on_device(network: Network, accelerator: Accelerator) -> nn.Module:
    if network.members:
        modules = [_on_device(member, accelerator) for member in network.members]
        titles = [str(member.weights) for member in network.members]
        on_all_ranks(partial(refuse_twins, titles, modules))
        return Ensemble(modules)
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

    if network.weights is None:  # one process of each machine downloads, the others find the file
        on_all_ranks(lambda: built() if accelerator.is_local_main_process else None)
    return on_all_ranks(built).to(accelerator.device)
