"""Whether images may be evaluated: none that was seen already, and none of other classes.

A temperature that is fitted on evaluated images flatters them. A score that compares images with
training images finds an evaluated training image among its own neighbours, with its label.
"""

import hashlib
import warnings
from collections.abc import Sequence

import numpy as np

from flatcal_dist import inputs
from flatcal_dist.calibration.confidence.score import OF_FEATURES, Score
from flatcal_dist.config import Config
from flatcal_dist.data import DataError
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.sets.class_labels import are_numbers
from flatcal_dist.data.sets.variants import DataSet
from flatcal_dist.data.shards.listing import class_names, list_shards
from flatcal_dist.runs.directory import RunDirectory

WHOLE = 50_000  # images of both sets, up to which images of equal size are compared whatever labels
MOST_READ = 20_000  # images of each set that are read
TWINS = 0.01  # of the smaller set: published data sets share a few images, and these do no harm


def refuse_changed_training(runs: Sequence[tuple[Config, RunDirectory]]) -> None:
    """Raise DataError if the training images of a run are not those that it was trained on.

    Which images `data.holdout` keeps apart depends on all of them, so that others would be taken.

    Args:
        runs: The configuration and the directory of each run.
    """
    for config, directory in runs:
        if inputs.streams(config.data):
            continue  # a stream has another identity than the index of its shards
        trained_on = directory.environment().get("train_data")
        found = inputs.open_index(config.data, "train", config.model.num_classes).identity
        if trained_on not in (None, "-", found):
            raise DataError(
                f"data.train={config.data.train} holds other images than when {directory.path} was "
                f"trained ({trained_on[:16]}... then, {found[:16]}... now), so nothing tells which "
                "of them the network has seen. Put the data back"
                + ("" if config.data.holdout else ", or evaluate with --confidence none")
            )


def refuse_other_classes(configs: Sequence[Config], data: DataSet) -> None:
    """Raise DataError if classes have other names than those that a network was trained on.

    Only classes that are told by name, here and beside the training shards, are compared.

    Args:
        configs: The configuration of each network.
        data: The images to evaluate.
    """
    own = data.class_names if data.variant.kind == "plain" else None
    for config in configs:
        pattern = config.data.train
        if own is None or pattern is None or inputs.remote(pattern):
            continue
        try:
            access = inputs.access(config.data)
            known = class_names(list_shards(pattern, "train", access), access)
        except DataError:
            continue  # the training shards need not be here
        for plan, names in known.items():
            if names != own and not are_numbers(names):
                odd = sorted({*names} ^ {*own})
                which = f"{odd[0]!r} is in one of them only" if odd else "they are in other order"
                raise DataError(
                    f"{data.variant} has other classes than {plan}, which the network was trained "
                    f"on ({which}): equal labels would mean different classes. Give the folders "
                    "the same names"
                )


def refuse_seen(
    config: Config, data: DataSet, scores: Sequence[Score], apart: ImageIndex | None
) -> None:
    """Raise DataError if a temperature or a score sees evaluated images.

    Args:
        config: The configuration of the network.
        data: The images to evaluate.
        scores: The scores of confidence that are computed.
        apart: The images that `data.holdout` keeps apart.
    """
    if apart is not None:
        refuse_common(
            data.index,
            apart,
            "kept apart by data.holdout, and the temperature is fitted on them: evaluate others",
        )
    if comparing := [score.key for score in scores if score.needs in OF_FEATURES]:
        refuse_common(
            data.index,
            inputs.open_index(config.data, "train", config.model.num_classes),
            f"training images, which {' and '.join(comparing)} would find among their own "
            "neighbours: evaluate others, or use --confidence none",
        )


def refuse_common(evaluated: ImageIndex, others: ImageIndex, why: str) -> None:
    """Raise DataError if images are in both sets, byte by byte. Warn of a few.

    Args:
        evaluated: The images to evaluate.
        others: Images that a temperature, a head or a score sees.
        why: What is wrong about that, and how to mend it.
    """
    mine, theirs = _of_equal_size(evaluated, others)
    seen = {_digest(others, sample) for sample in theirs[:MOST_READ].tolist()}
    both = [s for s in mine[:MOST_READ].tolist() if _digest(evaluated, s) in seen] if seen else []
    if not both:
        return
    told = f"{len(both)} of the {len(evaluated)} evaluated images, first {evaluated.key(both[0])}, "
    if len(both) > TWINS * min(len(evaluated), len(others)):
        raise DataError(f"{told}are {why}")
    warnings.warn(f"{told}are {why.partition(':')[0]}", RuntimeWarning, stacklevel=2)


def _of_equal_size(one: ImageIndex, other: ImageIndex) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the images in each set whose bytes may be those of one in the other.

    In large sets labels have to agree as well, because many images have as many bytes by chance.
    """
    marks = [np.asarray(index.size, np.int64) for index in (one, other)]
    if len(one) + len(other) > WHOLE:
        labels = [np.asarray(index.label, np.int64) for index in (one, other)]
        marks = [size * 2**20 + label for size, label in zip(marks, labels, strict=True)]
    first, second = (np.isin(a, b) for a, b in (marks, marks[::-1]))
    return np.flatnonzero(first), np.flatnonzero(second)


def _digest(index: ImageIndex, sample: int) -> bytes:
    return hashlib.sha256(index.read(sample)).digest()
