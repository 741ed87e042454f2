"""Which of many differences count as shown: p-values, and a family of claims held to one level.

A page compares methods by seven metrics, before and after temperature scaling. This makes more than
a dozen claims for each method. If each claim erred in 5 % of cases, every second page of methods
that do not differ would hold a wrong one. Claims are therefore adjusted together: the chance that a
page shows any difference where there is none is at most 5 %.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, stdtr

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.metrics.entries import STATISTICS
from flatcal_dist.calibration.statistics.bootstrap import Bootstrap

LEVEL = 0.05
ALIKE = 1e-6  # differences of rates and nats that come from the rounding of logits
COUNTED = 10  # replicates beyond zero from which on their share is a p-value by itself


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values that are adjusted as one family.

    If all comparisons whose adjusted p-value is at most `LEVEL` are claimed, 5 % of families hold a
    wrong claim. The p-values may depend on each other in any way. None stands for a comparison that
    is not defined, which makes no claim and is not counted. Source: Holm, A simple sequentially
    rejective multiple test procedure (Scandinavian Journal of Statistics 1979).
    """
    known = {i: p for i, p in enumerate(p_values) if p is not None}
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, i in enumerate(sorted(known, key=known.__getitem__)):
        least = max(least, min(1.0, (len(known) - rank) * known[i]))
        adjusted[i] = least
    return adjusted


def difference_p_value(
    samples: Bootstrap, which: int, baseline: int, statistic: str
) -> float | None:
    """Return the two-sided p-value of a paired difference over images.

    It is twice the share of the resamples that lie on the other side of zero. Resamples cannot
    count a small tail. Where fewer than `COUNTED` lie on the other side, the normal tail with their
    standard deviation may make the p-value smaller. Failure prediction depends on the images of the
    rarer outcome alone. There the p-value is never below that of Student's t with their number less
    one as degrees of freedom.

    Args:
        samples: The statistics on resamples.
        which: The place of a set of scores.
        baseline: The place of the set that is subtracted.
        statistic: The name of the statistic.

    Returns:
        The p-value. It is 1 for a difference below `ALIKE`, and None for an undefined difference.
    """
    m = samples.statistics.index(statistic)
    moved = samples.replicates[:, which, m] - samples.replicates[:, baseline, m]
    point = samples.point[which, m] - samples.point[baseline, m]
    defined = moved[np.isfinite(moved)]
    if not np.isfinite(point) or not len(defined):
        return None
    if STATISTICS[statistic].centred:  # inflated in resamples, as in `Bootstrap.difference`
        defined = defined - defined.mean() + point
    p = _two_sided(float(point), defined)
    if not STATISTICS[statistic].of_order or p == 1.0:
        return p
    rarer, spread = min(samples.rarer[which], samples.rarer[baseline]), float(defined.std())
    if rarer < 2 or spread == 0:
        return 1.0
    size = abs(float(point)) / spread * np.sqrt((rarer - 1) / rarer)
    return max(p, float(2 * stdtr(rarer - 1, -size)))


def _two_sided(point: float, replicates: FloatArray) -> float:
    if abs(point) < ALIKE:
        return 1.0
    beyond = int((np.sign(point) * replicates <= 0).sum())
    counted = min(1.0, 2 * (beyond + 1) / (len(replicates) + 1))
    spread = float(replicates.std())
    if beyond >= COUNTED or spread == 0:
        return counted
    return min(counted, float(2 * ndtr(-abs(point) / spread)))
