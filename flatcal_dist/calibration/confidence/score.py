"""What a score of confidence is, what it needs, and what it is computed from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from flatcal_dist.calibration.checks import FloatArray, IntArray

if TYPE_CHECKING:
    from flatcal_dist.calibration.confidence.of_logits import Tuning
    from flatcal_dist.calibration.softmax import ImageScores

# probabilities: logits up to a constant of each image, so logarithms of probabilities will do.
# logits: their own level too. features: of the images and of training images. passes: several,
# with dropout. networks: several. A score of another kind, such as a head that was fitted, adds a
# word here, a field to Evidence, and what fills the field to `predicting`.
Need = Literal["probabilities", "logits", "features", "passes", "networks"]
OF_LOGITS: tuple[Need, ...] = ("probabilities", "logits")


@dataclass(frozen=True)
class Reference:
    """Training images, to which others are compared: features [M, D] and labels int [M]."""

    features: FloatArray
    labels: IntArray


@dataclass(frozen=True)
class Evidence:
    """What is known of N images; a field that no score asked for is None.

    logits [N, K], with what `images` tells of them and what was tuned on images that are not
    judged. features [N, D] with the class predicted for each image [N] and the training images to
    compare with. passes: logits [T, N, K] of T passes with dropout. networks: logits [M, N, K] of
    M networks.
    """

    logits: np.ndarray | None = None
    images: "ImageScores | None" = None
    tuning: "Tuning | None" = None
    features: FloatArray | None = None
    prediction: IntArray | None = None
    reference: Reference | None = None
    passes: FloatArray | None = None
    networks: FloatArray | None = None


@dataclass(frozen=True)
class Score:
    """A score that ranks images by confidence: one value for each image, higher is surer.

    Scores of logits are in every report, one of `networks` where there are several networks; all
    others are computed where `evaluate.confidence` names them.

    Args:
        key: its name in records, metrics.json and the configuration.
        name: its name on a page.
        meaning: what it is, in a few words.
        source: who proposed it, and where.
        needs: what it is computed from.
        compute: gives the values [N]; the fields of the evidence that it needs are there.
    """

    key: str
    name: str
    meaning: str
    source: str
    needs: Need
    compute: Callable[[Evidence], FloatArray]

    @property
    def of_logits(self) -> bool:
        """Whether logits are all that it needs."""
        return self.needs in OF_LOGITS
