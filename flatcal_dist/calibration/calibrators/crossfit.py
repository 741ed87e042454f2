"""Calibrators that never score an image with a fit that saw it.

`fit_out_of_sample` is the only way from the name of a calibrator to scores. Its result knows the
ids that it was fitted on. With cross-fitting, it scores such an image by the fit of the other
folds. With a hold-out, it refuses such an image. Images that it has not seen, such as those of a
shifted data set, are scored by the fit on all images. A corrupted version of an image goes by the
id of the image.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.of_confidence import TopLabelHistogram, TopLabelIsotonic
from flatcal_dist.calibration.calibrators.of_logits import (
    EnsembleTemperatureScaling,
    Identity,
    LogitCalibrator,
    TemperatureScaling,
    VectorScaling,
)
from flatcal_dist.calibration.calibrators.of_matrix import DirichletScaling, MatrixScaling
from flatcal_dist.calibration.calibrators.one_vs_rest import OneVsRestHistogram, OneVsRestIsotonic
from flatcal_dist.calibration.checks import (
    BoolArray,
    FloatArray,
    IntArray,
    image_ids,
    logits_and_labels,
    positive_integer,
)
from flatcal_dist.calibration.softmax import ImageScores, Scores, joined, score_images

OF_LOGITS: dict[str, type[LogitCalibrator]] = {
    "identity": Identity,
    "temperature": TemperatureScaling,
    "ensemble_temperature": EnsembleTemperatureScaling,
    "vector": VectorScaling,
    "matrix": MatrixScaling,
    "dirichlet": DirichletScaling,
    "one_vs_rest_isotonic": OneVsRestIsotonic,
    "one_vs_rest_histogram": OneVsRestHistogram,
}
OF_CONFIDENCE: dict[str, type[TopLabelIsotonic | TopLabelHistogram]] = {
    "isotonic": TopLabelIsotonic,
    "histogram": TopLabelHistogram,
}
CALIBRATORS = (*OF_LOGITS, *OF_CONFIDENCE)
KEEPS_ANSWERS = ("identity", "temperature", "ensemble_temperature", *OF_CONFIDENCE)
MOVES_ANSWERS = tuple(name for name in CALIBRATORS if name not in KEEPS_ANSWERS)
Fit = LogitCalibrator | TopLabelIsotonic | TopLabelHistogram


def _hash(ids: Sequence[str], seed: int) -> list[int]:
    """A whole number below 2^64 for each id, the same on every machine."""
    digests = (hashlib.sha256(f"{seed}:{i}".encode()).digest()[:8] for i in ids)
    return [int.from_bytes(d, "big") for d in digests]


def fold_of(ids: Sequence[str], folds: int = 5, seed: int = 0) -> IntArray:
    """Return the fold of each image [N]: SHA-256 of seed and id, modulo the number of folds.

    Args:
        ids: The ids of the images [N].
        folds: The number of folds.
        seed: The seed. Another seed makes other folds.
    """
    positive_integer(folds, "folds")
    return np.array([h % folds for h in _hash(ids, seed)], dtype=np.int64)


def uniform_of(ids: Sequence[str], seed: int = 0) -> FloatArray:
    """Return a number in [0, 1) for each image [N], which depends on seed and id alone.

    It is independent of the fold of the image.
    """
    return np.array([h / 2**64 for h in _hash([f"u:{i}" for i in ids], seed)])


@dataclass(frozen=True)
class CrossFit:
    """Folds by the hash of the id. Each image is scored by a fit on the other folds."""

    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if positive_integer(self.folds, "folds") < 2:
            raise ValueError("folds must be at least 2 for cross-fitting")


@dataclass(frozen=True)
class HoldOut:
    """A split by the hash of the id. A share of the images is fitted on, and the rest is scored."""

    share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")

    def chosen(self, ids: Sequence[str]) -> BoolArray:
        """Return which images [N] are fitted on."""
        return np.array([h < self.share * 2**64 for h in _hash(ids, self.seed)], dtype=np.bool_)


FIVE_FOLDS, A_FIFTH = CrossFit(), HoldOut()


@dataclass(frozen=True)
class OutOfSample:
    """A fitted calibrator together with the images that it was fitted on.

    Args:
        name: The name of the calibrator, one of `CALIBRATORS`.
        split: How images were split.
        overall: The fit on all images that may be fitted on. It scores images that were not seen.
        per_fold: The fit on the other folds, for each fold. None for a fold without images. The
            tuple is empty for a hold-out.
        seen: The ids of the images that were fitted on.
    """

    name: str
    split: CrossFit | HoldOut
    overall: Fit
    per_fold: tuple[Fit | None, ...]
    seen: frozenset[str]

    def may_score(self, ids: Sequence[str]) -> BoolArray:
        """Return which images [N] `score` accepts.

        With cross-fitting, it accepts all images. With a hold-out, it accepts images not seen.
        """
        if isinstance(self.split, CrossFit):
            return np.ones(len(ids), dtype=np.bool_)
        return np.array([str(i) not in self.seen for i in ids], dtype=np.bool_)

    def fit_of(self, ids: Sequence[str]) -> IntArray:
        """Return the place in `per_fold` of each image's fit [N]; -1 means the overall fit.

        ValueError after a hold-out for an image that was fitted on.
        """
        names = [str(i) for i in ids]
        seen = np.array([i in self.seen for i in names], dtype=np.bool_)
        if isinstance(self.split, HoldOut):
            if seen.any():
                raise ValueError(
                    f"{int(seen.sum())} images were fitted on, first {names[seen.argmax()]!r}: "
                    "score the others, see `may_score`"
                )
            return np.full(len(names), -1)
        return np.where(seen, fold_of(names, self.split.folds, self.split.seed), -1)

    @property
    def scaling(self) -> TemperatureScaling:
        """The overall fit. ValueError unless it is a temperature."""
        return _scaling(self.overall)

    @property
    def fold_temperatures(self) -> tuple[float | None, ...]:
        """The temperature of each fold. ValueError unless the fits are temperatures."""
        return tuple(None if fit is None else _scaling(fit).temperature for fit in self.per_fold)

    def temperatures(self, ids: Sequence[str]) -> FloatArray:
        """Return the temperature that divides each image's logits [N].

        ValueError unless the fits are temperatures.
        """
        found = (*self.fold_temperatures, self.scaling.temperature)
        table = np.array([np.nan if t is None else t for t in found])
        return table[self.fit_of(ids)]

    def score(self, ids: Sequence[str], logits: ArrayLike, labels: ArrayLike) -> Scores:
        """Score each image by a fit that has not seen it.

        Args:
            ids: The ids of the images [N], or of the images that they were made from. They may
                repeat.
            logits: The logits [N, K].
            labels: The labels int [N].

        Raises:
            ValueError: `checks.logits_and_labels` refuses the input, or, after a hold-out, an image
                was fitted on.
        """
        z, y = logits_and_labels(logits, labels)
        if len(ids) != len(z):
            raise ValueError(f"ids and logits must have equal lengths, got {len(ids)}, {len(z)}")
        which = self.fit_of(ids)
        correct = z.argmax(axis=1) == y
        places, parts = [], []
        for f in np.unique(which):
            rows = np.flatnonzero(which == f)
            fit = (*self.per_fold, self.overall)[f]
            if fit is None:
                raise ValueError(f"fold {f} has images to score, and had none when it was fitted")
            chosen = z if len(rows) == len(z) else z[rows]
            scored = _score(fit, chosen, y[rows])
            if self.name not in MOVES_ANSWERS:  # rounding must not move answers either
                scored = replace(scored, correct=correct[rows])
            places.append(rows)
            parts.append(scored)
        return joined(parts).take(np.argsort(np.concatenate(places), kind="stable"))


def _scaling(fit: Fit) -> TemperatureScaling:
    if not isinstance(fit, TemperatureScaling):
        raise ValueError(f"{type(fit).__name__} is more than a temperature")
    return fit


def _fit(name: str, z: np.ndarray, y: IntArray, start: Fit | None = None) -> Fit:
    if name in OF_LOGITS:
        first = start if isinstance(start, LogitCalibrator) else None
        return OF_LOGITS[name]().fit(z, y, first)
    images = score_images(z, y)
    return OF_CONFIDENCE[name]().fit(images.confidence, images.correct)


def _score(fit: Fit, z: np.ndarray, y: IntArray) -> Scores:
    if isinstance(fit, LogitCalibrator):
        return score_images(z, y, transform=fit.transform).scores()
    return _mended(fit, score_images(z, y))


def _mended(fit: TopLabelIsotonic | TopLabelHistogram, images: ImageScores) -> Scores:
    mended = np.maximum(fit.transform(images.confidence), np.finfo(np.float64).tiny)
    return Scores(images.correct, np.log(mended), None, None, None)


def fit_apart(name: str, logits: ArrayLike, labels: ArrayLike) -> OutOfSample:
    """Fit a calibrator on images that are kept apart, to score any others.

    Ids are not compared, because images of the training data may have the ids of evaluated ones.

    Args:
        name: The name of the calibrator, one of `CALIBRATORS`.
        logits: The logits [M, K] of the images kept apart.
        labels: Their labels int [M].

    Raises:
        ValueError: `checks.logits_and_labels` refuses the input.
    """
    overall = _fit(name, *logits_and_labels(logits, labels))
    return OutOfSample(name, HoldOut(), overall, (), frozenset())


def fit_out_of_sample(
    name: str,
    ids: Sequence[str],
    logits: ArrayLike,
    labels: ArrayLike,
    split: CrossFit | HoldOut = FIVE_FOLDS,
) -> OutOfSample:
    """Fit a calibrator so that no image is scored by a fit that has seen it.

    If a fold or a hold-out leaves no image to fit on, calibration changes nothing there, and a
    RuntimeWarning says so.

    Args:
        name: The name of the calibrator, one of `CALIBRATORS`.
        ids: The ids of the images [N], each of them once.
        logits: The logits [N, K].
        labels: The labels int [N].
        split: How images are split.

    Raises:
        ValueError: The name is unknown, an id repeats, or `checks.logits_and_labels` refuses the
            input.
    """
    if name not in CALIBRATORS:
        raise ValueError(f"no calibrator is called {name!r}; there are {', '.join(CALIBRATORS)}")
    z, y = logits_and_labels(logits, labels)
    names = image_ids(ids, len(z)).tolist()
    if isinstance(split, HoldOut):
        rows = np.flatnonzero(split.chosen(names))
        if not len(rows):
            _warn_of_few()
        overall = _fit(name, z[rows], y[rows]) if len(rows) else _unchanged(name)
        return OutOfSample(name, split, overall, (), frozenset(names[i] for i in rows))
    overall = _fit(name, z, y)
    fold = fold_of(names, split.folds, split.seed)
    per_fold: list[Fit | None] = []
    for f in range(split.folds):
        held_out = fold == f
        if not held_out.any():
            per_fold.append(None)
        elif held_out.all():
            _warn_of_few()
            per_fold.append(_unchanged(name))
        else:
            # The overall fit has seen the labels that are held out, but only shortens the search.
            # The optimum is convex and rounded well above the error of the search. So it is the
            # same wherever the search begins.
            rows = np.flatnonzero(~held_out)
            per_fold.append(_fit(name, z[rows], y[rows], overall))
    return OutOfSample(name, split, overall, tuple(per_fold), frozenset(names))


def _unchanged(name: str) -> Fit:
    return TemperatureScaling.at(1.0) if name == "temperature" else Identity()


def _warn_of_few() -> None:
    warnings.warn(
        "too few images to fit a calibrator without those it scores: T = 1",
        RuntimeWarning,
        stacklevel=3,
    )


def compare_calibrators(
    ids: Sequence[str],
    logits: ArrayLike,
    labels: ArrayLike,
    names: Sequence[str] = (
        "identity",
        "temperature",
        "ensemble_temperature",
        "isotonic",
        "histogram",
    ),
    split: CrossFit | HoldOut = FIVE_FOLDS,
) -> tuple[BoolArray, dict[str, Scores]]:
    """Score the same images with several calibrators, out of sample.

    Args:
        ids: The ids of the images [N], each of them once.
        logits: The logits [N, K].
        labels: The labels int [N].
        names: The names of the calibrators, from `CALIBRATORS`.
        split: How images are split.

    Returns:
        Which images [N] are scored (all of them with cross-fitting), and their scores by name.

    Raises:
        ValueError: As in `fit_out_of_sample`, or the hold-out leaves no image to score.
    """
    z, y = logits_and_labels(logits, labels)
    names_of = image_ids(ids, len(z)).tolist()
    kept: BoolArray = np.ones(len(z), np.bool_)
    if isinstance(split, HoldOut):
        kept = ~split.chosen(names_of)
        if not kept.any():
            raise ValueError("the hold-out takes all images: none is left to score")
    rows = np.flatnonzero(kept)
    scored = [names_of[i] for i in rows]
    z_kept, y_kept = (z, y) if kept.all() else (z[rows], y[rows])
    table = {}
    for name in names:
        table[name] = fit_out_of_sample(name, names_of, z, y, split).score(scored, z_kept, y_kept)
    return kept, table
