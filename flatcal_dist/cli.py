"""The `flatcal` command: shards in, reports out.

flatcal shard SOURCE DESTINATION --split train|validation
flatcal index SHARDS
flatcal evaluate RUN [--data SHARDS] [--output DIR]
flatcal evaluate --model NAME --weights FILE --data SHARDS --output DIR [--set key.sub=value ...]
flatcal report RUN
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
from flatcal_dist.calibration.report import render_report
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
    directory = arguments.directory / "report"
    render_report(directory if directory.is_dir() else arguments.directory)
    print(directory / "index.html")


def compare(arguments: argparse.Namespace) -> None:
    write_comparison(arguments.directories, arguments.output)
    print(arguments.output / "index.html")


def environment(arguments: argparse.Namespace) -> None:
    print(json.dumps(describe_environment(), indent=1))


def evaluate(arguments: argparse.Namespace) -> None:
    from flatcal_dist.evaluation_job import evaluate_model, evaluate_run  # loads torch and timm

    if arguments.directory is not None:
        if arguments.model or arguments.weights or arguments.overrides:
            raise ValueError(
                "evaluate takes a RUN, or --model with --weights, --data and --output; not both"
            )
        evaluate_run(arguments.directory, arguments.data, arguments.output)
    else:
        evaluate_model(
            arguments.model,
            arguments.weights,
            arguments.data,
            arguments.output,
            arguments.overrides,
        )


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--model", metavar="NAME", help="a network of timm, or mlp; without RUN")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, or a state_dict")
    parser.add_argument(
        "--data", metavar="SHARDS", help="pattern or directory; by default the run's"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="by default RUN/report")
    parser.add_argument(
        "--set", dest="overrides", nargs="*", default=[], metavar="key.sub=value",
        help="with --model: configuration, such as model.num_classes=100",
    )  # fmt: skip
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

    add = commands.add_parser("report", help="write the page and figures again from the records")
    add.add_argument("directory", type=Path, metavar="RUN")
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
