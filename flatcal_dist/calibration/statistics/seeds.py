"""What training seeds tell: mean and spread of a method, and the difference of two.

The bootstrap over images compares two networks; whether two methods differ needs several networks
of each. With few seeds little can be said, and the numbers here say how little.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from flatcal_dist.calibration.statistics.intervals import beyond_zero

LEVEL = 0.95
MOST_SIGNS = 16  # of seeds whose signs are all tried; beyond, as many signs are drawn


@dataclass(frozen=True)
class OverSeeds:
    """mean, and sd with N - 1 in the denominator (None for one seed); low and high: Student's 95 %
    interval of the mean, None for one seed; mean None where a value is undefined.
    """

    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class SeedDifference:
    """Difference of two methods, first minus second, over the seeds that both have.

    mean, sd, low, high: of the differences by seed (Student's t: takes them for normal), and
    student_p_value of the same test. p_value: of the sign-flip test, which takes them for symmetric
    alone; least_p_value: what it could be at best with this many seeds, 2 / 2^seeds. All but mean
    are None for fewer than two.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    student_p_value: float | None
    p_value: float | None
    least_p_value: float | None
    seeds: int

    @property
    def shown(self) -> bool:
        """Is there a difference? By the t interval, and from three seeds on."""
        return self.seeds >= 3 and beyond_zero(self.low, self.high)


def over_seeds(values: Sequence[float | None]) -> OverSeeds:
    """Mean and spread of one metric over the seeds of one method."""
    if not len(values):
        raise ValueError("values are empty: at least one seed is needed")
    if any(v is None or not np.isfinite(v) for v in values):
        return OverSeeds(None, None, None, None, len(values))
    x = np.array(values, dtype=np.float64)
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return OverSeeds(mean, None, None, None, 1)
    sd = float(x.std(ddof=1))
    half = float(student.ppf((1 + LEVEL) / 2, n - 1)) * sd / np.sqrt(n)
    return OverSeeds(mean, sd, float(mean - half), float(mean + half), n)


def seed_difference(
    first: Mapping[Hashable, float | None], second: Mapping[Hashable, float | None]
) -> SeedDifference | None:
    """Compare one metric of two methods, given as {seed: value}, paired by seed.

    Pairing takes out what the seeds share (order of the data, first weights). None if they share
    no seed, or a value is undefined there. Sources: Student (1908); Fisher, The Design of
    Experiments (1935), section 21.
    """
    shared = sorted(set(first) & set(second), key=str)
    pairs = [(first[s], second[s]) for s in shared]
    if not pairs or any(v is None or not np.isfinite(v) for pair in pairs for v in pair):
        return None
    d = np.array([a - b for a, b in pairs], dtype=np.float64)
    spread, n = over_seeds(d.tolist()), len(d)
    if n == 1:
        return SeedDifference(spread.mean, None, None, None, None, None, None, 1)
    p, least = _sign_flips(d), 2.0 ** (1 - n)
    interval = (spread.sd, spread.low, spread.high, _student(spread))
    return SeedDifference(spread.mean, *interval, p, least, n)


def _student(spread: OverSeeds) -> float:
    """Two-sided p-value of the mean of these differences."""
    if spread.mean == 0:
        return 1.0
    if spread.sd == 0:
        return 0.0
    size = abs(spread.mean) / (spread.sd / np.sqrt(spread.seeds))
    return float(2 * student.sf(size, spread.seeds - 1))


def _sign_flips(d: np.ndarray) -> float:
    """Share of the sign patterns under which the mean is as far from 0 as it is, two-sided."""
    n = len(d)
    if n <= MOST_SIGNS:
        signs = np.ones((1, 0))
        for _ in range(n):
            signs = np.concatenate(
                [np.pad(signs, ((0, 0), (0, 1)), constant_values=v) for v in (1, -1)]
            )
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(2**16, n))
        signs[0] = 1
    slack = 1e-12 * np.abs(d).sum()  # equal up to rounding is equal
    return float((np.abs(signs @ d) >= abs(d.sum()) - slack).mean())
