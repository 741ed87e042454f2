"""How sure it is that two evaluations have seen the same images.

An evaluation by this package knows name, label and size of each image. A file of logits from
elsewhere knows name and label of each image if it has ids. Otherwise it only knows the order of its
rows.
"""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from flatcal_dist.calibration.records.records import Records

KnownBy = Literal["images", "ids", "rows"]
ROW = re.compile(r"row_\d+")  # the name of an image without an id
ENOUGH = 50  # images from which on scores can tell that rows do not belong together
CHANCE = 3.0  # standard errors that the correlation of unrelated rows hardly ever exceeds


def known_by(ids: Sequence[str]) -> KnownBy:
    """Return `rows` if every id only numbers a row of a file, else `ids`."""
    return "rows" if all(ROW.fullmatch(str(i)) for i in ids) else "ids"


def agreement(first: Records, second: Records) -> float | None:
    """Return the rank correlation of two networks' NLL within the classes, -1 to 1.

    Two networks mostly find the same images hard. A correlation of about 0 is a sign of rows in
    different orders, which labels alone cannot show. It is None if there are too few images.
    """
    from scipy.stats import rankdata  # the import takes most of a second of each start

    columns = []
    for records in (first, second):
        rank = rankdata(records.before.nll)
        images = np.bincount(first.label)
        of_class = np.bincount(first.label, weights=rank) / np.maximum(images, 1)
        columns.append(rank - of_class[first.label])
    lengths = [float(np.linalg.norm(column)) for column in columns]
    if len(first) < ENOUGH or min(lengths) < 1e-9:
        return None
    return float(columns[0] @ columns[1] / (lengths[0] * lengths[1]))


def is_chance(correlation: float | None, images: int) -> bool:
    """Return whether rows in a random order could agree as much."""
    return correlation is not None and correlation < CHANCE / np.sqrt(images)
