"""How far two evaluations can be told to have seen the same images.

An evaluation of ours knows the images by name, label and size. A file of logits from elsewhere
knows them by name and label, where it has ids, and otherwise by the place of its rows alone.
"""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from flatcal_dist.calibration.records.records import Records

KnownBy = Literal["images", "ids", "rows"]
ROW = re.compile(r"row_\d+")  # how images without ids are called
ENOUGH = 50  # images, from which on their scores can tell that rows do not belong together
CHANCE = 3.0  # standard errors of a correlation that chance hardly reaches


def known_by(ids: Sequence[str]) -> KnownBy:
    """`rows` where every id only numbers a row of its file, else `ids`."""
    return "rows" if all(ROW.fullmatch(str(i)) for i in ids) else "ids"


def agreement(first: Records, second: Records) -> float | None:
    """Rank correlation of two networks' NLL of the same images, within the classes, -1 to 1.

    Networks that saw the same images find mostly the same ones hard. About 0 speaks for rows in
    another order, which labels alone cannot show. None where there are too few images to tell.
    """
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
    """Whether rows in a random order could agree as much as that."""
    return correlation is not None and correlation < CHANCE / np.sqrt(images)
