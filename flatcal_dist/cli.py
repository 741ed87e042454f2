"""The `flatcal` command: shards in, reports out.

flatcal shard SOURCE DESTINATION --split train|validation
flatcal index SHARDS
flatcal validate SHARDS [--split NAME] [--decode N|all] [--classes K] [--json FILE]
flatcal evaluate RUN [RUN ...] [--data [NAME=]DATA ...] [--output DIR]
flatcal evaluate RUN RUN [RUN ...] --ensemble --output DIR
flatcal evaluate --model NAME [--weights FILE] --data DATA --output DIR [--set key.sub=value ...]
flatcal report RUN
flatcal report SCORES.npz|.parquet|.csv|... [--labels FILE] [--classes FILE] [--output DIR]
flatcal compare RUN RUN ... --output DIR
flatcal status RUN [RUN ...] [--json]
flatcal export RUN [--checkpoint STEP] FILE
flatcal sync RUN [RUN ...] [--dry-run]
flatcal environment
"""

import argparse
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flatcal_dist.arguments import usable_cores, whole_number
from flatcal_dist.files import expanded, refuse_no_directory, write_json
from flatcal_dist.printing import never_fail, problem_of_output
from flatcal_dist.ranks.launcher import give_up
from flatcal_dist.warning_lines import print_warnings_plainly

if TYPE_CHECKING:
    from rich.console import Console

    from flatcal_dist.data.making.sources import Source
    from flatcal_dist.data.shards.walk import Problem

# Commands import what they need: torch alone takes seconds, and `flatcal report` needs none of it.

WIDE = 1000  # cells


def main(argv: Sequence[str] | None = None) -> None:
    never_fail()
    given = sys.argv[1:] if argv is None else argv
    if "" in given:  # a path of no letters would be the working directory
        give_up("an argument is empty; is a variable of the shell unset?")
    run_command(_parser().parse_args(given))


def run_command(arguments: argparse.Namespace) -> None:
    """Do what was asked; an error becomes a message, and what was printed has to have arrived."""
    print_warnings_plainly()
    try:
        arguments.run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        give_up(str(error))
    if problem := problem_of_output():
        give_up(f"standard output cannot be written: {problem}")


def shard(arguments: argparse.Namespace) -> None:
    from flatcal_dist.data import prepare_digits, prepare_shards
    from flatcal_dist.data.making.sharding import Encoding

    arguments.destination = expanded(arguments.destination)
    if arguments.source == "digits":
        given = {name: getattr(arguments, name) for name in ("shards", "max_edge", "quality")}
        if any(value is not None for value in given.values()):
            raise ValueError(f"the digits are always the same: leave --{', --'.join(given)} out")
        print(prepare_digits(arguments.destination))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers end in order
    try:
        written = prepare_shards(
            _source(arguments),
            arguments.destination,
            arguments.split,
            prefix=arguments.prefix,
            shards=arguments.shards,
            seed=arguments.seed,
            encoding=Encoding(arguments.max_edge, arguments.quality),
            workers=arguments.workers,
            progress=True,
        )
    except KeyboardInterrupt:
        sys.exit("interrupted: finished shards are kept, the same command writes the others")
    if written.copied:
        print(
            f"{len(written.copied)} images could not be decoded and were copied as they are: "
            + ", ".join(written.copied[:20])
            + (", ..." if len(written.copied) > 20 else "")
        )
    resumed = f", {written.resumed} of them were there already" if written.resumed else ""
    print(f"{len(written.shards)} shards in {arguments.destination}{resumed}")


def _source(arguments: argparse.Namespace) -> "Source":
    from flatcal_dist.data import image_folder
    from flatcal_dist.data.making.archives import ilsvrc_archive
    from flatcal_dist.data.making.sources import TORCHVISION, torchvision_set

    if arguments.source in TORCHVISION:
        if arguments.root is None:
            raise ValueError(f"{arguments.source} needs --root, the directory torchvision keeps")
        return torchvision_set(arguments.source, expanded(arguments.root), arguments.split)
    path = expanded(arguments.source)
    if path.is_dir():
        from flatcal_dist.data.making.image_folder import warn_of_left_out

        source = image_folder(path)
        warn_of_left_out(source.left_out)
        return source
    return ilsvrc_archive(path, arguments.split, arguments.devkit, arguments.workers)


def index(arguments: argparse.Namespace) -> None:
    from flatcal_dist.data import expand
    from flatcal_dist.data.making.parallel import in_parallel

    shards = expand(arguments.shards)
    done = dict(in_parallel(_index, [(path,) for path in shards], arguments.workers))
    results = [done[number] for number in range(len(shards))]
    for problem in itertools.chain.from_iterable(warnings for _, _, warnings in results):
        print(f"warning: {problem.text}", file=sys.stderr)
    indexed = [images for images, _, _ in results if images]
    images = sum(indexed)
    print(f"{len(indexed)} shards indexed, {images:,} image{'s' * (images != 1)}")
    if refused := [reason for _, reason, _ in results if reason]:
        raise ValueError(f"{len(refused)} shards cannot be indexed:\n" + "\n".join(refused))


def _index(path: Path) -> tuple[int, str, list["Problem"]]:
    """Images of a shard, why it has no index, and warnings: its errors are its own."""
    from flatcal_dist.data import DataError
    from flatcal_dist.data.shards.sidecars import index_shard

    warnings: list[Problem] = []
    try:
        return index_shard(path, warnings.append), "", warnings
    except DataError as error:
        return 0, str(error), warnings
    except Exception as error:
        return 0, f"{path}: indexing failed ({type(error).__name__}: {error})", warnings


def validate(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from flatcal_dist.data import expand
    from flatcal_dist.data.making.findings import print_validation
    from flatcal_dist.data.making.validation import validate_shards

    found = validate_shards(
        expand(arguments.shards, arguments.split, missing=True),
        classes=arguments.classes,
        decode_images=arguments.decode,
        workers=arguments.workers,
        progress=True,
    )
    print_validation(found, Console())
    if arguments.json is not None:
        write_json(arguments.json, found.to_json())
    if found.errors:
        sys.exit(1)


def _console() -> "Console":
    """As wide as the terminal, or as COLUMNS says; a file or a pipe has room for any line."""
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else WIDE)


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else whole_number(0)(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0, below 1e6")
    return minutes


def report(arguments: argparse.Namespace) -> None:
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
            f"--{given[0]} is for a file of scores, and {arguments.directory} is none: a run's "
            "report stays in its directory, and the run knows how it was trained"
        )
    directory = arguments.directory / "report"
    render_report(directory if directory.is_dir() else arguments.directory)
    print(directory / "index.html")


def _report_on_file(arguments: argparse.Namespace) -> None:
    """The report on scores from elsewhere, and a line about what was understood of the file."""
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
    from flatcal_dist.calibration.comparison.writing import write_comparison

    refuse_no_directory(arguments.output)
    write_comparison(arguments.directories, arguments.output)
    print(arguments.output / "index.html")


def status(arguments: argparse.Namespace) -> None:

    from flatcal_dist.runs import status as states

    found = states.status(arguments.directories)
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        states.print_status(found, _console())
    if any(one.phase == "unreadable" for one in found):
        sys.exit(1)


def export(arguments: argparse.Namespace) -> None:
    from flatcal_dist.checkpoints.resharding import export

    path = export(arguments.directory, arguments.file, arguments.checkpoint)
    print(f"{arguments.file}: weights of {path}")


def sync(arguments: argparse.Namespace) -> None:
    from flatcal_dist.tracking.wandb_sync import sync as send

    send(arguments.directories, arguments.dry_run, arguments.minutes)


def environment(arguments: argparse.Namespace) -> None:
    from flatcal_dist.runs.environment import describe_environment

    print(json.dumps(describe_environment(), indent=1))


def evaluate(arguments: argparse.Namespace) -> None:
    from flatcal_dist.calibration.records.class_list import read_class_names
    from flatcal_dist.evaluation.job import Wanted, evaluate_model, evaluate_runs
    from flatcal_dist.evaluation.provenance import Provenance

    classes = arguments.classes
    wanted = Wanted(
        data=arguments.data,
        corruptions=arguments.corruptions.split(",") if arguments.corruptions else None,
        severities=_severities(arguments.severities),
        real_file=arguments.real,
        save_logits=arguments.save_logits,
        class_names=None if classes is None else read_class_names(classes),
        confidence=_confidence(arguments.confidence),
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
            arguments.model, arguments.weights, wanted, arguments.output, arguments.overrides,
            arguments.weights_key, Provenance(method=arguments.method, seed=arguments.seed),
        )  # fmt: skip


def _confidence(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [] if text == "none" else [key.strip() for key in text.split(",")]


def _severities(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--severities={text}: expected numbers of 1 to 5, such as 1,3,5")
    return [int(part) for part in parts]


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directories", nargs="*", type=Path, metavar="RUN", help="runs, or RUN/checkpoints/step_N")
    add("--model", metavar="NAME", help="of timm, timm:NAME, torchvision:NAME, mlp; without RUN")
    add("--weights", type=Path, nargs="+", default=[], metavar="FILE",
        help="safetensors or state_dict; left out: what the library publishes")  # fmt: skip
    add("--weights-key", metavar="NAME",
        help="which of several weights in the file, such as state_dict_ema; by default those that "
        "were trained, not their average")  # fmt: skip
    add("--data", action="append", default=[], metavar="[NAME=]DATA",
        help="shards or an ImageFolder tree; may be repeated; by default the run's. The first that "
        "is clean gives the temperature to the others. A NAME that is a kind demands it: imagenet, "
        "imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, imagenet_c, or imagenet_c_generated "
        "to corrupt clean images")  # fmt: skip
    add("--corruptions", metavar="LIST", help="of ImageNet-C: fog,snow; or common, extra, all")
    add("--severities", metavar="LIST", help="of ImageNet-C: 1,3,5; by default all five")
    add("--real", type=Path, metavar="FILE", help="ReaL labels; by default those that timm ships")
    add("--confidence", metavar="LIST",
        help="scores to compute beside those of logits, such as trust_score,mc_dropout (a wrong "
        "name lists all), or none; by default what evaluate.confidence says")  # fmt: skip
    add("--ensemble", action="store_true", help="one report on the networks of all RUNs together")
    add("--save-logits", action="store_true", help="write the clean images' logits.npz as well")
    add("--output", type=Path, metavar="DIR", help="by default RUN/report")
    add("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value",
        help="with --model: configuration, such as model.num_classes=100")  # fmt: skip
    _origin(parser)
    parser.set_defaults(run=evaluate)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "flatcal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser("shard", help="write WebDataset shards, with their index")
    add.add_argument(
        "source", metavar="SOURCE",
        help="an ImageFolder tree, ILSVRC2012_img_train.tar or _val.tar, cifar10, cifar100, digits",
    )  # fmt: skip
    add.add_argument("destination", type=Path, metavar="DESTINATION")
    add.add_argument("--split", choices=("train", "validation"), default="train")
    add.add_argument(
        "--prefix", help="shards are named PREFIX-SPLIT-0000.tar; by default imagenet1k or cifar..."
    )
    add.add_argument(
        "--shards",
        type=int,
        help="their number; by default 1024 and 64 of ImageNet-1K, 20 and 4 of CIFAR, else such "
        "that each has some 150 MB",
    )
    add.add_argument("--seed", type=int, default=0, help="of the order in which images are written")
    add.add_argument(
        "--max-edge", type=int, metavar="PIXELS",
        help="scale larger images down and encode them again; others are copied",
    )  # fmt: skip
    add.add_argument(
        "--quality", type=int,
        help="of images encoded again, 90 by default; without --max-edge all are",
    )  # fmt: skip
    add.add_argument(
        "--devkit", type=Path, metavar="PATH",
        help="with ILSVRC2012_img_val.tar: ILSVRC2012_devkit_t12.tar.gz, or a directory with "
        "meta.mat and the ground truth; by default what lies beside the tar",
    )  # fmt: skip
    add.add_argument("--root", type=Path, metavar="DIR", help="with cifar10, cifar100: their place")
    _workers(add)
    add.set_defaults(run=shard)

    add = commands.add_parser("index", help="index shards written elsewhere")
    add.add_argument("shards", metavar="SHARDS", help="directory or pattern")
    _workers(add)
    add.set_defaults(run=index)

    add = commands.add_parser("validate", help="look for all that is wrong with shards")
    add.add_argument("shards", metavar="SHARDS", help="directory or pattern")
    add.add_argument("--split", help="of a directory that several splits share")
    add.add_argument(
        "--decode", type=_number_or_all, default=1000, metavar="N|all",
        help="how many images to decode, 1000 by default",
    )  # fmt: skip
    add.add_argument("--classes", type=whole_number(), metavar="K", help="labels must be 0 to K-1")
    add.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    _workers(add)
    add.set_defaults(run=validate)

    evaluate_arguments(
        commands.add_parser("evaluate", help="evaluate weights and write the report")
    )

    add = commands.add_parser(
        "report", help="the page again from the records; or a report on a file of logits"
    )
    add.add_argument("directory", type=Path, metavar="RUN|FILE")
    add.add_argument(
        "--output", type=Path, metavar="DIR", help="with FILE: by default FILE_report beside it"
    )
    add.add_argument(
        "--labels", type=Path, metavar="FILE", help="with FILE: another one that holds the labels"
    )
    add.add_argument(
        "--scores", choices=("logits", "probabilities"),
        help="with FILE: what the scores are, whatever their name says",
    )  # fmt: skip
    _origin(add)
    add.set_defaults(run=report)

    add = commands.add_parser("compare", help="compare runs, image by image")
    add.add_argument("directories", type=Path, nargs="+", metavar="RUN")
    add.add_argument("--output", type=Path, required=True, metavar="DIR")
    add.set_defaults(run=compare)

    add = commands.add_parser("status", help="what runs do, where, how far, since how many starts")
    add.add_argument("directories", type=Path, nargs="+", metavar="RUN")
    add.add_argument("--json", action="store_true")
    add.set_defaults(run=status)

    add = commands.add_parser("export", help="weights of a checkpoint, of any engine, as one file")
    add.add_argument("directory", type=Path, metavar="RUN")
    add.add_argument("--checkpoint", type=int, metavar="STEP", help="by default the newest")
    add.add_argument("file", type=Path, metavar="FILE", help="safetensors, as timm reads it")
    add.set_defaults(run=export)

    add = commands.add_parser("sync", help="send runs that were recorded offline to W&B")
    add.add_argument("directories", type=Path, nargs="+", metavar="RUN")
    add.add_argument("--dry-run", action="store_true", help="say what would be sent")
    add.add_argument("--minutes", type=_minutes, default=30.0, help="for each run (30)")
    add.set_defaults(run=sync)

    add = commands.add_parser("environment", help="versions, code, devices")
    add.set_defaults(run=environment)
    return parser


def _origin(parser: argparse.ArgumentParser) -> None:
    """What a network or file from elsewhere does not tell."""
    parser.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="names of the classes in their order, one a line, or JSON",
    )  # fmt: skip
    parser.add_argument(
        "--method", metavar="NAME",
        help="how a network from elsewhere was trained; compare gathers seeds of one method",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole_number(0), metavar="N", help="of that training")


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=whole_number(), default=usable_cores(), metavar="N",
        help="processes; by default the usable cores. The result is the same",
    )  # fmt: skip


if __name__ == "__main__":
    main()
