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
from flatcal_dist.calibration.calibrators.of_matrix import DirichletScaling, MatrixScaling
from flatcal_dist.calibration.calibrators.one_vs_rest import OneVsRestHistogram, OneVsRestIsotonic

__all__ = [
    "CrossFit",
    "DirichletScaling",
    "EnsembleTemperatureScaling",
    "HoldOut",
    "Identity",
    "MatrixScaling",
    "OneVsRestHistogram",
    "OneVsRestIsotonic",
    "OutOfSample",
    "TemperatureScaling",
    "TopLabelHistogram",
    "TopLabelIsotonic",
    "VectorScaling",
    "compare_calibrators",
    "fit_out_of_sample",
]
