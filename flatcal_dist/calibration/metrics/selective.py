"""Selective prediction (failure prediction): how well confidence sorts correct from wrong.

Every function takes a score [N], higher meaning more confident, and `correct` [N] (bool or 0/1).
Only the order of the scores counts, so any finite score will do; log-confidence is the one that
does not saturate. Images of equal score form one group and their order never matters: what
depends on it is its expectation over random order. `None` where a value is undefined (AUROC when
every prediction is correct). ValueError for empty input, unequal lengths, NaN.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import FloatArray, IntArray, confidence_and_correct


@dataclass(frozen=True)
class TieGroups:
    """Images grouped by equal score, most confident first: how many, and how many are wrong.

    accepted, accepted_errors [G]: images accepted after each group, and the wrong ones of them,
    as whole numbers in float64. A bootstrap resample is another pair over the same groups, in
    which groups may be empty; a histogram of scores is one, too.
    """

    accepted: FloatArray
    accepted_errors: FloatArray

    @classmethod
    def of(cls, size: ArrayLike, errors: ArrayLike) -> "TieGroups":
        """From the number of images and of wrong ones in each group."""
        return cls(np.cumsum(size, dtype=np.float64), np.cumsum(errors, dtype=np.float64))

    @cached_property
    def size(self) -> FloatArray:
        return _steps(self.accepted)

    @cached_property
    def errors(self) -> FloatArray:
        return _steps(self.accepted_errors)

    @cached_property
    def images(self) -> int:
        return int(self.accepted[-1])

    @cached_property
    def wrong(self) -> int:
        return int(self.accepted_errors[-1])

    @property
    def right(self) -> int:
        return self.images - self.wrong

    @cached_property
    def aurc(self) -> float:
        """In a group of m images, g wrong, after N images, E wrong, the expected sum of risks is
        sum_j (E + j g/m)/(N + j) = g + (H_{N+m} - H_N)(E - N g/m).
        """
        if len(self.size) == self.images and (self.size == 1).all():
            return float((self.accepted_errors / self.accepted).mean())
        harmonic = _steps(_harmonic(self.images)[self.accepted.astype(np.int64)])
        share = self.errors / np.maximum(self.size, 1)
        before = self.accepted - self.size
        risks = harmonic @ (self.accepted_errors - self.errors - before * share)
        return float((self.wrong + risks) / self.images)


def tie_groups(confidence: ArrayLike, correct: ArrayLike) -> TieGroups:
    """Sort by falling score and gather equal scores."""
    c, a = confidence_and_correct(confidence, correct, probability=False)
    order, starts = tie_order(c)
    ends = np.append(starts[1:], len(c)) - 1
    return TieGroups(ends + 1.0, np.cumsum(~a[order], dtype=np.float64)[ends])


def tie_order(confidence: FloatArray) -> tuple[IntArray, IntArray]:
    """Order by falling score, and where in that order each group of equal scores starts."""
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
    return groups.aurc


def optimal_aurc(images: int, wrong: int) -> float:
    """AURC when every correct image stands before every wrong one."""
    right = images - wrong
    return float((wrong - right * (_harmonic(images)[images] - _harmonic(images)[right])) / images)


def groups_eaurc(groups: TieGroups) -> float:
    return groups.aurc - optimal_aurc(groups.images, groups.wrong)


def groups_naurc(groups: TieGroups) -> float | None:
    best = optimal_aurc(groups.images, groups.wrong)
    chance = groups.wrong / groups.images
    if groups.wrong == 0 or groups.right == 0:
        return None
    return float((groups.aurc - best) / (chance - best))


def groups_augrc(groups: TieGroups) -> float:
    area = groups.size @ (2 * groups.accepted_errors - groups.errors) / 2
    return float(area / groups.images**2)


def groups_auroc(groups: TieGroups) -> float | None:
    wrong, right = groups.wrong, groups.right
    if wrong == 0 or right == 0:
        return None
    wrong_below = wrong - groups.accepted_errors + groups.errors / 2
    return float((groups.size - groups.errors) @ wrong_below / wrong / right)


def groups_fpr_at_95_tpr(groups: TieGroups) -> float | None:
    if groups.wrong == 0 or groups.right == 0:
        return None
    # In whole numbers, so that a rate of exactly 95 % is not lost to rounding.
    enough = 100 * (groups.accepted - groups.accepted_errors) >= 95 * groups.right
    return float(groups.accepted_errors[np.argmax(enough)] / groups.wrong)


def _found_success(groups: TieGroups) -> tuple[FloatArray, FloatArray]:
    """Correct images found and images seen, from the surest on."""
    return groups.accepted - groups.accepted_errors, groups.accepted


def _found_error(groups: TieGroups) -> tuple[FloatArray, FloatArray]:
    """Wrong images found and images seen, from the least sure on."""
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
    return _average_precision(*_found_success(groups))


def groups_aupr_error(groups: TieGroups) -> float | None:
    return _average_precision(*_found_error(groups))


def groups_risk_at_coverage(groups: TieGroups, coverage: float) -> float:
    """Risk of the ceil(coverage N) most confident images, in expectation over ties."""
    k = max(1, int(np.ceil(coverage * groups.images - 1e-9)))
    g = int(np.searchsorted(groups.accepted, k))
    missing = groups.accepted[g] - k
    errors, size = groups.errors[g], groups.size[g]
    return float((groups.accepted_errors[g] - missing * errors / size) / k)


def groups_coverage_at_risk(groups: TieGroups, risk: float) -> float:
    """Largest coverage that a threshold can give at no more than this risk; 0.0 if none can."""
    allowed = (groups.accepted_errors <= (risk + 1e-12) * groups.accepted) & (groups.accepted > 0)
    if not allowed.any():
        return 0.0
    return float(groups.accepted[len(allowed) - 1 - np.argmax(allowed[::-1])] / groups.images)


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """AURC = 1/N sum_k r_k, r_k the share of wrong ones among the k most confident images.

    In [0, 1], lower is better; papers print it times 1,000. Source: Geifman et al., Bias-Reduced
    Uncertainty Estimation (ICLR 2019), section 3.
    """
    return groups_aurc(tie_groups(confidence, correct))


def eaurc(
    confidence: ArrayLike,
    correct: ArrayLike,
    optimum: Literal["exact", "continuous"] = "exact",
) -> float:
    """E-AURC = AURC minus that of an oracle that ranks every wrong image last.

    optimum: "exact" for N images, or "continuous", err + (1 - err) log(1 - err), as papers print
    it. Source: Geifman et al. (ICLR 2019), equation 2.
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
    """NAURC = (AURC - AURC*) / (err - AURC*): 0 for the oracle, 1 for a random order; None if all
    are correct or all wrong. Compares networks of unlike accuracy. AURC* is the exact optimum.
    Source: Cattelan and Silva, How to Fix a Broken Confidence Estimator (UAI 2024), equation 9.
    """
    return groups_naurc(tie_groups(confidence, correct))


def augrc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """AUGRC: area under (coverage, share of all images that are accepted and wrong), trapezoidal.

    Equals (1 - AUROC) acc err + err^2 / 2, ties included. Source: Traub et al., Overcoming Common
    Flaws in the Evaluation of Selective Classification Systems (NeurIPS 2024), section 4.
    """
    return groups_augrc(tie_groups(confidence, correct))


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """Probability that a correct image outranks a wrong one, ties counting half; None if all are
    correct or all wrong. Source: Hendrycks and Gimpel (ICLR 2017), section 2.
    """
    return groups_auroc(tie_groups(confidence, correct))


def fpr_at_95_tpr(confidence: ArrayLike, correct: ArrayLike) -> float | None:
    """Least share of wrong images accepted by a threshold that accepts >= 95 % of correct ones.

    Thresholds stand between tie groups and none is dropped. None if all are correct or all wrong.
    """
    return groups_fpr_at_95_tpr(tie_groups(confidence, correct))


def aupr_success(
    confidence: ArrayLike,
    correct: ArrayLike,
    method: Literal["average_precision", "trapezoid"] = "average_precision",
) -> float | None:
    """Area under precision-recall, correct being positive; None if all are wrong.

    "average_precision" is the step sum (no optimistic interpolation); "trapezoid" what several
    failure-prediction papers print. Source: Hendrycks and Gimpel (ICLR 2017), section 2.
    """
    groups = tie_groups(confidence, correct)
    return _area(method)(*_found_success(groups))


def aupr_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    method: Literal["average_precision", "trapezoid"] = "average_precision",
) -> float | None:
    """Area under precision-recall, wrong being positive and low scores first; None if all are
    correct. Options as in `aupr_success`.
    """
    groups = tie_groups(confidence, correct)
    return _area(method)(*_found_error(groups))


def _area(method: str):
    areas = {"average_precision": _average_precision, "trapezoid": _trapezoid_precision}
    if method not in areas:
        raise ValueError(f"method must be one of {sorted(areas)}, got {method!r}")
    return areas[method]


def risk_coverage_curve(confidence: ArrayLike, correct: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Coverage and risk [G] at every threshold, rising in coverage and ending at coverage 1.

    One point per group of equal scores: only whole groups can be accepted.
    """
    groups = tie_groups(confidence, correct)
    return groups.accepted / groups.images, groups.accepted_errors / groups.accepted


def risk_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Risk of the ceil(coverage N) most confident images, in expectation over ties."""
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage}")
    return groups_risk_at_coverage(tie_groups(confidence, correct), coverage)


def coverage_at_risk(confidence: ArrayLike, correct: ArrayLike, risk: float) -> float:
    """Largest coverage that a threshold can give at no more than this risk; 0.0 if none can."""
    if not 0 <= risk <= 1:
        raise ValueError(f"risk must lie in [0, 1], got {risk}")
    return groups_coverage_at_risk(tie_groups(confidence, correct), risk)


def threshold_at_risk(confidence: ArrayLike, correct: ArrayLike, risk: float) -> float | None:
    """The score from which images are answered at `coverage_at_risk`; None if none are."""
    score, _ = confidence_and_correct(confidence, correct, probability=False)
    accepted = round(coverage_at_risk(confidence, correct, risk) * len(score))
    return float(np.sort(score)[-accepted]) if accepted else None
