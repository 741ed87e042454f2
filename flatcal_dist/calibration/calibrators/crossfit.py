"""Calibrators that never score an image with a fit that saw it.

`fit_out_of_sample` is the only way from a calibrator's name to scores, and what it returns knows
the ids it was fitted on: with cross-fitting it answers for one of them with the fit of the other
folds, with a hold-out it refuses. Images it has not seen, such as those of a shifted data set, are
scored with the fit on everything; corrupted versions of seen images go by the id of their source.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.of_confidence import TopLabelHistogram, TopLabelIsotonic
from flatcal_dist.calibration.calibrators.of_logits import (
    EnsembleTemperatureScaling,
    Identity,
    TemperatureScaling,
    VectorScaling,
)
from flatcal_dist.calibration.checks import (
    BoolArray,
    FloatArray,
    IntArray,
    image_ids,
    logits_and_labels,
    positive_integer,
)
from flatcal_dist.calibration.softmax import ImageScores, Scores, score_images

CALIBRATORS = {
    "identity": Identity,
    "temperature": TemperatureScaling,
    "ensemble_temperature": EnsembleTemperatureScaling,
    "vector": VectorScaling,
    "isotonic": TopLabelIsotonic,
    "histogram": TopLabelHistogram,
}
OF_CONFIDENCE = ("isotonic", "histogram")
MOVES_ANSWERS = ("vector",)  # the others keep the argmax, and so the accuracy
Fit = (
    Identity
    | TemperatureScaling
    | EnsembleTemperatureScaling
    | VectorScaling
    | TopLabelIsotonic
    | TopLabelHistogram
)


def _hash(ids: Sequence[str], seed: int) -> list[int]:
    """A whole number below 2^64 for each id, the same on every machine."""
    digests = (hashlib.sha256(f"{seed}:{i}".encode()).digest()[:8] for i in ids)
    return [int.from_bytes(d, "big") for d in digests]


def fold_of(ids: Sequence[str], folds: int = 5, seed: int = 0) -> IntArray:
    """Fold of each id: SHA-256 of seed and id, modulo folds."""
    positive_integer(folds, "folds")
    return np.array([h % folds for h in _hash(ids, seed)], dtype=np.int64)


@dataclass(frozen=True)
class CrossFit:
    """Every image is scored by a fit on the other folds; folds go by the hash of the id."""

    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if positive_integer(self.folds, "folds") < 2:
            raise ValueError("folds must be at least 2 for cross-fitting")


@dataclass(frozen=True)
class HoldOut:
    """A share of the images, by the hash of the id, is fitted on and the rest is scored."""

    share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")

    def chosen(self, ids: Sequence[str]) -> BoolArray:
        """Which images [N] are fitted on."""
        return np.array([h < self.share * 2**64 for h in _hash(ids, self.seed)], dtype=np.bool_)


FIVE_FOLDS, A_FIFTH = CrossFit(), HoldOut()


@dataclass(frozen=True)
class OutOfSample:
    """A fitted calibrator together with what it saw.

    overall: fitted on all that may be fitted on, for images never seen. per_fold: for
    cross-fitting, the fit on the other folds; None for a fold without images; empty for a
    hold-out. seen: the ids fitted on.
    """

    name: str
    split: CrossFit | HoldOut
    overall: Fit
    per_fold: tuple[Fit | None, ...]
    seen: frozenset[str]

    def may_score(self, ids: Sequence[str]) -> BoolArray:
        """Which of the images [N] `score` accepts: with cross-fitting all, else the unseen ones."""
        if self.per_fold:
            return np.ones(len(ids), dtype=np.bool_)
        return np.array([str(i) not in self.seen for i in ids], dtype=np.bool_)

    def fit_of(self, ids: Sequence[str]) -> IntArray:
        """Index into `per_fold` of the fit for each image [N], -1 for the overall one."""
        names = [str(i) for i in ids]
        seen = np.array([i in self.seen for i in names], dtype=np.bool_)
        if not self.per_fold:
            if seen.any():
                raise ValueError(
                    f"{int(seen.sum())} images were fitted on, first {names[seen.argmax()]!r}: "
                    "score the others, see `may_score`"
                )
            return np.full(len(names), -1)
        return np.where(seen, fold_of(names, self.split.folds, self.split.seed), -1)

    def temperatures(self, ids: Sequence[str]) -> FloatArray:
        """The temperature [N] by which each image's logits are divided; of "temperature" alone."""
        if self.name != "temperature":
            raise ValueError(f"{self.name} is more than a temperature")
        fits = (*self.per_fold, self.overall)
        table = np.array([np.nan if fit is None else fit.temperature for fit in fits])
        return table[self.fit_of(ids)]

    def score(self, ids: Sequence[str], logits: ArrayLike, labels: ArrayLike) -> Scores:
        """Scores of logits [N, K] against labels [N], each by a fit that has not seen the image.

        ids: of the images, or of the images that they were made from; they may repeat. ValueError
        for what `checks.logits_and_labels` refuses, and after a hold-out for images fitted on.
        """
        z, y = logits_and_labels(logits, labels)
        if len(ids) != len(z):
            raise ValueError(f"ids and logits must have equal lengths, got {len(ids)}, {len(z)}")
        which = self.fit_of(ids)
        correct = z.argmax(axis=1) == y
        parts: list[tuple[IntArray, Scores]] = []
        for f in np.unique(which):
            rows = np.flatnonzero(which == f)
            fit = (*self.per_fold, self.overall)[f]
            chosen = z if len(rows) == len(z) else z[rows]
            scored = _score(fit, chosen, y[rows])
            if self.name not in MOVES_ANSWERS:  # in exact arithmetic, so not in rounded either
                scored = Scores(correct[rows], *list(vars(scored).values())[1:])
            parts.append((rows, scored))
        order = np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable")
        columns = zip(*(vars(scores).values() for _, scores in parts), strict=True)
        return Scores(*(None if c[0] is None else np.concatenate(c)[order] for c in columns))


def _fit(name: str, z: np.ndarray, y: IntArray, start: Fit | None = None) -> Fit:
    calibrator = CALIBRATORS[name]()
    if name not in OF_CONFIDENCE:
        return calibrator.fit(z, y, start)
    images = score_images(z, y)
    return calibrator.fit(images.confidence, images.correct)


def _score(fit: Fit, z: np.ndarray, y: IntArray) -> Scores:
    if not isinstance(fit, TopLabelIsotonic | TopLabelHistogram):
        return score_images(z, y, transform=fit.transform).scores()
    return _mended(fit, score_images(z, y))


def _mended(fit: TopLabelIsotonic | TopLabelHistogram, images: ImageScores) -> Scores:
    mended = np.maximum(fit.transform(images.confidence), np.finfo(np.float64).tiny)
    return Scores(images.correct, np.log(mended), None, None, None)


def fit_out_of_sample(
    name: str,
    ids: Sequence[str],
    logits: ArrayLike,
    labels: ArrayLike,
    split: CrossFit | HoldOut = FIVE_FOLDS,
) -> OutOfSample:
    """Fit one of `CALIBRATORS` on logits [N, K] and labels [N] of the images `ids` (N, unique).

    Where a fold or a hold-out leaves no image to fit on, nothing is changed by calibration there,
    with a RuntimeWarning. ValueError for an unknown name, repeated ids, and what
    `checks.logits_and_labels` refuses.
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
            # The overall fit knows the labels held out, but only shortens the search: a convex
            # optimum, rounded beyond the error of the search, is the same from everywhere.
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
    """Out-of-sample scores of several calibrators on the same images.

    Returns which images [N] are scored (all with cross-fitting), and their scores by name.
    """
    z, y = logits_and_labels(logits, labels)
    names_of = image_ids(ids, len(z)).tolist()
    kept = np.ones(len(z), np.bool_)
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
