"""What a score of confidence is, and what it is computed from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import FloatArray, IntArray

if TYPE_CHECKING:
    from flatcal_dist.calibration.confidence.of_logits import Tuning
    from flatcal_dist.calibration.softmax import ImageScores

# What a score needs:
#     probabilities   logits up to a constant per image; logarithms of probabilities will do
#     logits          logits with the level that the network gives them
#     features        features of the images and of training images
#     head            the same, and a head that is fitted on images that are not judged
#     passes          several passes with dropout
#     networks        several networks
# A score of another kind needs a word here, a field in Evidence, and code in
# `evaluation.predicting` that fills the field.
Need = Literal["probabilities", "logits", "features", "head", "passes", "networks"]
OF_LOGITS: tuple[Need, ...] = ("probabilities", "logits")
OF_FEATURES: tuple[Need, ...] = ("features", "head")
T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """Images that are not judged, to compare others with or to fit a head on.

    Args:
        features: Their features [M, D].
        labels: Their labels int [M].
        logits: Their logits [M, K], where a head is fitted.
    """

    features: FloatArray
    labels: IntArray
    logits: np.ndarray | None = None

    def among(self, classes: Sequence[int]) -> "Reference":
        """Return the images of these classes, in ascending order, which are then all that exist."""
        chosen = np.isin(self.labels, classes)
        labels = np.searchsorted(classes, self.labels[chosen])
        logits = None if self.logits is None else self.logits[chosen][:, list(classes)]
        return Reference(self.features[chosen], labels, logits)


@dataclass(frozen=True)
class Evidence:
    """What is known about N images. A field is None if no score asked for it.

    Args:
        logits: The logits [N, K].
        images: What a softmax says about these logits.
        tuning: What was tuned on images that are not judged.
        features: The features of the images [N, D].
        prediction: The predicted class of each image [N].
        reference: The training images to compare with.
        fitted_on: The images to fit a head on.
        passes: The logits of T passes with dropout [T, N, K].
        networks: The logits of M networks [M, N, K].
    """

    logits: np.ndarray | None = None
    images: "ImageScores | None" = None
    tuning: "Tuning | None" = None
    features: FloatArray | None = None
    prediction: IntArray | None = None
    reference: Reference | None = None
    fitted_on: Reference | None = None
    passes: FloatArray | None = None
    networks: FloatArray | None = None


def given(part: T | None) -> T:
    """Return a part of the evidence. ValueError if it is missing."""
    if part is None:
        raise ValueError("the evidence lacks what this confidence score is computed from")
    return part


def checked_features(features: ArrayLike, reference: Reference) -> FloatArray:
    """Return the features [N, D] in float64. ValueError if they do not fit the reference."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1:] != reference.features.shape[1:]:
        raise ValueError(
            f"features have shape {list(x.shape)}, those of the training images "
            f"{list(reference.features.shape)}: expected [N, D] and [M, D]"
        )
    for array, whose in ((x, "the images"), (reference.features, "the training images")):
        if not np.isfinite(array).all():
            raise ValueError(f"features of {whose} hold NaN or infinite values")
    return x


@dataclass(frozen=True)
class Score:
    """A score that ranks images by confidence. Higher values mean more confident.

    Every report holds the scores of logits. Scores that need several networks are computed for an
    ensemble. All other scores are computed if `evaluate.confidence` names them.

    Args:
        key: The name in records, metrics.json and the configuration.
        name: The name on a page.
        meaning: What the score is, in a few words.
        source: Who proposed it, and where.
        needs: What it is computed from.
        compute: Computes the values [N] from the evidence.
    """

    key: str
    name: str
    meaning: str
    source: str
    needs: Need
    compute: Callable[[Evidence], FloatArray]

    @property
    def of_logits(self) -> bool:
        """Whether the score needs logits only."""
        return self.needs in OF_LOGITS
