"""Bootstrap over images: intervals, and paired differences on the same images; exact tests.

Images are resampled with replacement; every run or score given together sees the same draws, so
that differences are paired. Intervals tell of the sampling of images, not of training seeds: for
those see `seeds`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from . import inflated, intervals, selective
from .checks import BoolArray, FloatArray, confidence_and_correct, positive_integer
from .intervals import LEVEL, ROUNDING, Interval, no_width, percentile, proportion_interval
from .metrics import equal_mass_edges
from .smooth import SmoothSums
from .softmax import Scores, keep_memory

RESAMPLES = 1000
BATCH = 32  # of resamples that smooth ECE convolves at a time
MEANS = ("accuracy", "nll", "brier", "signed_gap", "mean_entropy")
OTHER_MEANS = ("mean_confidence", "top_label_brier", "mean_entropy_correct", "mean_entropy_wrong")
BINNED = ("ece", "adaptive_ece", "adaptive_ece_100", "rmsce", "rmsce_debiased", "ks", "smooth_ece")
RANKS: dict[str, Callable[[selective.TieGroups], float | None]] = {
    "aurc": selective.groups_aurc,
    "eaurc": selective.groups_eaurc,
    "naurc": selective.groups_naurc,
    "augrc": selective.groups_augrc,
    "auroc": selective.groups_auroc,
    "fpr_at_95_tpr": selective.groups_fpr_at_95_tpr,
    "aupr_success": selective.groups_aupr_success,
    "aupr_error": selective.groups_aupr_error,
    "coverage_at_95_accuracy": lambda g: selective.groups_coverage_at_risk(g, 0.05),
    "coverage_at_99_accuracy": lambda g: selective.groups_coverage_at_risk(g, 0.01),
    "risk_at_80_coverage": lambda g: selective.groups_risk_at_coverage(g, 0.8),
}
STATISTICS = (*MEANS, *OTHER_MEANS, *BINNED, *RANKS)
NORMS = {  # of the gaps that make up an error, see `inflated`
    "ece": inflated.absolute,
    "adaptive_ece": inflated.absolute,
    "adaptive_ece_100": inflated.absolute,
    "rmsce": inflated.euclidean,
    "ks": inflated.largest,
    "smooth_ece": inflated.absolute,
}
OF_OUTCOMES = {"accuracy", "signed_gap", "top_label_brier", *BINNED, *RANKS}
RISKS = {"coverage_at_95_accuracy": 0.05, "coverage_at_99_accuracy": 0.01}
FEWEST_ERRORS = 5  # among the images answered; a coverage that rests on fewer has no interval
FEWEST_FOR_100_BINS = 1000  # ten images a bin
DRIFT_POINTS = 256  # at which the running sum of KS is kept for its interval


class _Ranked:
    """One score, sorted once; its failure prediction for a vector of image weights."""

    def __init__(self, score: FloatArray, correct: BoolArray) -> None:
        self.order, starts = selective.tie_order(score)
        self.wrong = (~correct[self.order]).astype(np.float64)
        tied = len(starts) < len(score)
        self.ends = np.append(starts[1:], len(score)) - 1 if tied else slice(None)

    def running(self, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Images and wrong ones among the first k, k = 0 to N, of weights in falling order."""
        accepted, errors = np.zeros(len(weight) + 1), np.zeros(len(weight) + 1)
        np.cumsum(weight, out=accepted[1:])
        np.cumsum(weight * self.wrong, out=errors[1:])
        return accepted, errors

    def figures(self, accepted: FloatArray, errors: FloatArray) -> list[float]:
        groups = selective.TieGroups(accepted[1:][self.ends], errors[1:][self.ends])
        return [np.nan if (v := f(groups)) is None else v for f in RANKS.values()]

    def __call__(self, weight: FloatArray) -> list[float]:
        return self.figures(*self.running(weight[self.order]))


class _Sorted:
    """One set of scores, sorted once; evaluates `STATISTICS` for a vector of image weights.

    Sorted by confidence, a bin is a stretch of images, and its sum a difference of two running
    sums: all binned figures come from the same few.
    """

    def __init__(self, scores: Scores, bins: int) -> None:
        self.ranked = _Ranked(scores.log_confidence, scores.correct)
        order = self.ranked.order
        confidence, correct = scores.confidence[order], scores.correct[order].astype(np.float64)
        gap = confidence - correct
        missing = np.full(len(order), np.nan)
        nll, brier, entropy = (
            missing if column is None else column[order]
            for column in (scores.nll, scores.brier, scores.entropy)
        )
        self.columns = np.stack([correct, nll, brier, gap, entropy, confidence, gap**2], axis=1)
        self.entropy_correct = entropy * correct
        self.gap = gap
        falling = -confidence
        edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
        self.cuts = [
            np.concatenate([[0], np.searchsorted(falling, -inner[::-1]), [len(order)]])
            for inner in (edges, *(equal_mass_edges(confidence, m) for m in (bins, 100)))
        ]
        self.tie_starts = np.flatnonzero(np.append(True, np.diff(falling) > 0))
        self.smooth = SmoothSums(confidence, correct)
        share = np.maximum(np.diff(self.cuts[0]), 1) / len(order)
        self.root_share = np.sqrt(share)
        # Resampled from n images, a bin's gap varies (n - 1) / n times as much as it should.
        counts = [np.diff(cut) for cut in (*self.cuts, self.cuts[0])]
        self.noise = [np.sqrt(n / np.maximum(n - 1, 1)) for n in counts]
        places = np.linspace(0, len(self.tie_starts) - 1, DRIFT_POINTS).round().astype(np.int64)
        self.drift_points = self.tie_starts[np.unique(places)]

    def __call__(self, weight: FloatArray) -> tuple[list[float], FloatArray, list[FloatArray]]:
        """The statistics, NaN for smooth ECE; its sums; and the gaps of the others of `NORMS`."""
        w = weight[self.ranked.order]
        n = w.sum()
        accuracy, nll, brier, gap, entropy, confidence, square = w @ self.columns / n
        right = accuracy * n
        entropy_right = w @ self.entropy_correct
        of_right = entropy_right / right if right else np.nan
        of_wrong = (entropy * n - entropy_right) / (n - right) if right < n else np.nan
        images, errors = self.ranked.running(w)
        drift = np.zeros(len(w) + 1)
        np.cumsum(w * self.gap, out=drift[1:])
        equal, mass, mass_100 = (np.diff(drift[c]) for c in self.cuts)
        count = np.diff(images[self.cuts[0]])
        hits = count - np.diff(errors[self.cuts[0]])
        squares = equal**2 / np.maximum(count, 1)
        noise = hits * (count - hits) / np.maximum(count * (count - 1), 1)
        debiased = np.where(count > 1, squares - noise, 0.0)
        rising = drift[-1] - drift
        values = [
            accuracy, nll, brier, gap, entropy, confidence, square, of_right, of_wrong,
            *(np.abs(part).sum() / n for part in (equal, mass, mass_100)),
            np.sqrt(squares.sum() / n), debiased.sum() / n,
            np.abs(rising[self.tie_starts]).max() / n, np.nan,
            *self.ranked.figures(images, errors),
        ]  # fmt: skip
        gaps = [equal, mass, mass_100, equal / self.root_share, rising[self.drift_points]]
        return values, self.smooth.sums(w, drift), [g / n for g in gaps]


_SMOOTH = STATISTICS.index("smooth_ece")


@dataclass(frozen=True)
class Bootstrap:
    """Statistics of several sets of scores of the same images.

    point [S, M] on the images themselves; replicates [R, S, M] on resamples; NaN where undefined.
    statistics: the M names. "rmsce_debiased" is kept as its square, which may be negative.
    gaps: for each of `NORMS` and of the S scores the gaps [R + 1, D], first those of the images
    themselves. images: how many there are.
    """

    point: FloatArray
    replicates: FloatArray
    statistics: tuple[str, ...] = STATISTICS
    gaps: dict[str, list[FloatArray]] = field(default_factory=dict)
    images: int = 0
    rarer: Sequence[int] = ()

    def interval(self, which: int, statistic: str) -> Interval:
        """95 % interval of one statistic.

        Means and coverages: percentiles of the resamples. Errors of calibration are inflated by
        noise: theirs is that of `inflated`, begins at 0 unless calibration is refuted, and may lie
        below the value. The debiased RMSCE is not inflated, only its resamples are: they are
        shifted to its square. Failure prediction: `intervals.of_ranking`, and Wilson's for the risk
        at 80 % coverage; none for a coverage that allows fewer than `FEWEST_ERRORS` errors.
        Where all images are right, or all wrong, resamples know no other outcome, which is no
        proof that there is none: accuracy then has Wilson's interval, the rest of it none.
        """
        m = self.statistics.index(statistic)
        point, replicates = self.point[which, m], self.replicates[:, which, m]
        if self._one_outcome(which) and statistic in OF_OUTCOMES:
            if statistic == "accuracy" and self.images:
                low, high = proportion_interval(round(point * self.images), self.images)
                return Interval(float(point), float(low), float(high))
            return Interval(float(point) if np.isfinite(point) else None, None, None)
        if statistic == "adaptive_ece_100" and self.images < FEWEST_FOR_100_BINS:
            return Interval(float(point), None, None)
        if statistic in NORMS:
            seen, *resampled = self.gaps[statistic][which]
            limits = inflated.interval(seen, np.array(resampled), NORMS[statistic], LEVEL)
            return Interval(float(point), *limits)
        if statistic == "rmsce_debiased":
            shifted = percentile(point, replicates - replicates.mean() + point)
            return Interval(*(float(np.sqrt(max(v, 0.0))) for v in vars(shifted).values()))
        if statistic in intervals.POSITIVE | intervals.SHARES:
            return intervals.of_ranking(statistic, point, replicates, self.rarer[which])
        if statistic == "risk_at_80_coverage":
            answered = np.ceil(0.8 * self.images - 1e-9)
            low, high = proportion_interval(point * answered, answered)
            return Interval(float(point), float(low), float(high))
        if statistic in RISKS and point * self.images * RISKS[statistic] < FEWEST_ERRORS:
            return Interval(float(point), None, None)
        interval = percentile(point, replicates)
        # Equal confidences, or a single image: nothing varies, which is no proof either.
        return Interval(interval.value, None, None) if no_width(interval) else interval

    def _one_outcome(self, which: int) -> bool:
        if "accuracy" not in self.statistics:
            return False
        return self.point[which, self.statistics.index("accuracy")] in (0.0, 1.0)

    def difference(self, which: int, baseline: int, statistic: str) -> Interval:
        """Paired difference (which minus baseline) with its 95 % interval.

        Errors of calibration are inflated in resamples, more so the smaller they are: their
        differences are spread around the observed difference instead of around their own mean.
        Differences of failure prediction combine the intervals of both: `intervals.of_difference`.
        """
        m = self.statistics.index(statistic)
        values = np.stack([self.point[:, m], *self.replicates[:, :, m]])
        if statistic == "rmsce_debiased":
            values = np.sqrt(np.maximum(values, 0.0))
        moved = values[:, which] - values[:, baseline]
        point, *replicates = np.where(np.abs(moved) < ROUNDING, 0.0, moved)
        replicates = np.array(replicates)
        if statistic in BINNED:
            replicates = replicates - replicates.mean() + point
        if statistic in intervals.POSITIVE | intervals.SHARES and np.any(replicates):
            mine, theirs = (self.interval(place, statistic) for place in (which, baseline))
            if mine.low is not None and theirs.low is not None:
                pair = self.replicates[:, which, m], self.replicates[:, baseline, m]
                return Interval(float(point), *intervals.of_difference(mine, theirs, pair))
        interval = percentile(point, replicates)
        alike = no_width(interval) and point != 0
        return Interval(interval.value, None, None) if alike else interval


def weights(images: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each image is drawn: first once each, then in `resamples` draws."""
    positive_integer(resamples, "resamples")
    keep_memory()
    yield np.ones(images)
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(images, size=images), minlength=images).astype(np.float64)


def _same_images(lengths: set[int]) -> int:
    if len(lengths) != 1:
        raise ValueError(f"paired scores must be of the same images, got lengths {sorted(lengths)}")
    return lengths.pop()


def bootstrap(
    scores: Sequence[Scores], resamples: int = RESAMPLES, seed: int = 0, bins: int = 15
) -> Bootstrap:
    """Resample the images of `scores`, which must be of the same images in the same order."""
    n = _same_images({len(s.correct) for s in scores})
    positive_integer(resamples, "resamples")
    evaluate = [_Sorted(s, bins) for s in scores]
    table = np.empty((resamples + 1, len(scores), len(STATISTICS)))
    sums: list[list[FloatArray]] = [[] for _ in scores]
    gaps: dict[str, list[list[FloatArray]]] = {name: [[] for _ in scores] for name in NORMS}
    for row, weight in enumerate(weights(n, resamples, seed)):
        for i, f in enumerate(evaluate):
            table[row, i], smooth, parts = f(weight)
            for name, part in zip(NORMS, parts, strict=False):  # smooth ECE, the last, comes below
                gaps[name][i].append(part)
            sums[i].append(smooth)
            if len(sums[i]) == BATCH or row == resamples:
                done = slice(row + 1 - len(sums[i]), row + 1)
                table[done, i, _SMOOTH], residuals = f.smooth.errors(np.stack(sums[i]))
                gaps["smooth_ece"][i].extend(residuals)
                sums[i].clear()
    kept = {name: [np.array(rows) for rows in by_scores] for name, by_scores in gaps.items()}
    for i, f in enumerate(evaluate):
        for name, factor in zip(NORMS, f.noise, strict=False):  # of those in bins
            seen = kept[name][i][0]
            kept[name][i] = seen + (kept[name][i] - seen) * factor
    rarer = [_rarer(s.correct) for s in scores]
    return Bootstrap(table[0], table[1:], STATISTICS, kept, n, rarer)


def _rarer(correct: BoolArray) -> int:
    return int(min(correct.sum(), (~correct).sum()))


def rank_bootstrap(
    scores: Sequence[FloatArray], correct: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Bootstrap:
    """Failure prediction (`RANKS`) by several scores [N] of the same images."""
    evaluate = []
    for score in scores:
        c, a = confidence_and_correct(score, correct, probability=False)
        evaluate.append(_Ranked(c, a))
    n = _same_images({len(score) for score in scores})
    table = np.array([[f(w) for f in evaluate] for w in weights(n, resamples, seed)])
    rarer = [_rarer(f.wrong.astype(bool)) for f in evaluate]
    return Bootstrap(table[0], table[1:], tuple(RANKS), {}, n, rarer)


@dataclass(frozen=True)
class McNemar:
    """Do two networks differ in accuracy on the same images?

    only_first, only_second: images that one alone gets right. exact, mid_p: two-sided p-values
    under which either is as likely to be the one; the exact one errs on the side of no difference,
    mid-p hardly ever exceeds its level and finds more.
    """

    only_first: int
    only_second: int
    exact: float
    mid_p: float


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """McNemar's test on which images [N] two networks get right.

    Source: McNemar (Psychometrika 1947); mid-p: Fagerland, Lydersen and Laake, The McNemar test for
    binary matched-pairs data (BMC Medical Research Methodology 2013).
    """
    zeros = np.zeros(np.shape(first))
    _, a = confidence_and_correct(zeros, first)
    _, b = confidence_and_correct(np.zeros(np.shape(second)), second)
    _same_images({len(a), len(b)})
    one, two = int((a & ~b).sum()), int((b & ~a).sum())
    fewer, total = min(one, two), one + two
    tail = float(bdtr(fewer, total, 0.5))
    exact = min(1.0, 2 * tail)
    mid = 1.0 if one == two else tail + (float(bdtr(fewer - 1, total, 0.5)) if fewer else 0.0)
    return McNemar(one, two, exact, mid)
