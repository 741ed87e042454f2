"""The `flatcal` command: shards in, reports out.

flatcal shard SOURCE DESTINATION --split train|validation
flatcal index SHARDS
flatcal evaluate RUN [RUN ...] [--data [NAME=]DATA ...] [--output DIR]
flatcal evaluate --model NAME [--weights FILE] --data DATA --output DIR [--set key.sub=value ...]
flatcal report RUN
flatcal report LOGITS.npz|.parquet|.csv [--output DIR]
flatcal compare RUN RUN ... --output DIR
flatcal environment
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flatcal_dist.calibration.compare import write_comparison
from flatcal_dist.calibration.imported import read_file
from flatcal_dist.calibration.report import render_report, write_report
from flatcal_dist.calibration.summary import About
from flatcal_dist.data import expand, index_shard, prepare_digits, shard_image_folder
from flatcal_dist.environment import describe_environment


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_parser().parse_args(argv))


def run_command(arguments: argparse.Namespace) -> None:
    try:
        arguments.run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)


def shard(arguments: argparse.Namespace) -> None:
    arguments.destination = arguments.destination.expanduser()
    if arguments.source == "digits":
        if arguments.shards is not None:
            raise ValueError("the digits have a fixed number of shards: leave --shards out")
        print(prepare_digits(arguments.destination))
        return
    shards = shard_image_folder(
        Path(arguments.source),
        arguments.destination,
        arguments.split,
        prefix=arguments.prefix,
        shards=arguments.shards,
        seed=arguments.seed,
    )
    print(f"{len(shards)} shards in {arguments.destination}")


def index(arguments: argparse.Namespace) -> None:
    shards = expand(arguments.shards)
    images = sum(index_shard(path) for path in shards)
    print(f"{len(shards)} shards indexed, {images:,} images")


def report(arguments: argparse.Namespace) -> None:
    if arguments.directory.is_file():
        output = arguments.output or arguments.directory.with_name(
            f"{arguments.directory.stem}_report"
        )
        about = About(title=arguments.directory.stem, data=arguments.directory.name)
        write_report(read_file(arguments.directory), output, about)
        print(output / "index.html")
        return
    if arguments.output is not None:
        raise ValueError("--output is for a file of logits; a run's report stays in its directory")
    directory = arguments.directory / "report"
    render_report(directory if directory.is_dir() else arguments.directory)
    print(directory / "index.html")


def compare(arguments: argparse.Namespace) -> None:
    write_comparison(arguments.directories, arguments.output)
    print(arguments.output / "index.html")


def environment(arguments: argparse.Namespace) -> None:
    print(json.dumps(describe_environment(), indent=1))


def evaluate(arguments: argparse.Namespace) -> None:
    from flatcal_dist.evaluation_job import Wanted, evaluate_model, evaluate_runs  # loads torch

    wanted = Wanted(
        data=arguments.data,
        corruptions=arguments.corruptions.split(",") if arguments.corruptions else None,
        severities=_severities(arguments.severities),
        real_file=arguments.real,
        save_logits=arguments.save_logits,
    )
    if arguments.directories:
        if arguments.model or arguments.weights or arguments.overrides:
            raise ValueError(
                "evaluate takes a RUN, or --model with --weights, --data and --output; not both"
            )
        evaluate_runs(arguments.directories, wanted, arguments.output)
    else:
        evaluate_model(
            arguments.model, arguments.weights, wanted, arguments.output, arguments.overrides
        )


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
    add("--data", action="append", default=[], metavar="[NAME=]DATA",
        help="shards or an ImageFolder tree; may be repeated; by default the run's. The first that "
        "is clean gives the temperature to the others. A NAME that is a kind demands it: imagenet, "
        "imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, imagenet_c, or imagenet_c_generated "
        "to corrupt clean images")  # fmt: skip
    add("--corruptions", metavar="LIST", help="of ImageNet-C: fog,snow; or common, extra, all")
    add("--severities", metavar="LIST", help="of ImageNet-C: 1,3,5; by default all five")
    add("--real", type=Path, metavar="FILE", help="ReaL labels; by default those that timm ships")
    add("--save-logits", action="store_true", help="write the clean images' logits.npz as well")
    add("--output", type=Path, metavar="DIR", help="by default RUN/report")
    add("--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value",
        help="with --model: configuration, such as model.num_classes=100")  # fmt: skip
    parser.set_defaults(run=evaluate)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "flatcal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser("shard", help="write WebDataset shards, with their index")
    add.add_argument("source", metavar="SOURCE", help="an ImageFolder tree, or 'digits'")
    add.add_argument("destination", type=Path, metavar="DESTINATION")
    add.add_argument("--split", choices=("train", "validation"), default="train")
    add.add_argument(
        "--prefix", default="imagenet1k", help="shards are named PREFIX-SPLIT-0000.tar"
    )
    add.add_argument("--shards", type=int, help="their number; by default 1024, validation 64")
    add.add_argument("--seed", type=int, default=0, help="of the order in which images are written")
    add.set_defaults(run=shard)

    add = commands.add_parser("index", help="index shards written elsewhere")
    add.add_argument("shards", metavar="SHARDS", help="directory or pattern")
    add.set_defaults(run=index)

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
    add.set_defaults(run=report)

    add = commands.add_parser("compare", help="compare runs, image by image")
    add.add_argument("directories", type=Path, nargs="+", metavar="RUN")
    add.add_argument("--output", type=Path, required=True, metavar="DIR")
    add.set_defaults(run=compare)

    add = commands.add_parser("environment", help="versions, code, devices")
    add.set_defaults(run=environment)
    return parser


if __name__ == "__main__":
    main()
