"""Calibration metrics of the predicted class, and proper scores of all classes.

Notation: confidence c_i in [0, 1], correct a_i in {0, 1}, N images. All functions take numpy
arrays, or what converts to them, and work in float64. They return a float in natural units (a
fraction, or nats), never in per cent. They raise ValueError for empty input, unequal lengths, NaN
and values out of range. No result depends on the order of the images.
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
    """The bins of a reliability diagram.

    Args:
        edges: The edges of the bins [M + 1].
        count: The number of images in each bin [M].
        mean_confidence: The mean confidence in each bin [M], NaN where it is empty.
        accuracy: The accuracy in each bin [M], NaN where it is empty.
    """

    edges: FloatArray
    count: IntArray
    mean_confidence: FloatArray
    accuracy: FloatArray

    @property
    def weighted_gap(self) -> FloatArray:
        """The share of the images times |accuracy - mean confidence| [M], 0 for an empty bin."""
        gap = np.nan_to_num(np.abs(self.accuracy - self.mean_confidence))
        return self.count / self.count.sum() * gap


@dataclass(frozen=True)
class CalibrationNull:
    """The ECE that a perfectly calibrated network shows on these confidences.

    Args:
        mean: The mean of ECE.
        quantile_95: The value that ECE exceeds in 5 % of draws.
        p_value: The p-value of the observed ECE.
        resamples: The number of draws.
        low: The lower end of the central 95 % of each bin's accuracy [M], NaN where it is empty.
        high: The upper end [M].
    """

    mean: float
    quantile_95: float
    p_value: float
    resamples: int
    low: FloatArray
    high: FloatArray


def equal_width_index(confidence: FloatArray, bins: int) -> IntArray:
    """Return the bin of each confidence [N], among right-closed bins (lo, hi] of equal width.

    A confidence of 0 falls into the first bin.
    """
    edges = np.linspace(0.0, 1.0, positive_integer(bins, "bins") + 1)
    # Searching the edges, not ceil(c * bins), keeps k / bins on its own side of the edge.
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


def equal_mass_edges(confidence: FloatArray, bins: int) -> FloatArray:
    """Return the inner edges of bins of about N / bins images.

    Each edge lies midway between two neighbouring confidences. No bin is empty: there are fewer
    bins where many confidences are equal.
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
    """Return count, mean confidence and accuracy in right-closed bins of equal width.

    Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), section 2.

    Args:
        confidence: The confidence of each image [N], in [0, 1].
        correct: Which images are right [N], bool or 0/1.
        bins: The number of bins.
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
    """Return ECE = sum_m (n_m / N) |accuracy_m - mean confidence_m| over bins of equal width.

    Bins are right-closed, and 1.0 belongs to the last one. ECE is biased upwards, so read it beside
    `expected_calibration_error_null`. Source: Guo et al. (ICML 2017), equation 3.

    Args:
        confidence: The confidence of each image [N], in [0, 1].
        correct: Which images are right [N], bool or 0/1.
        bins: The number of bins.
    """
    return float(reliability_bins(confidence, correct, bins).weighted_gap.sum())


def adaptive_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return ECE over bins of equal mass.

    Edges lie midway between neighbouring confidences, and images are assigned by value. Therefore
    equal confidences always share a bin. Source: Nixon et al., Measuring Calibration in Deep
    Learning (CVPR workshops 2019), section 3.3; midpoint edges as in Kumar et al. (NeurIPS 2019).

    Args:
        confidence: The confidence of each image [N], in [0, 1].
        correct: Which images are right [N], bool or 0/1.
        bins: The number of bins.
    """
    c, a = confidence_and_correct(confidence, correct)
    inner = equal_mass_edges(c, positive_integer(bins, "bins"))
    edges = np.concatenate([[0.0], inner, [1.0]])
    return float(_bin(c, a, np.searchsorted(inner, c, side="left"), edges).weighted_gap.sum())


def maximum_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return MCE = max_m |accuracy_m - mean confidence_m| over the bins that hold images.

    The smallest bins mostly decide it, so look at their counts. Source: Guo et al. (ICML 2017),
    equation 5.

    Args:
        confidence: The confidence of each image [N], in [0, 1].
        correct: Which images are right [N], bool or 0/1.
        bins: The number of bins.
    """
    table = reliability_bins(confidence, correct, bins)
    return float(np.nanmax(np.abs(table.accuracy - table.mean_confidence)))


def root_mean_square_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, debiased: bool = False
) -> float:
    """Return RMSCE = sqrt(sum_m (n_m / N) (accuracy_m - mean confidence_m)^2).

    Bins have equal width. Source: Kumar et al., Verified Uncertainty Calibration (NeurIPS 2019),
    definition 2.3 and section 4.1; Roelofs et al., Mitigating Bias in Calibration Error Estimation
    (AISTATS 2022).

    Args:
        confidence: The confidence of each image [N], in [0, 1].
        correct: Which images are right [N], bool or 0/1.
        bins: The number of bins.
        debiased: Whether the variance of the accuracy, accuracy_m (1 - accuracy_m) / (n_m - 1), is
            subtracted from each square. Bins of one image then count 0, and the sum is cut off at
            0. A calibrated network shows about 0, however few images there are.
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
    """Return KS = max_k |1/N sum_{c_i <= c_(k)} (c_i - a_i)|.

    It needs no bins. The sum is evaluated after whole groups of equal confidence. Source: Gupta et
    al., Calibration of Neural Networks using Splines (ICLR 2021), section 3.
    """
    c, a = confidence_and_correct(confidence, correct)
    order = np.argsort(c, kind="stable")
    drift = np.cumsum((c - a)[order]) / len(c)
    group_end = np.append(np.diff(c[order]) > 0, True)
    return float(np.abs(drift[group_end]).max())


def signed_gap(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return mean confidence minus accuracy.

    It is positive for an over-confident network and negative for an under-confident one. Its
    absolute value is at most ECE, for any bins.
    """
    c, a = confidence_and_correct(confidence, correct)
    return float(c.mean() - a.mean())


def negative_log_likelihood(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean of logsumexp(z_i) - z_i[label] in nats; logits [N, K], labels int [N]."""
    return float(score_images(logits, labels).nll.mean())


def brier_score(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean over images of sum_k (p_k - [k = label])^2, in [0, 2].

    Logits have shape [N, K] and labels [N]. Source: Brier, Verification of forecasts expressed in
    terms of probability (1950).
    """
    return float(score_images(logits, labels).brier.mean())


def top_label_brier_score(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return the mean of (c_i - a_i)^2, in [0, 1], which depends on the predicted class alone.

    `corp_decomposition` splits it into three parts.
    """
    c, a = confidence_and_correct(confidence, correct)
    return float(np.mean((c - a) ** 2))


def classwise_calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Return the mean over classes k of sum_m (n_mk / N) |share of class k - mean p_k|.

    It is small by construction where there are many classes, because nearly all entries lie near 0
    in the first bin. Source: Kull et al., Beyond temperature scaling (NeurIPS 2019), definition 2;
    static calibration error of Nixon et al. (2019).

    Args:
        logits: The logits [N, K].
        labels: The labels int [N].
        bins: The number of right-closed bins of equal width.
    """
    return _classwise(logits, labels, bins, None).error


def thresholded_classwise_calibration_error(
    logits: ArrayLike, labels: ArrayLike, bins: int = 15, threshold: float | None = None
) -> float | None:
    """Return the classwise calibration error over the entries with p_k > threshold.

    Each class is weighted by the number of such entries that it has, and the mean is over the
    classes that have any. Source: Nixon et al. (2019), section 3.4.

    Args:
        logits: The logits [N, K].
        labels: The labels int [N].
        bins: The number of right-closed bins of equal width.
        threshold: The threshold. Default: 1 / K.

    Returns:
        The error. None if no entry exceeds the threshold.
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
    """Return the ECE of a perfectly calibrated network with these confidences.

    Outcomes are drawn as a_i ~ Bernoulli(c_i), which is called consistency resampling. The p-value
    is (1 + #{drawn >= observed}) / (resamples + 1). Source: Broecker and Smith, Increasing the
    Reliability of Reliability Diagrams (Weather and Forecasting 2007).

    Args:
        confidence: The confidence of each image [N], in [0, 1].
        correct: Which images are right [N], bool or 0/1.
        bins: The number of bins.
        resamples: The number of draws.
        seed: The seed of the draws.
    """
    c, a = confidence_and_correct(confidence, correct)
    positive_integer(resamples, "resamples")
    observed = expected_calibration_error(c, a, bins)
    c = np.sort(c)  # so that the draws do not depend on the order of the images
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
        # With this tolerance, rounding does not turn an ECE of zero into a smaller one.
        p_value=float((1 + (errors >= observed - 1e-12).sum()) / (resamples + 1)),
        resamples=resamples,
        low=low,
        high=high,
    )
