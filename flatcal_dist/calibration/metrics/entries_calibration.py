"""The entries of calibration errors, for the confidence and for all probabilities."""

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import BoolArray, FloatArray, confidence_and_correct
from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics.entry import Evaluated, Metric
from flatcal_dist.calibration.pages.display import PERCENT, PLAIN, POINTS
from flatcal_dist.calibration.statistics.resampled import (
    Binned,
    DebiasedSquare,
    Function,
    LargestDrift,
    RootMeanSquare,
    Smooth,
)
from flatcal_dist.calibration.statistics.sampling import (
    Images,
    equal_mass,
    equal_mass_100,
    equal_width,
)

FEWEST_FOR_100_BINS = 1000  # ten images per bin
MOST_SWEPT = 100  # bins; a sweep would pass this only if accuracy rose in every bin


def sweep_calibration_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return ECE over the largest number of bins of equal mass over which accuracy rises, in [0,
    1].

    Bins are added one by one, up to `MOST_SWEPT`, until the accuracy of a bin is below that of the
    bin before it. The true accuracy of a network rises with its confidence, so that finer bins show
    noise. Gaps are absolute, as in ECE. Source: Roelofs et al., Mitigating Bias in Calibration
    Error Estimation (AISTATS 2022), ECE_SWEEP of equal mass with p = 1.

    Raises ValueError for empty input, unequal lengths, and confidences outside [0, 1].
    """
    c, a = confidence_and_correct(confidence, correct)
    return metrics.adaptive_calibration_error(c, a, rising_bins(c, a))


def rising_bins(confidence: FloatArray, correct: FloatArray | BoolArray) -> int:
    """Return the number of bins at which the sweep ends. `correct` [N] holds 0 and 1."""
    order = np.argsort(confidence, kind="stable")
    c, right = confidence[order], np.append(0, np.cumsum(correct[order]))
    most = min(MOST_SWEPT, len(c))
    for bins in range(2, most + 1):
        inner = np.searchsorted(c, metrics.equal_mass_edges(c, bins), side="right")
        cuts = np.concatenate([[0], inner, [len(c)]])
        if (np.diff(np.diff(right[cuts]) / np.diff(cuts)) < 0).any():
            return bins - 1
    return most


def _swept(images: Images) -> FloatArray:
    bins = rising_bins(images.confidence, images.correct)
    return metrics.equal_mass_edges(images.confidence, bins)


def _rmsce(e: Evaluated, debiased: bool = False) -> float:
    return metrics.root_mean_square_calibration_error(
        e.confidence, e.correct, e.bins, debiased=debiased
    )


CALIBRATION_ERRORS = (
    Metric(
        "mean_confidence", "Mean confidence", PERCENT, None, "Mean of the largest probability.",
        value=lambda e: float(e.confidence.mean()),
        statistic=Function(lambda s: s.mean("confidence"), of_outcomes=False),
        listed=False,
    ),
    Metric(
        "signed_gap", "Signed gap", POINTS, "zero",
        "Mean confidence minus accuracy: + over-confident, − under-confident.",
        value=lambda e: metrics.signed_gap(e.confidence, e.correct),
        statistic=Function(lambda s: s.mean("gap")),
        limits=(-1.0, 1.0),
        compared=True,
        running=lambda s: float(s.gaps.sum() / s.images),
    ),
    Metric(
        "ece", "ECE", PERCENT, "lower",
        "Mean gap between confidence and accuracy over 15 equal-width bins.",
        value=lambda e: metrics.expected_calibration_error(e.confidence, e.correct, e.bins),
        statistic=Binned(equal_width),
        source="Guo et al. (ICML 2017), equation 3",
        compared=True,
        running=lambda s: float(np.abs(s.gaps).sum() / s.images),
    ),
    Metric(
        "adaptive_ece", "Adaptive ECE", PERCENT, "lower", "ECE over bins of equal mass.",
        value=lambda e: metrics.adaptive_calibration_error(e.confidence, e.correct, e.bins),
        statistic=Binned(equal_mass),
        source="Nixon et al. (CVPR workshops 2019), section 3.3",
    ),
    Metric(
        "adaptive_ece_100", "Adaptive ECE, 100 bins", PERCENT, "lower",
        "ECE over finer bins of equal mass; chance inflates it more.",
        value=lambda e: metrics.adaptive_calibration_error(e.confidence, e.correct, 100),
        statistic=Binned(equal_mass_100, fewest=FEWEST_FOR_100_BINS),
        source="Nixon et al. (CVPR workshops 2019), section 3.3",
    ),
    Metric(
        "ece_sweep", "ECE, swept bins", PERCENT, "lower",
        "ECE over as many bins of equal mass as accuracy rises over.",
        value=lambda e: sweep_calibration_error(e.confidence, e.correct),
        statistic=Binned(_swept),
        source="Roelofs et al. (AISTATS 2022), of equal mass with p = 1",
    ),
    Metric(
        "smooth_ece", "Smooth ECE", PERCENT, "lower", "ECE with a kernel instead of bins.",
        value=lambda e: metrics.smooth_calibration_error(e.confidence, e.correct),
        statistic=Smooth(),
        source="Blasiok and Nakkiran (ICLR 2024), section 3",
    ),
    Metric(
        "smooth_ece_relplot", "Smooth ECE, relplot's", PERCENT, "lower",
        "Comparable with published values; images at confidence 1 count half.",
        value=lambda e: metrics.smooth_calibration_error_relplot(e.confidence, e.correct),
        source="relplot 1.0.3 (Apple, 2025)",
    ),
    Metric(
        "ks", "KS error", PERCENT, "lower", "Largest cumulative gap, without bins.",
        value=lambda e: metrics.kolmogorov_smirnov_error(e.confidence, e.correct),
        statistic=LargestDrift(),
        source="Gupta et al. (ICLR 2021), section 3",
    ),
    Metric(
        "rmsce", "RMSCE", PERCENT, "lower", "As ECE, but large gaps weigh more.",
        value=_rmsce,
        statistic=RootMeanSquare(equal_width),
        source="Kumar et al. (NeurIPS 2019), definition 2.3",
    ),
    Metric(
        "rmsce_debiased", "RMSCE, debiased", PERCENT, "lower",
        "RMSCE without what chance adds; about 0 for a calibrated network.",
        value=lambda e: _rmsce(e, debiased=True),
        statistic=DebiasedSquare(equal_width),
        source="Kumar et al. (NeurIPS 2019), section 4.1; Roelofs et al. (AISTATS 2022)",
    ),
    Metric(
        "corp_miscalibration", "CORP miscalibration", PLAIN, "lower",
        "How much the best monotone recalibration would lower the answer's Brier score.",
        value=lambda e: e.corp.miscalibration,
        source="Dimitriadis, Gneiting and Jordan (PNAS 2021)",
        limits=(None, None),
    ),
    Metric(
        "classwise_ece", "Classwise ECE", PERCENT, "lower",
        "ECE of every class's probability; small by construction with many classes.",
        value=lambda e: e.classwise.get("classwise_ece"),
        source="Kull et al. (NeurIPS 2019), definition 2",
    ),
    Metric(
        "thresholded_classwise_ece", "Classwise ECE, large probabilities", PERCENT, "lower",
        "Classwise ECE over probabilities above one over the number of classes.",
        value=lambda e: e.classwise.get("thresholded_classwise_ece"),
        source="Nixon et al. (CVPR workshops 2019), section 3.4",
        may_lack=True,
    ),
    Metric(
        "mce", "MCE", PERCENT, "lower", "Largest gap of any bin; often the smallest bin's.",
        value=lambda e: metrics.maximum_calibration_error(e.confidence, e.correct, e.bins),
        source="Guo et al. (ICML 2017), equation 5",
    ),
)  # fmt: skip
