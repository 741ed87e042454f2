"""Commands that write, index and validate shards."""

import argparse
import itertools
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flatcal_dist.arguments import usable_cores, whole_number
from flatcal_dist.files import expanded, write_json

if TYPE_CHECKING:
    from flatcal_dist.data.making.sources import Source
    from flatcal_dist.data.shards.walk import Problem


def add_commands(commands: "argparse._SubParsersAction") -> None:
    """Add the parsers of this module's commands."""
    shard_arguments(commands.add_parser("shard", help="write WebDataset shards and their index"))
    index_arguments(commands.add_parser("index", help="index shards that others wrote"))
    validate_arguments(commands.add_parser("validate", help="look for all that is wrong in shards"))


def shard_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE",
        help="an ImageFolder tree, ILSVRC2012_img_train.tar or _val.tar, cifar-10-python.tar.gz or "
        "cifar-100-python.tar.gz, tiny-imagenet-200.zip, an unpacked folder of these three, "
        "cifar10, cifar100, digits")  # fmt: skip
    add("destination", type=Path, metavar="DESTINATION")
    add("--split", choices=("train", "validation"), default="train")
    add("--prefix", help="shards are named PREFIX-SPLIT-0000.tar; by default imagenet1k, cifar10 "
        "and so on, or images for classes of one's own")  # fmt: skip
    add("--shards", type=int,
        help="the number of shards; by default 1024 and 64 for ImageNet-1K, 20 and 4 for CIFAR, "
        "else such that each has about 150 MB")  # fmt: skip
    add("--seed", type=int, default=0, help="the seed of the order in which images are written")
    add("--max-edge", type=int, metavar="PIXELS",
        help="scale larger images down and encode them again; others are copied")  # fmt: skip
    add("--quality", type=int,
        help="the JPEG quality of images that are encoded again, 90 by default; without "
        "--max-edge all images are encoded again")  # fmt: skip
    add("--devkit", type=Path, metavar="PATH",
        help="with ILSVRC2012_img_val.tar: ILSVRC2012_devkit_t12.tar.gz, or a directory with "
        "meta.mat and the ground truth; by default what lies beside the tar")  # fmt: skip
    add("--root", type=Path, metavar="DIR",
        help="with cifar10, cifar100: the directory in which torchvision keeps them")  # fmt: skip
    add("--labels", type=Path, metavar="FILE",
        help="with CIFAR's training images: CIFAR-10_human.pt or CIFAR-100_human.pt, whose labels "
        "replace the published ones")  # fmt: skip
    add("--labels-name", metavar="NAME",
        help="which labels of this file: worse_label, aggre_label, random_label1, ...")  # fmt: skip
    add("--unchecked", action="store_true",
        help="read files of CIFAR and Tiny-ImageNet that are not the published ones, bit for bit"
        )  # fmt: skip
    _workers(parser)
    parser.set_defaults(run=shard)


def index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="directory or pattern")
    _workers(parser)
    parser.set_defaults(run=index)


def validate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="directory or pattern")
    add("--split", help="the split to take from a directory that several splits share")
    add("--decode", type=_number_or_all, default=1000, metavar="N|all",
        help="how many images to decode, 1000 by default")  # fmt: skip
    add("--classes", type=whole_number(), metavar="K", help="labels must be 0 to K-1")
    add("--json", type=Path, metavar="FILE", help="write the findings into this file, too")
    _workers(parser)
    parser.set_defaults(run=validate)


def shard(arguments: argparse.Namespace) -> None:
    """Write shards from a source, or go on with writing them."""
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
    source = _published(arguments)
    if arguments.labels is None:
        if arguments.labels_name is not None:
            raise ValueError("--labels-name chooses from a file: name it with --labels")
        return source
    from flatcal_dist.data.making.cifar import SETS
    from flatcal_dist.data.making.human_labels import with_human_labels

    if source.prefix not in SETS:
        raise ValueError("--labels are those of CIFAR-N: they go with CIFAR's training images")
    return with_human_labels(source, expanded(arguments.labels), arguments.labels_name)


def _published(arguments: argparse.Namespace) -> "Source":
    from flatcal_dist.data import image_folder
    from flatcal_dist.data.making.archives import ilsvrc_archive
    from flatcal_dist.data.making.cifar import SETS, cifar, is_cifar
    from flatcal_dist.data.making.tiny_imagenet import is_tiny_imagenet, tiny_imagenet

    split, checked = arguments.split, not arguments.unchecked
    if arguments.source in SETS:
        if arguments.root is None:
            raise ValueError(f"{arguments.source} needs --root, the directory torchvision keeps")
        return cifar(expanded(arguments.root), split, arguments.source, checked=checked)
    path = _published_below(expanded(arguments.source))
    if is_cifar(path):
        return cifar(path, split, checked=checked)
    if is_tiny_imagenet(path):
        return tiny_imagenet(path, split, checked=checked)
    if path.is_dir():
        from flatcal_dist.data.making.image_folder import warn_of_left_out

        if is_tiny_imagenet(path.absolute().parent) and path.name in ("train", "val", "test"):
            raise ValueError(
                f"{path} is a part of Tiny-ImageNet: name the folder above it, and the split "
                "(--split train or validation)"
            )
        source = image_folder(path)
        warn_of_left_out(source.left_out)
        return source
    return ilsvrc_archive(path, split, arguments.devkit, arguments.workers)


def _published_below(path: Path) -> Path:
    """Return the published set that a directory holds, such as torchvision's, or else the path.

    ValueError if it holds several, or other folders, which may be classes.
    """
    from flatcal_dist.data.making.cifar import SETS
    from flatcal_dist.data.making.tiny_imagenet import ARCHIVE, FOLDER

    names = [*((one.folder, one.archive) for one in SETS.values()), (FOLDER, ARCHIVE)]
    places = [[path / name for name in both if (path / name).exists()] for both in names]
    found = [of_set[0] for of_set in places if of_set]
    if not found:
        return path
    known = {name for both in names for name in both}
    folders = (entry for entry in sorted(path.iterdir()) if entry.is_dir())
    found += [one for one in folders if one.name not in known and not one.name.startswith(".")][:1]
    if len(found) > 1:
        several = " and ".join(str(place) for place in found)
        raise ValueError(f"{path} holds {several}: name one of them")
    return found[0]


def index(arguments: argparse.Namespace) -> None:
    """Index shards. All of them are tried before an error is raised."""
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
    """Return the number of images, why the shard has no index, and warnings.

    An error is returned, not raised, so that one shard does not stop the others.
    """
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
    """Print what is wrong with shards, and exit with 1 if there are errors."""
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


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else whole_number(0)(text)


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=whole_number(), default=usable_cores(), metavar="N",
        help="processes; by default the usable cores. The result is the same",
    )  # fmt: skip
