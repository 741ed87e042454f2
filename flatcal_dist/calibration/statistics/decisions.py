"""Which of many differences count as shown: p-values, and a family of claims held to one level.

A page that compares methods by seven metrics, before and after temperature scaling, makes more than
a dozen claims for each method. At 5 % each, one of them is wrong in every second page of methods
that do not differ. Claims are therefore adjusted together: the chance that a page shows any
difference where there is none is 5 % at most.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, t

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.metrics.entries import STATISTICS
from flatcal_dist.calibration.statistics.bootstrap import Bootstrap

LEVEL = 0.05
ALIKE = 1e-6  # differences of rates and nats that come from the rounding of logits
COUNTED = 10  # replicates beyond zero from which on their share is a p-value by itself


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p-values adjusted so that claiming those of `LEVEL` or less errs in 5 % of families.

    None stands for a comparison that is not defined; it makes no claim and is not counted. No
    assumption is made on how the p-values depend on each other. Source: Holm, A simple
    sequentially rejective multiple test procedure (Scandinavian Journal of Statistics 1979).
    """
    known = [i for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def difference_p_value(
    samples: Bootstrap, which: int, baseline: int, statistic: str
) -> float | None:
    """Two-sided p-value of a paired difference (which minus baseline) over images.

    It is the share of the resamples that lie on the other side of zero, doubled. Resamples cannot
    count a small tail: where fewer than `COUNTED` lie there, the normal tail with their standard
    deviation may make it smaller. Failure prediction depends on the images of the rarer outcome
    alone: there it is no smaller than by Student's t with their number less one. It is 1 for a
    difference below `ALIKE`, and None where the difference is undefined.
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
    return max(p, float(2 * t.sf(size, rarer - 1)))


def _two_sided(point: float, replicates: FloatArray) -> float:
    if abs(point) < ALIKE:
        return 1.0
    beyond = int((np.sign(point) * replicates <= 0).sum())
    counted = min(1.0, 2 * (beyond + 1) / (len(replicates) + 1))
    spread = float(replicates.std())
    if beyond >= COUNTED or spread == 0:
        return counted
    return min(counted, float(2 * norm.sf(abs(point) / spread)))
