"""Conformal sets: for each image a set of classes that holds the label as often as is wanted.

Each kind has a score of (image, class), higher being stranger. The set of an image holds all
classes whose score is at most a threshold: the quantile of the labels' scores on other images.
If all images come from the same source, the set of a new image holds its label with at least the
wanted probability, however bad the network is (Vovk et al., 2005). LAC, APS and RAPS are
few lines each. Packages that have them (MAPIE, torchcp) want a scikit-learn or PyTorch model and
draw random numbers in the order of images, so they are not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.crossfit import fold_of, uniform_of
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.checks import (
    BoolArray,
    FloatArray,
    IntArray,
    image_ids,
    logits_and_labels,
)
from flatcal_dist.calibration.softmax import chunks, log_softmax

KINDS = ("lac", "aps", "raps")
WANTED = 0.9  # the coverage of the papers' main tables
FOLDS = 5  # one is scored, one tunes, and three give the threshold
PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)  # of RAPS, as its authors' code tries them


@dataclass(frozen=True)
class Sets:
    """What the sets of N images are like.

    Args:
        covered: Which sets hold the label [N].
        size: How many classes each set holds [N].
    """

    covered: BoolArray
    size: IntArray


@dataclass(frozen=True)
class Rule:
    """The score of a kind of sets.

    With the classes in falling order of probability, S is the sum of probabilities before a class,
    p its own probability, o its place (from 1), and u a number drawn from (0, 1) for the image.

    * lac: 1 - p. Source: Sadinle, Lei and Wasserman (JASA 2019).
    * aps: S + u p. Source: Romano, Sesia and Candes (NeurIPS 2020).
    * raps: S + u p + penalty max(0, o - free). Source: Angelopoulos et al. (ICLR 2021).

    Args:
        kind: One of `KINDS`.
        temperature: What divides the logits.
        penalty: lambda of RAPS; 0 makes it APS.
        free: k_reg of RAPS, the places without a penalty.
    """

    kind: str
    temperature: float = 1.0
    penalty: float = 0.0
    free: int = 0

    def of_labels(self, z: np.ndarray, y: IntArray, u: FloatArray) -> FloatArray:
        """Return the scores [N] of the labels [N] of logits [N, K], with draws u [N]."""
        return self.score(*_of_labels(z, y, self.temperature), u)

    def sizes(self, z: np.ndarray, u: FloatArray, threshold: float) -> IntArray:
        """Return how many classes [N] have a score of at most `threshold`."""
        return _sizes([self], [threshold], z, u)[0]

    def score(self, mass: FloatArray, p: FloatArray, place: IntArray, u: FloatArray) -> FloatArray:
        """Return the scores of classes, by S, p, o and u, arrays that broadcast."""
        if self.kind == "lac":
            return 1 - p
        return mass + u * p + self.penalty * np.maximum(0, place - self.free)


def _of_labels(
    z: np.ndarray, y: IntArray, temperature: float
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Return S, p and o of the labels, [N] each."""
    masses, own, places = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, np.int64)]
    for rows in chunks(*z.shape):
        p = np.exp(log_softmax(z[rows] / temperature))
        label = p[np.arange(len(p)), y[rows]][:, None]
        before = p > label  # of equal classes, the first one stands first, as in argmax
        before |= (p == label) & (np.arange(p.shape[1]) < y[rows, None])
        masses.append((p * before).sum(axis=1))
        own.append(label[:, 0])
        places.append(before.sum(axis=1) + 1)
    return np.concatenate(masses), np.concatenate(own), np.concatenate(places)


def _sizes(
    rules: Sequence[Rule], thresholds: Sequence[float], z: np.ndarray, u: FloatArray
) -> list[IntArray]:
    """Return the sizes of sets [N] of rules with one temperature. Each row is sorted once."""
    found: list[list[IntArray]] = [[np.zeros(0, np.int64)] for _ in rules]
    place = np.arange(1, z.shape[1] + 1)
    for rows in chunks(*z.shape):
        p = -np.sort(-np.exp(log_softmax(z[rows] / rules[0].temperature)), axis=1)
        mass = np.cumsum(p, axis=1) - p
        for rule, threshold, sizes in zip(rules, thresholds, found, strict=True):
            scores = rule.score(mass, p, place, u[rows, None])
            sizes.append((scores <= threshold).sum(axis=1))
    return [np.concatenate(sizes) for sizes in found]


def threshold_of(scores: ArrayLike, wanted: float = WANTED) -> float:
    """Return the ceil((n + 1) wanted)-th smallest of n scores. It is infinite if n is too small.

    A new score from the same source is at most this with a probability of at least `wanted`.
    """
    found = np.sort(np.asarray(scores, dtype=np.float64))
    place = int(np.ceil((len(found) + 1) * wanted - 1e-9))
    return float(found[place - 1]) if place <= len(found) else np.inf


def conformal_sets(
    ids: Sequence[str],
    labels: ArrayLike,
    logits: ArrayLike,
    wanted: float = WANTED,
    seed: int = 0,
) -> dict[str, Sets]:
    """Return the sets of each kind, made without the image and without its label.

    A hash of the id splits the images into five parts. For each part, the next one gives the
    temperature and the parameters of RAPS, and the other three give the threshold. So the images
    that tune, those that give the threshold and those that are judged are never the same.

    Args:
        ids: The ids of the images [N], each of them once.
        labels: The labels int [N].
        logits: The logits [N, K].
        wanted: The wanted share of sets that hold the label.
        seed: The seed of the parts and of the draws of APS and RAPS.

    Raises:
        ValueError: An id occurs twice, `wanted` is not between 0 and 1, or
            `checks.logits_and_labels` refuses the input.
    """
    if not 0 < wanted < 1:
        raise ValueError(f"wanted must lie between 0 and 1, got {wanted}")
    names = image_ids(ids, len(np.asarray(logits))).tolist()
    z, y = logits_and_labels(logits, labels)
    fold, u = fold_of(names, FOLDS, seed), uniform_of(names, seed)
    covered = {kind: np.zeros(len(z), np.bool_) for kind in KINDS}
    size = {kind: np.zeros(len(z), np.int64) for kind in KINDS}
    for f in range(FOLDS):
        judged, tuned_on = fold == f, fold == (f + 1) % FOLDS
        if not judged.any():
            continue
        rest = ~judged & ~tuned_on
        rules = _tuned(z[tuned_on], y[tuned_on], u[tuned_on], wanted)
        others = _of_labels(z[rest], y[rest], rules[0].temperature)
        own = _of_labels(z[judged], y[judged], rules[0].temperature)
        thresholds = [threshold_of(rule.score(*others, u[rest]), wanted) for rule in rules]
        sizes = _sizes(rules, thresholds, z[judged], u[judged])
        for rule, threshold, held in zip(rules, thresholds, sizes, strict=True):
            covered[rule.kind][judged] = rule.score(*own, u[judged]) <= threshold
            size[rule.kind][judged] = held
    return {kind: Sets(covered[kind], size[kind]) for kind in KINDS}


def _tuned(z: np.ndarray, y: IntArray, u: FloatArray, wanted: float) -> list[Rule]:
    """The rules with the temperature and the parameters that suit these images."""
    if not len(z):
        return [Rule(kind) for kind in KINDS]
    t = TemperatureScaling().fit(z, y).temperature
    labels = _of_labels(z, y, t)
    free = int(np.quantile(labels[2], wanted, method="higher"))
    rules = [Rule("raps", t, penalty, free) for penalty in PENALTIES]
    thresholds = [threshold_of(rule.score(*labels, u), wanted) for rule in rules]
    mean_sizes = [sizes.mean() for sizes in _sizes(rules, thresholds, z, u)]
    penalty = PENALTIES[int(np.argmin(mean_sizes))]  # of equally good ones the smallest
    return [Rule("lac", t), Rule("aps", t), Rule("raps", t, penalty, free)]
