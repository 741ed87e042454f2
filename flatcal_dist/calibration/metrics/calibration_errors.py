"""Calibration metrics of the predicted class, and proper scores of all classes.

Notation: confidence c_i in [0, 1], correct a_i in {0, 1}, N images. All functions take numpy
arrays (or what converts to them), work in float64 and return a float in natural units
(a fraction, nats), never per cent. All raise ValueError for empty input, unequal lengths, NaN and
values out of range. None depends on the order of the images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import (
    BoolArray,
    FloatArray,
    IntArray,
    confidence_and_correct,
    logits_and_labels,
    positive_integer,
)
from flatcal_dist.calibration.metrics.classwise import ClasswiseSums
from flatcal_dist.calibration.metrics.smooth import smooth_calibration_error
from flatcal_dist.calibration.metrics.smooth_relplot import smooth_calibration_error_relplot
from flatcal_dist.calibration.softmax import score_images

__all__ = [
    "CalibrationNull",
    "ReliabilityBins",
    "adaptive_calibration_error",
    "brier_score",
    "classwise_calibration_error",
    "expected_calibration_error",
    "expected_calibration_error_null",
    "kolmogorov_smirnov_error",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_bins",
    "root_mean_square_calibration_error",
    "signed_gap",
    "smooth_calibration_error",
    "smooth_calibration_error_relplot",
    "thresholded_classwise_calibration_error",
    "top_label_brier_score",
]


@dataclass(frozen=True)
class ReliabilityBins:
    """Bins of a reliability diagram; `edges` [M + 1], the others [M]; NaN where a bin is empty."""

    edges: FloatArray
    count: IntArray
    mean_confidence: FloatArray
    accuracy: FloatArray

    @property
    def weighted_gap(self) -> FloatArray:
        """Share of the images times |accuracy - mean confidence|, 0 for an empty bin."""
        gap = np.nan_to_num(np.abs(self.accuracy - self.mean_confidence))
        return self.count / self.count.sum() * gap


@dataclass(frozen=True)
class CalibrationNull:
    """ECE that a perfectly calibrated network shows on these confidences.

    `mean` and `quantile_95` of ECE, `p_value` of the observed one; `low` and `high` [M]: the
    central 95 % of each bin's accuracy, NaN where the bin is empty.
    """

    mean: float
    quantile_95: float
    p_value: float
    resamples: int
    low: FloatArray
    high: FloatArray


def equal_width_index(confidence: FloatArray, bins: int) -> IntArray:
    """Bin of each confidence: right-closed (lo, hi] of equal width; 0 falls in the first bin."""
    edges = np.linspace(0.0, 1.0, positive_integer(bins, "bins") + 1)
    # Searching the edges, not ceil(c * bins), keeps k / bins on its own side of the edge.
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


def equal_mass_edges(confidence: FloatArray, bins: int) -> FloatArray:
    """Inner edges of bins of about N / bins images, midway between the neighbours at each cut.

    No bin is empty: where many confidences are equal, there are fewer bins.
    """
    c = np.sort(confidence)
    parts = min(bins, len(c))
    sizes = np.full(parts, len(c) // parts)
    sizes[: len(c) % parts] += 1
    cuts = np.cumsum(sizes)[:-1]
    edges = np.unique((c[cuts - 1] + c[cuts]) / 2)
    below = np.searchsorted(c, edges, side="right")
    return edges[np.diff(np.append(below, len(c))) > 0]


def reliability_bins(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> ReliabilityBins:
    """Count, mean confidence and accuracy in each of `bins` right-closed bins of equal width.

    Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), section 2.
    """
    c, a = confidence_and_correct(confidence, correct)
    return _bin(c, a, equal_width_index(c, bins), np.linspace(0.0, 1.0, bins + 1))


def _bin(c: FloatArray, a: BoolArray, index: IntArray, edges: FloatArray) -> ReliabilityBins:
    bins = len(edges) - 1
    count = np.bincount(index, minlength=bins)
    filled = np.where(count > 0, count, np.nan)
    mean_confidence = np.bincount(index, weights=c, minlength=bins) / filled
    accuracy = np.bincount(index, weights=a, minlength=bins) / filled
    return ReliabilityBins(edges, count, mean_confidence, accuracy)


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """ECE = sum_m (n_m / N) |accuracy_m - mean confidence_m| over bins of equal width.

    Bins are right-closed and 1.0 belongs to the last one. Biased upwards: read it beside
    `expected_calibration_error_null`. Source: Guo et al. (ICML 2017), equation 3.
    """
    return float(reliability_bins(confidence, correct, bins).weighted_gap.sum())


def adaptive_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """ECE over bins of equal mass.

    Edges lie midway between neighbouring confidences and images are assigned by value, so that
    equal confidences always share a bin. Source: Nixon et al., Measuring Calibration in Deep
    Learning (CVPR workshops 2019), section 3.3; midpoint edges as in Kumar et al. (NeurIPS 2019).
    """
    c, a = confidence_and_correct(confidence, correct)
    inner = equal_mass_edges(c, positive_integer(bins, "bins"))
    edges = np.concatenate([[0.0], inner, [1.0]])
    return float(_bin(c, a, np.searchsorted(inner, c, side="left"), edges).weighted_gap.sum())


def maximum_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """MCE = max_m |accuracy_m - mean confidence_m| over the bins that hold images.

    Ruled by the smallest bins: look at their counts. Source: Guo et al. (ICML 2017), equation 5.
    """
    table = reliability_bins(confidence, correct, bins)
    return float(np.nanmax(np.abs(table.accuracy - table.mean_confidence)))


def root_mean_square_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, debiased: bool = False
) -> float:
    """RMSCE = sqrt(sum_m (n_m / N) (accuracy_m - mean confidence_m)^2) over bins of equal width.

    debiased: from each square the variance of the accuracy, accuracy_m (1 - accuracy_m) /
    (n_m - 1), is taken away, bins of one image count 0, and the sum is cut off at 0; so that a
    calibrated network shows about 0 however few images there are.
    Source: Kumar et al., Verified Uncertainty Calibration (NeurIPS 2019), definition 2.3 and
    section 4.1; Roelofs et al., Mitigating Bias in Calibration Error Estimation (AISTATS 2022).
    """
    table = reliability_bins(confidence, correct, bins)
    return float(np.sqrt(max(_mean_square(table, debiased), 0.0)))


def _mean_square(table: ReliabilityBins, debiased: bool) -> float:
    square = np.nan_to_num(table.accuracy - table.mean_confidence) ** 2
    if debiased:
        noise = np.nan_to_num(table.accuracy * (1 - table.accuracy)) / np.maximum(
            table.count - 1, 1
        )
        square = np.where(table.count > 1, square - noise, 0.0)
    return float(table.count @ square / table.count.sum())


def kolmogorov_smirnov_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """KS = max_k |1/N sum_{c_i <= c_(k)} (c_i - a_i)|: no bins; evaluated after whole tie groups.

    Source: Gupta et al., Calibration of Neural Networks using Splines (ICLR 2021), section 3.
    """
    c, a = confidence_and_correct(confidence, correct)
    order = np.argsort(c, kind="stable")
    drift = np.cumsum((c - a)[order]) / len(c)
    group_end = np.append(np.diff(c[order]) > 0, True)
    return float(np.abs(drift[group_end]).max())


def signed_gap(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean confidence minus accuracy: positive when over-confident, negative when under-confident.

    |signed gap| <= ECE for any binning.
    """
    c, a = confidence_and_correct(confidence, correct)
    return float(c.mean() - a.mean())


def negative_log_likelihood(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of logsumexp(z_i) - z_i[label], in nats; logits [N, K], labels int [N]."""
    return float(score_images(logits, labels).nll.mean())


def brier_score(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean over images of sum_k (p_k - [k = label])^2, in [0, 2]; logits [N, K], labels int [N].

    Source: Brier, Verification of forecasts expressed in terms of probability (1950).
    """
    return float(score_images(logits, labels).brier.mean())


def top_label_brier_score(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean of (c_i - a_i)^2, in [0, 1]: of the predicted class alone, see `corp_decomposition`."""
    c, a = confidence_and_correct(confidence, correct)
    return float(np.mean((c - a) ** 2))


def classwise_calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Mean over classes k of sum_m (n_mk / N) |share of class k - mean p_k|, right-closed bins.

    logits [N, K], labels int [N]. Small by construction where there are many classes, because
    nearly all entries lie near 0 in the first bin. Source: Kull et al., Beyond temperature
    scaling (NeurIPS 2019), definition 2; static calibration error of Nixon et al. (2019).
    """
    return _classwise(logits, labels, bins, None).error


def thresholded_classwise_calibration_error(
    logits: ArrayLike, labels: ArrayLike, bins: int = 15, threshold: float | None = None
) -> float | None:
    """Classwise calibration error over the entries with p_k > threshold (1 / K unless given).

    Every class is weighted by its own number of such entries; mean over the classes that have
    any, None if none has. Source: Nixon et al. (2019), section 3.4.
    """
    return _classwise(logits, labels, bins, threshold).thresholded_error


def _classwise(
    logits: ArrayLike, labels: ArrayLike, bins: int, threshold: float | None
) -> ClasswiseSums:
    z, y = logits_and_labels(logits, labels)
    sums = ClasswiseSums(z.shape[1], bins, threshold)
    score_images(z, y, classwise=sums)
    return sums


def expected_calibration_error_null(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, resamples: int = 1000, seed: int = 0
) -> CalibrationNull:
    """ECE of a perfectly calibrated network with these confidences, by consistency resampling.

    Outcomes are drawn as a_i ~ Bernoulli(c_i); the p-value is (1 + #{drawn >= observed}) /
    (resamples + 1). Source: Broecker and Smith, Increasing the Reliability of Reliability
    Diagrams (Weather and Forecasting 2007).
    """
    c, a = confidence_and_correct(confidence, correct)
    positive_integer(resamples, "resamples")
    observed = expected_calibration_error(c, a, bins)
    c = np.sort(c)  # the draw does not depend on the order of the images
    index = equal_width_index(c, bins)
    count = np.bincount(index, minlength=bins)
    expected = np.bincount(index, weights=c, minlength=bins)
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, bins))
    for row in drawn:
        row[:] = np.bincount(index, weights=rng.random(len(c)) < c, minlength=bins)
    errors = np.abs(drawn - expected).sum(axis=1) / len(c)
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0) / np.where(count > 0, count, np.nan)
    return CalibrationNull(
        mean=float(errors.mean()),
        quantile_95=float(np.quantile(errors, 0.95)),
        # The tolerance keeps an ECE of zero from losing to rounding.
        p_value=float((1 + (errors >= observed - 1e-12).sum()) / (resamples + 1)),
        resamples=resamples,
        low=low,
        high=high,
    )
