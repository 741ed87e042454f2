"""The temperatures that score records: of folds, of images kept apart, or of clean images."""

from dataclasses import dataclass, replace

import numpy as np

from flatcal_dist.calibration.calibrators.crossfit import (
    CrossFit,
    HoldOut,
    OutOfSample,
    fit_apart,
    fit_out_of_sample,
)
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.checks import IntArray
from flatcal_dist.calibration.confidence.of_logits import Tuning, tune
from flatcal_dist.calibration.records.source import Source


@dataclass(frozen=True)
class Apart:
    """Images of the training data that the network was not trained on.

    Temperatures are fitted on them (TS-valid), and they get no records.
    """

    labels: IntArray  # [M]
    logits: np.ndarray  # [M, K]

    def __len__(self) -> int:
        return len(self.labels)


def fitted(
    ids: list[str],
    z: np.ndarray,
    y: IntArray,
    how: CrossFit | HoldOut | Apart,
) -> tuple[OutOfSample, Tuning]:
    """Return the temperatures, and what is tuned for confidence scores.

    Args:
        ids: The ids of the evaluated images [N].
        z: Their logits [N, K].
        y: Their labels [N].
        how: The images that are fitted on: the other folds, a share of the evaluated images, or
            images kept apart.
    """
    tuned_on = how if isinstance(how, HoldOut) else HoldOut(seed=getattr(how, "seed", 0))
    if isinstance(how, Apart):
        fit = fit_apart("temperature", how.logits, how.labels)
    else:
        fit = fit_out_of_sample("temperature", ids, z, y, how)
    return fit, tune(ids, z, y, tuned_on)


def of_images_apart(scaling: TemperatureScaling) -> OutOfSample:
    """Return a temperature that may score every evaluated image.

    Ids are not compared, because images of the training data may have the ids of evaluated ones.
    """
    return OutOfSample("temperature", HoldOut(), scaling, (), frozenset())


def with_own_temperature(source: Source, z: np.ndarray, y: IntArray) -> Source:
    """Return the source with the temperature that is fitted on these very images."""
    own = TemperatureScaling().fit(z, y)
    return replace(source, own_temperature=own.temperature, own_temperature_interval=own.interval())
