"""What training seeds tell: mean and spread of a method, and the difference of two methods.

The bootstrap over images compares two networks. Whether two methods differ can only be found with
several networks of each. Few seeds allow to say little, and the numbers here tell how little.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats takes most of a second to import

from flatcal_dist.calibration.statistics.intervals import beyond_zero

LEVEL = 0.95
MOST_SIGNS = 16  # seeds up to which all patterns of signs are tried; beyond, 2^16 are drawn
Seed = TypeVar("Seed", bound=Hashable)


@dataclass(frozen=True)
class OverSeeds:
    """A metric over the seeds of one method.

    Args:
        mean: The mean. None if a value is undefined.
        sd: The standard deviation with N - 1 in the denominator. None for one seed.
        low: The lower end of Student's 95 % interval of the mean. None for one seed.
        high: The upper end of this interval.
        seeds: The number of seeds.
    """

    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class SeedDifference:
    """The difference of two methods, first minus second, over the seeds that both have.

    All fields but `mean` and `seeds` are None for a single seed.

    Args:
        mean: The mean of the differences by seed.
        sd: The standard deviation of the differences.
        low: The lower end of Student's 95 % interval, which takes the differences for normal.
        high: The upper end of this interval.
        student_p_value: The p-value of Student's test.
        p_value: The p-value of the sign-flip test, which takes the differences for symmetric only.
        least_p_value: The least p-value that the sign-flip test can have, 2 / 2^seeds.
        seeds: The number of seeds.
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
        """Whether the t interval of three seeds or more shows a difference."""
        return self.seeds >= 3 and beyond_zero(self.low, self.high)


def over_seeds(values: Sequence[float | None]) -> OverSeeds:
    """Return mean and spread of one metric over the seeds of one method."""
    if not len(values):
        raise ValueError("values are empty: at least one seed is needed")
    if any(v is None or not np.isfinite(v) for v in values):
        return OverSeeds(None, None, None, None, len(values))
    x = np.array(values, dtype=np.float64)
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return OverSeeds(mean, None, None, None, 1)
    sd = float(x.std(ddof=1))
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * sd / np.sqrt(n)
    return OverSeeds(mean, sd, float(mean - half), float(mean + half), n)


def seed_difference(
    first: Mapping[Seed, float | None], second: Mapping[Seed, float | None]
) -> SeedDifference | None:
    """Compare one metric of two methods, which are given as {seed: value}.

    Values are paired by seed. This takes out what runs of one seed share, such as the order of the
    data and the first weights. Sources: Student (1908); Fisher, The Design of Experiments (1935),
    section 21.

    Returns:
        The difference. None if the methods share no seed, or if a value of a shared seed is
        undefined.
    """
    shared = sorted(set(first) & set(second), key=str)
    pairs = [(first[s], second[s]) for s in shared]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    d = np.array([a - b for a, b in known], dtype=np.float64)
    if not len(d) or len(d) < len(pairs) or not np.isfinite(known).all():
        return None
    mean, spread, n = float(d.mean()), over_seeds(d.tolist()), len(d)
    if spread.sd is None:
        return SeedDifference(mean, None, None, None, None, None, None, 1)
    p, least = _sign_flips(d), 2.0 ** (1 - n)
    of_student = _student(mean, spread.sd, n)
    return SeedDifference(mean, spread.sd, spread.low, spread.high, of_student, p, least, n)


def _student(mean: float, sd: float, seeds: int) -> float:
    """The two-sided p-value of a mean of differences."""
    if mean == 0:
        return 1.0
    if sd == 0:
        return 0.0
    size = abs(mean) / (sd / np.sqrt(seeds))
    return float(2 * stdtr(seeds - 1, -size))


def _sign_flips(d: np.ndarray) -> float:
    """The share of the patterns of signs under which the mean is at least as far from 0."""
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
    slack = 1e-12 * np.abs(d).sum()  # sums that differ by rounding alone are equal
    return float((np.abs(signs @ d) >= abs(d.sum()) - slack).mean())
