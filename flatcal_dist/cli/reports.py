"""Commands that evaluate weights, write reports and comparisons, and export weights."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flatcal_dist.arguments import positive_number, whole_number
from flatcal_dist.files import refuse_no_directory

if TYPE_CHECKING:
    from flatcal_dist.sharpness.measures import Options


def add_commands(commands: "argparse._SubParsersAction") -> None:
    """Add the parsers of this module's commands."""
    evaluate_arguments(
        commands.add_parser("evaluate", help="evaluate weights and write the report")
    )
    report_arguments(
        commands.add_parser(
            "report", help="write the page again from the records, or a report on a file of scores"
        )
    )
    compare_arguments(commands.add_parser("compare", help="compare runs, image by image"))
    export_arguments(commands.add_parser("export", help="write a checkpoint's weights as one file"))


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directories", nargs="*", type=Path, metavar="RUN", help="runs, or RUN/checkpoints/step_N")
    _network_arguments(parser)
    add("--data", action="append", default=[], metavar="[NAME=]DATA",
        help="shards or an ImageFolder tree; may be repeated; by default the run's. The first "
        "clean data set gives the temperature to the others. Some NAMEs say what the data has to "
        "be: imagenet, imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, imagenet_c, "
        "cifar_c (the arrays of CIFAR-10-C or -100-C). imagenet_c_generated and, for small images, "
        "cifar_c_generated corrupt clean images, by default the run's")  # fmt: skip
    add("--corruptions", metavar="LIST",
        help="corruptions of ImageNet-C or CIFAR-C: fog,snow; or common, extra, all")  # fmt: skip
    add(
        "--severities",
        metavar="LIST",
        help="severities of ImageNet-C or CIFAR-C: 1,3,5; by default all five",
    )
    add("--real", type=Path, metavar="FILE", help="ReaL labels; by default those that timm ships")
    add("--people", type=Path, metavar="FILE",
        help="people's answers to CIFAR-10's test images: cifar10h-probs.npy or -counts.npy of "
        "CIFAR-10H")  # fmt: skip
    add("--confidence", metavar="LIST",
        help="scores to compute besides those from logits, such as trust_score,mc_dropout (a wrong "
        "name lists all), or none; by default what evaluate.confidence says")  # fmt: skip
    add("--ensemble", action="store_true",
        help="write one report on the networks of all RUNs together")  # fmt: skip
    add("--save-logits", action="store_true", help="write logits.npz of the clean images as well")
    _sharpness_arguments(parser)
    add("--output", type=Path, metavar="DIR", help="by default RUN/report")
    _origin(parser)
    parser.set_defaults(run=evaluate)


def _network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a network of no run."""
    add = parser.add_argument
    add("--model", metavar="NAME",
        help="a network of timm, timm:NAME, torchvision:NAME or mlp; without RUN")  # fmt: skip
    add("--weights", type=Path, nargs="+", default=[], metavar="FILE",
        help="safetensors or state_dict; by default the weights that the library publishes"
        )  # fmt: skip
    add("--weights-key", metavar="NAME",
        help="which weights of the file to take, such as state_dict_ema; by default those that "
        "were trained, not their average")  # fmt: skip
    add("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value",
        help="with --model: configuration keys, such as model.num_classes=100")  # fmt: skip


def _sharpness_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that ask for measures of sharpness."""
    add = parser.add_argument
    add("--sharpness", action="store_true",
        help="measure the sharpness of the loss as well: the largest eigenvalue and the trace of "
        "its Hessian, m-sharpness, adaptive sharpness, and the loss along directions")  # fmt: skip
    add("--sharpness-images", type=whole_number(), metavar="N",
        help="the largest number of clean images to measure it on; by default 1024")  # fmt: skip
    add("--sharpness-rho", type=positive_number, metavar="RHO",
        help="the length of the ascent of SAM; by default 0.05. Curves go to 4 times this "
        "distance")  # fmt: skip
    add("--sharpness-adaptive-rho", type=positive_number, metavar="RHO",
        help="the length of the ascent of ASAM; by default 0.5")  # fmt: skip
    add("--sharpness-m", type=whole_number(), metavar="M",
        help="the number of images in a group for m-sharpness; by default 128")  # fmt: skip


def report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", type=Path, metavar="RUN|FILE")
    add("--output", type=Path, metavar="DIR", help="with FILE: by default FILE_report beside it")
    add("--labels", type=Path, metavar="FILE", help="with FILE: another file, with the labels")
    add("--scores", choices=("logits", "probabilities"),
        help="with FILE: what the scores are, whatever their name says")  # fmt: skip
    _origin(parser)
    parser.set_defaults(run=report)


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.set_defaults(run=compare)


def export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", type=Path, metavar="RUN")
    add("--checkpoint", type=int, metavar="STEP", help="by default the newest")
    add("file", type=Path, metavar="FILE", help="safetensors, as timm reads it")
    parser.set_defaults(run=export)


def _origin(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a network or a file from elsewhere does not tell."""
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="a file with the names of the classes in their order, one a line, or JSON",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="how a network from elsewhere was trained; compare gathers seeds of one method",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), metavar="N", help="the seed of that training"
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate runs or a network. Raises ValueError for options that do not go together."""
    from flatcal_dist.calibration.records.class_list import read_class_names
    from flatcal_dist.evaluation.job import evaluate_model, evaluate_runs
    from flatcal_dist.evaluation.provenance import Provenance
    from flatcal_dist.evaluation.wanted import Wanted

    classes = arguments.classes
    wanted = Wanted(
        data=arguments.data,
        corruptions=arguments.corruptions.split(",") if arguments.corruptions else None,
        severities=_severities(arguments.severities),
        real_file=arguments.real,
        people_file=arguments.people,
        save_logits=arguments.save_logits,
        class_names=None if classes is None else read_class_names(classes),
        confidence=_confidence(arguments.confidence),
        sharpness=_sharpness(arguments),
    )
    if arguments.directories:
        if arguments.model or arguments.weights or arguments.overrides:
            raise ValueError(
                "evaluate takes a RUN, or --model with --weights, --data and --output; not both"
            )
        for option in ("method", "seed", "weights_key"):
            if getattr(arguments, option) is not None:
                raise ValueError(
                    f"--{option.replace('_', '-')} goes with --model; a RUN knows what it is"
                )
        evaluate_runs(arguments.directories, wanted, arguments.output, arguments.ensemble)
    else:
        if arguments.ensemble:
            raise ValueError("--ensemble goes with the runs whose networks it puts together")
        evaluate_model(
            arguments.model,
            arguments.weights,
            wanted,
            arguments.output,
            arguments.overrides,
            arguments.weights_key,
            Provenance(method=arguments.method, seed=arguments.seed),
        )


def _confidence(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [] if text == "none" else [key.strip() for key in text.split(",")]


def _sharpness(arguments: argparse.Namespace) -> "Options | None":
    """Return what is measured of sharpness. Raises ValueError for a number without --sharpness."""
    from flatcal_dist.sharpness.measures import Options

    names = ("images", "rho", "adaptive_rho", "m")
    values = {name: getattr(arguments, f"sharpness_{name}") for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    if arguments.sharpness:
        return Options(**given)
    if given:
        option = f"--sharpness-{next(iter(given)).replace('_', '-')}"
        raise ValueError(f"{option} goes with --sharpness, which is not given")
    return None


def _severities(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--severities={text}: expected numbers of 1 to 5, such as 1,3,5")
    return [int(part) for part in parts]


def report(arguments: argparse.Namespace) -> None:
    """Write the page of a run again, or the report on a file of scores."""
    from flatcal_dist.calibration.report.writing import render_report

    of_file = ("output", "method", "seed", "classes", "labels", "scores")
    if not arguments.directory.exists():
        raise ValueError(
            f"there is no {arguments.directory}: expected a run or report directory, or a file of "
            "scores and labels"
        )
    if arguments.directory.is_file():
        _report_on_file(arguments)
        return
    given = [name for name in of_file if getattr(arguments, name) is not None]
    if given:
        raise ValueError(
            f"--{given[0]} is for a file of scores, and {arguments.directory} is a directory: the "
            "report of a run stays in its directory, and the run knows how it was trained"
        )
    directory = arguments.directory / "report"
    render_report(directory if directory.is_dir() else arguments.directory)
    print(directory / "index.html")


def _report_on_file(arguments: argparse.Namespace) -> None:
    """Write the report on a file of scores, and say what was understood of the file."""
    from flatcal_dist.calibration.records.class_list import read_class_names
    from flatcal_dist.calibration.records.imported import import_file
    from flatcal_dist.calibration.report.summary import About
    from flatcal_dist.calibration.report.writing import write_report

    path = arguments.directory
    found = import_file(
        path,
        classes=None if arguments.classes is None else read_class_names(arguments.classes),
        labels=arguments.labels,
        scores=arguments.scores,
    )
    print(found.understood)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    about = About(
        title=path.stem,
        method=arguments.method,
        seed=arguments.seed,
        origin="; ".join([found.understood, *(f"warning: {w}" for w in found.warnings)]),
        data=path.name,
        class_names=found.class_names,
    )
    output = arguments.output or path.with_name(f"{path.stem}_report")
    write_report(found.records, output, about)
    print(output / "index.html")


def compare(arguments: argparse.Namespace) -> None:
    """Write the comparison of runs."""
    from flatcal_dist.calibration.comparison.writing import write_comparison

    refuse_no_directory(arguments.output)
    write_comparison(arguments.directories, arguments.output)
    print(arguments.output / "index.html")


def export(arguments: argparse.Namespace) -> None:
    """Write the weights of a checkpoint as one file."""
    from flatcal_dist.checkpoints.resharding import export

    path = export(arguments.directory, arguments.file, arguments.checkpoint)
    print(f"{arguments.file}: weights of {path}")
