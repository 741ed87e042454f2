"""Calibration and failure prediction from sums, for every epoch and any number of ranks.

Each rank holds one float64 vector, `BinnedEvaluation.state`. The vectors of disjoint parts of the
data add up to the vector of the whole. One all-reduce therefore replaces gathering the images, and
a rank that saw no image adds zeros. Sums and the bins of ECE are exact. Rankings come from fine
histograms of the confidence of correct and of wrong images. Images in one cell count as ties, and
`BinnedFigures` tells how large the error can be.
"""

from dataclasses import dataclass, fields, make_dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import FloatArray, positive_integer
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.metrics.calibration_errors import equal_width_index
from flatcal_dist.calibration.metrics.entries import METRICS, RANKS
from flatcal_dist.calibration.metrics.entry import Sums
from flatcal_dist.calibration.softmax import ImageScores, score_images

# Cells have equal width in log(c / (1 - c)), which resolves confidences near 1 as well as others.
LOWEST, HIGHEST = -12.0, 100.0
SUMS = ("images", "not_finite", "correct", "top5", "nll", "brier", "entropy", "entropy_correct")
OF_METRICS = ("correct", "nll", "brier", "entropy", "entropy_correct")
BIN_SUMS = ("images", "confidence", "correct")
RUNNING = {key: m.running for key, m in METRICS.items() if m.running is not None}
BY_ORDER = tuple(key for key in RUNNING if key in RANKS)

if TYPE_CHECKING:

    @dataclass(frozen=True)
    class BinnedFigures:
        """What a type checker sees of the figures: those that code names."""

        images: int
        not_finite: int
        top5_accuracy: float | None
        accuracy: float | None
        nll: float | None
        ece: float | None
        auroc: float | None
        aurc: float | None
        auroc_error: float | None
        aurc_error: float | None
else:
    BinnedFigures = make_dataclass(
        "BinnedFigures",
        [("images", int), ("not_finite", int), ("top5_accuracy", float | None)]
        + [(key, float | None) for key in RUNNING]
        + [(f"{key}_error", float | None) for key in BY_ORDER],
        frozen=True,
        namespace={
            "__doc__": """The same figures as in the report. Rates are fractions; NLL and entropy
    are in nats.

    Figures of failure prediction lie within `*_error` of the values of the images themselves. All
    others are exact to rounding. A figure is None where it is undefined. If the logits of any image
    are not finite, all figures but the two counts are undefined.
    """
        },
    )


class BinnedEvaluation:
    """Evaluates a network from sums: add batches, sum `state` over ranks, call `figures`.

    Args:
        bins: The number of bins of ECE, as in the report.
        cells: The number of cells of the histograms of confidence.
    """

    def __init__(self, bins: int = 15, cells: int = 16384) -> None:
        self.bins = positive_integer(bins, "bins")
        self.cells = positive_integer(cells, "cells")
        self.state = np.zeros(len(SUMS) + len(BIN_SUMS) * bins + 2 * cells)

    def _parts(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Views of the state: sums, [3, bins], and [2, cells] of correct and wrong images."""
        a = len(SUMS)
        b = a + len(BIN_SUMS) * self.bins
        return self.state[:a], self.state[a:b].reshape(-1, self.bins), self.state[b:].reshape(2, -1)

    def add(self, logits: ArrayLike, labels: ArrayLike) -> None:
        """Add a batch of logits [n, K] and labels int [n]; n may be 0.

        Images whose logits are NaN or infinite are only counted as such. ValueError for labels out
        of range and for wrong shapes.
        """
        z, y = np.asarray(logits), np.asarray(labels)
        if z.ndim != 2 or y.shape != z.shape[:1]:
            raise ValueError(f"logits [n, K] and labels [n] expected, got {z.shape} and {y.shape}")
        finite = np.isfinite(z).all(axis=1)
        self.state[SUMS.index("not_finite")] += (~finite).sum()
        if finite.any():
            self.add_scores(score_images(z[finite], y[finite]))

    def add_scores(self, images: ImageScores) -> None:
        """Add images that have been scored."""
        sums, bins, histograms = self._parts()
        correct, entropy = images.correct, images.entropy
        sums += (
            len(correct), 0, correct.sum(), (images.rank < 5).sum(), images.nll.sum(),
            images.brier.sum(), entropy.sum(), entropy[correct].sum(),
        )  # fmt: skip
        confidence = images.confidence
        index = equal_width_index(confidence, self.bins)
        for row, values in zip(bins, (None, confidence, correct), strict=True):
            row += np.bincount(index, values, minlength=self.bins)
        cell = self._cell(images.log_confidence)
        for row, chosen in zip(histograms, (correct, ~correct), strict=True):
            row += np.bincount(cell[chosen], minlength=self.cells)

    def _cell(self, log_confidence: FloatArray) -> np.ndarray:
        odds = log_confidence - np.log(-np.expm1(np.minimum(log_confidence, -1e-300)))
        place = (odds - LOWEST) / (HIGHEST - LOWEST) * self.cells
        return np.clip(place, 0, self.cells - 1).astype(np.int64)

    def figures(self) -> BinnedFigures | None:
        """Return the figures of all images that were added. None if there are none."""
        sums, bins, (right, wrong) = self._parts()
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        n, broken = total["images"], total["not_finite"]
        if n + broken == 0:
            return None
        if broken or not np.isfinite(self.state).all():
            undefined = [None] * (len(fields(BinnedFigures)) - 2)
            return BinnedFigures(int(n + broken), int(broken), *undefined)
        sums_of = {name: total[name] for name in OF_METRICS}
        exact, *extreme = (
            Sums(images=n, gaps=bins[1] - bins[2], groups=groups, **sums_of)
            for groups in _groups(right[::-1], wrong[::-1])
        )
        values = {key: running(exact) for key, running in RUNNING.items()}
        errors = {}
        for key in BY_ORDER:
            value, ends = values[key], [RUNNING[key](sums) for sums in extreme]
            errors[f"{key}_error"] = (
                None if value is None else max(abs(v - value) for v in ends if v is not None)
            )
        return BinnedFigures(int(n), 0, total["top5"] / n, **values, **errors)


def _groups(
    right: FloatArray, wrong: FloatArray
) -> tuple[selective.TieGroups, selective.TieGroups, selective.TieGroups]:
    """The cells as groups of ties, with the correct images first, and with the wrong images first.

    Every order of the images that the cells allow lies between the last two.
    """
    zeros = np.zeros_like(right)
    first_right = np.column_stack([right, wrong]).ravel(), np.column_stack([zeros, wrong]).ravel()
    first_wrong = np.column_stack([wrong, right]).ravel(), np.column_stack([wrong, zeros]).ravel()
    of = selective.TieGroups.of
    return of(right + wrong, wrong), of(*first_right), of(*first_wrong)
