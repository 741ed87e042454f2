"""Selective prediction (failure prediction): how well confidence separates correct from wrong.

Every function takes a score [N], where higher means more confident, and `correct` [N] (bool or
0/1). Only the order of the scores counts, so that any finite score will do. The logarithm of the
confidence is the score that does not saturate. Images of equal score form one group, and a value
that depends on the order within a group is its expectation over random order. A value is None where
it is undefined, such as AUROC if every prediction is correct. All functions raise ValueError for
empty input, unequal lengths and NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import FloatArray, IntArray, confidence_and_correct


@dataclass(frozen=True)
class TieGroups:
    """Images grouped by equal score, most confident first.

    Groups can be empty, as in a resample of the bootstrap or in a histogram of scores.

    Args:
        accepted: The number of images up to each group [G], whole numbers in float64.
        accepted_errors: The number of wrong images up to each group [G].
    """

    accepted: FloatArray
    accepted_errors: FloatArray

    @classmethod
    def of(cls, size: ArrayLike, errors: ArrayLike) -> "TieGroups":
        """Return groups from the number of images and of wrong images in each."""
        return cls(np.cumsum(size, dtype=np.float64), np.cumsum(errors, dtype=np.float64))

    @cached_property
    def size(self) -> FloatArray:
        """The number of images in each group [G]."""
        return _steps(self.accepted)

    @cached_property
    def errors(self) -> FloatArray:
        """The number of wrong images in each group [G]."""
        return _steps(self.accepted_errors)

    @cached_property
    def images(self) -> int:
        """The number of images."""
        return int(self.accepted[-1])

    @cached_property
    def wrong(self) -> int:
        """The number of wrong images."""
        return int(self.accepted_errors[-1])

    @property
    def right(self) -> int:
        """The number of correct images."""
        return self.images - self.wrong

    @cached_property
    def aurc(self) -> float:
        """AURC in expectation over the order within groups.

        For a group of m images, g of them wrong, that follows N images, E of them wrong, the
        expected sum of risks is sum_j (E + j g/m)/(N + j) = g + (H_{N+m} - H_N)(E - N g/m).
        """
        if len(self.size) == self.images and (self.size == 1).all():
            return float((self.accepted_errors / self.accepted).mean())
        harmonic = _steps(_harmonic(self.images)[self.accepted.astype(np.int64)])
        share = self.errors / np.maximum(self.size, 1)
        before = self.accepted - self.size
        risks = harmonic @ (self.accepted_errors - self.errors - before * share)
        return float((self.wrong + risks) / self.images)


def tie_groups(confidence: ArrayLike, correct: ArrayLike) -> TieGroups:
    """Return the images sorted by falling score and grouped by equal score."""
    c, a = confidence_and_correct(confidence, correct, probability=False)
    order, starts = tie_order(c)
    ends = np.append(starts[1:], len(c)) - 1
    return TieGroups(ends + 1.0, np.cumsum(~a[order], dtype=np.float64)[ends])


def tie_order(confidence: FloatArray) -> tuple[IntArray, IntArray]:
    """Return the order by falling score, and where each group of equal scores starts in it."""
    order = np.argsort(-confidence, kind="stable")
    sorted_scores = confidence[order]
    return order, np.flatnonzero(np.append(True, sorted_scores[1:] != sorted_scores[:-1]))


@lru_cache(maxsize=4)
def _harmonic(n: int) -> FloatArray:
    """Harmonic numbers H_0 .. H_n."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n + 1))])


def _steps(running: FloatArray) -> FloatArray:
    """The summands of a running sum."""
    steps = running.copy()
    steps[1:] -= running[:-1]
    return steps


def groups_aurc(groups: TieGroups) -> float:
    """Return AURC, see `aurc`."""
    return groups.aurc


def optimal_aurc(images: int, wrong: int) -> float:
    """Return the AURC of an order in which every correct image stands before every wrong one."""
    right = images - wrong
    return float((wrong - right * (_harmonic(images)[images] - _harmonic(images)[right])) / images)


def groups_eaurc(groups: TieGroups) -> float:
    """Return E-AURC with the exact optimum, see `eaurc`."""
    return groups.aurc - optimal_aurc(groups.images, groups.wrong)


def groups_naurc(groups: TieGroups) -> float | None:
    """Return NAURC, see `naurc`."""
    best = optimal_aurc(groups.images, groups.wrong)
    chance = groups.wrong / groups.images
    if groups.wrong == 0 or groups.right == 0:
        return None
    return float((groups.aurc - best) / (chance - best))


def groups_augrc(groups: TieGroups) -> float:
    """Return AUGRC, see `augrc`."""
    area = groups.size @ (2 * groups.accepted_errors - groups.errors) / 2
    return float(area / groups.images**2)


def groups_auroc(groups: TieGroups) -> float | None:
    """Return AUROC, see `auroc`."""
    wrong, right = groups.wrong, groups.right
    if wrong == 0 or right == 0:
        return None
    wrong_below = wrong - groups.accepted_errors + groups.errors / 2
    return float((groups.size - groups.errors) @ wrong_below / wrong / right)


def groups_fpr_at_95_tpr(groups: TieGroups) -> float | None:
    """Return FPR at 95 % TPR, see `fpr_at_95_tpr`."""
    if groups.wrong == 0 or groups.right == 0:
        return None
    # In whole numbers, so that a rate of exactly 95 % is not lost to rounding.
    enough = 100 * (groups.accepted - groups.accepted_errors) >= 95 * groups.right
    return float(groups.accepted_errors[np.argmax(enough)] / groups.wrong)


def _found_success(groups: TieGroups) -> tuple[FloatArray, FloatArray]:
    """Correct images found and images seen, beginning with the most confident group."""
    return groups.accepted - groups.accepted_errors, groups.accepted


def _found_error(groups: TieGroups) -> tuple[FloatArray, FloatArray]:
    """Wrong images found and images seen, beginning with the least confident group."""
    found = groups.wrong - groups.accepted_errors + groups.errors
    seen = groups.images - groups.accepted + groups.size
    return found[::-1], seen[::-1]


def _average_precision(found: FloatArray, seen: FloatArray) -> float | None:
    if found[-1] == 0:
        return None
    precision = found / np.maximum(seen, 1)
    return float(_steps(found) @ precision / found[-1])


def _trapezoid_precision(found: FloatArray, seen: FloatArray) -> float | None:
    if found[-1] == 0:
        return None
    recall = np.append(0.0, found / found[-1])
    return float(np.trapezoid(np.append(1.0, found / np.maximum(seen, 1)), recall))


def groups_aupr_success(groups: TieGroups) -> float | None:
    """Return the average precision of correct images, see `aupr_success`."""
    return _average_precision(*_found_success(groups))


def groups_aupr_error(groups: TieGroups) -> float | None:
    """Return the average precision of wrong images, see `aupr_error`."""
    return _average_precision(*_found_error(groups))


def groups_risk_at_coverage(groups: TieGroups, coverage: float) -> float:
    """Return the risk at a coverage, see `risk_at_coverage`."""
    k = max(1, int(np.ceil(coverage * groups.images - 1e-9)))
    g = int(np.searchsorted(groups.accepted, k))
    missing = groups.accepted[g] - k
    errors, size = groups.errors[g], groups.size[g]
    return float((groups.accepted_errors[g] - missing * errors / size) / k)


def groups_coverage_at_risk(groups: TieGroups, risk: float) -> float:
    """Return the coverage at a risk, see `coverage_at_risk`."""
    allowed = (groups.accepted_errors <= (risk + 1e-12) * groups.accepted) & (groups.accepted > 0)
    if not allowed.any():
        return 0.0
    return float(groups.accepted[len(allowed) - 1 - np.argmax(allowed[::-1])] / groups.images)


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return AURC = 1/N sum_k r_k, with the share r_k of wrong among the k most confident images.

    It lies in [0, 1], and lower is better. Papers print it times 1,000. Source: Geifman et al.,
    Bias-Reduced Uncertainty Estimation (ICLR 2019), section 3.
    """
    return groups_aurc(tie_groups(confidence, correct))


def eaurc(
    confidence: ArrayLike,
    correct: ArrayLike,
    optimum: Literal["exact", "continuous"] = "exact",
) -> float:
    """Return E-AURC: AURC minus the AURC of an oracle that ranks every wrong image last.

    Source: Geifman et al. (ICLR 2019), equation 2.

    Args:
        confidence: The score of each image [N]; higher means more confident.
        correct: Which images are right [N], bool or 0/1.
        optimum: How the AURC of the oracle is computed. exact: for N images. continuous: by
            err + (1 - err) log(1 - err), as papers print it.
    """
    groups = tie_groups(confidence, correct)
    if optimum == "exact":
        return groups_eaurc(groups)
    if optimum != "continuous":
        raise ValueError(f"optimum must be 'exact' or 'continuous', got {optimum!r}")
    accuracy = groups.right / groups.images
    best = 1 - accuracy + (accuracy * np.log(accuracy) if accuracy > 0 else 0.0)
    return float(groups.aurc - best)


def naurc(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """Return NAURC = (AURC - AURC*) / (err - AURC*), with the exact optimum AURC*.

    It is 0 for the oracle and 1 for a random order, and it compares networks of unlike accuracy. It
    is None if all images are correct, or all wrong. Source: Cattelan and Silva, How to Fix a Broken
    Confidence Estimator (UAI 2024), equation 9.
    """
    return groups_naurc(tie_groups(confidence, correct))


def augrc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return AUGRC, the mean over coverages of the share of all images that are accepted and wrong.

    It is an area by trapezoids, and equals (1 - AUROC) acc err + err^2 / 2, ties included. Source:
    Traub et al., Overcoming Common Flaws in the Evaluation of Selective Classification Systems
    (NeurIPS 2024), section 4.
    """
    return groups_augrc(tie_groups(confidence, correct))


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """Return AUROC, the probability that a correct image outranks a wrong one.

    Ties count half. It is None if all images are correct, or all wrong. Source: Hendrycks and
    Gimpel (ICLR 2017), section 2.
    """
    return groups_auroc(tie_groups(confidence, correct))


def fpr_at_95_tpr(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """Return the least share of wrong images that pass a threshold which 95 % of correct ones pass.

    Thresholds lie between groups of ties, and all of them are tried. It is None if all images are
    correct, or all wrong. Source: Liang et al., Enhancing the reliability of out-of-distribution
    image detection in neural networks (ICLR 2018), section 4.
    """
    return groups_fpr_at_95_tpr(tie_groups(confidence, correct))


def aupr_success(
    confidence: ArrayLike,
    correct: ArrayLike,
    method: Literal["average_precision", "trapezoid"] = "average_precision",
) -> float | None:
    """Return the area under the precision-recall curve for finding correct images.

    Source: Hendrycks and Gimpel (ICLR 2017), section 2.

    Args:
        confidence: The score of each image [N]; higher means more confident.
        correct: Which images are right [N], bool or 0/1.
        method: How the area is computed. average_precision: a sum of steps, without optimistic
            interpolation. trapezoid: as several papers on failure prediction print it.

    Returns:
        The area. None if all images are wrong.
    """
    groups = tie_groups(confidence, correct)
    return _area(method)(*_found_success(groups))


def aupr_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    method: Literal["average_precision", "trapezoid"] = "average_precision",
) -> float | None:
    """Return the area under the precision-recall curve for finding wrong images, low scores first.

    Source: Hendrycks and Gimpel (ICLR 2017), section 2.

    Args:
        confidence: The score of each image [N]; higher means more confident.
        correct: Which images are right [N], bool or 0/1.
        method: How the area is computed, see `aupr_success`.

    Returns:
        The area. None if all images are correct.
    """
    groups = tie_groups(confidence, correct)
    return _area(method)(*_found_error(groups))


def _area(method: str) -> Callable[[FloatArray, FloatArray], float | None]:
    areas = {"average_precision": _average_precision, "trapezoid": _trapezoid_precision}
    if method not in areas:
        raise ValueError(f"method must be one of {sorted(areas)}, got {method!r}")
    return areas[method]


def risk_coverage_curve(confidence: ArrayLike, correct: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return coverage [G] and risk [G] at every threshold, from the least coverage to coverage 1.

    There is one point per group of equal scores, because a threshold accepts whole groups only.
    """
    groups = tie_groups(confidence, correct)
    return groups.accepted / groups.images, groups.accepted_errors / groups.accepted


def risk_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Return the risk of the ceil(coverage N) most confident images, in expectation over ties.

    Args:
        confidence: The score of each image [N]; higher means more confident.
        correct: Which images are right [N], bool or 0/1.
        coverage: The share of the images that is answered, in (0, 1].
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage}")
    return groups_risk_at_coverage(tie_groups(confidence, correct), coverage)


def coverage_at_risk(confidence: ArrayLike, correct: ArrayLike, risk: float) -> float:
    """Return the largest coverage of a threshold whose risk does not exceed `risk`.

    Args:
        confidence: The score of each image [N]; higher means more confident.
        correct: Which images are right [N], bool or 0/1.
        risk: The largest share of wrong answers, in [0, 1].

    Returns:
        The coverage. 0.0 if no threshold has so low a risk.
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk must lie in [0, 1], got {risk}")
    return groups_coverage_at_risk(tie_groups(confidence, correct), risk)


def threshold_at_risk(confidence: ArrayLike, correct: ArrayLike, risk: float) -> float | None:
    """Return the least score that is answered at `coverage_at_risk`.

    Args:
        confidence: The score of each image [N]; higher means more confident.
        correct: Which images are right [N], bool or 0/1.
        risk: The largest share of wrong answers, in [0, 1].

    Returns:
        The score. None if no image is answered.
    """
    score, _ = confidence_and_correct(confidence, correct, probability=False)
    accepted = round(coverage_at_risk(confidence, correct, risk) * len(score))
    return float(np.sort(score)[-accepted]) if accepted else None
