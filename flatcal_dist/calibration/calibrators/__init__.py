"""Calibrators, which are fitted on held-out images and make confidence match accuracy."""

from flatcal_dist.calibration.calibrators.crossfit import (
    CrossFit,
    HoldOut,
    OutOfSample,
    compare_calibrators,
    fit_out_of_sample,
)
from flatcal_dist.calibration.calibrators.of_confidence import TopLabelHistogram, TopLabelIsotonic
from flatcal_dist.calibration.calibrators.of_logits import (
    EnsembleTemperatureScaling,
    Identity,
    TemperatureScaling,
    VectorScaling,
)

__all__ = [
    "CrossFit",
    "EnsembleTemperatureScaling",
    "HoldOut",
    "Identity",
    "OutOfSample",
    "TemperatureScaling",
    "TopLabelHistogram",
    "TopLabelIsotonic",
    "VectorScaling",
    "compare_calibrators",
    "fit_out_of_sample",
]
