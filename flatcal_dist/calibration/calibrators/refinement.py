"""What is left of the NLL when a temperature has taken the miscalibration away."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.crossfit import CrossFit, fit_out_of_sample


def refined_nll(ids: Sequence[str], logits: ArrayLike, labels: ArrayLike, folds: int = 5) -> float:
    """Return the mean NLL in nats after cross-fitted temperature. NaN if a logit is not finite.

    A checkpoint that is best by it need not be calibrated: the temperature is fitted after
    training. Source: Berta et al., Rethinking Early Stopping: Refine, Then
    Calibrate (arXiv 2501.19195, 2025), with temperature scaling.

    Args:
        ids: The ids of the images [N], each of them once.
        logits: The logits [N, K].
        labels: The labels int [N].
        folds: The number of folds.

    Raises:
        ValueError: An id occurs twice, or `checks.logits_and_labels` refuses finite input.
    """
    z = np.asarray(logits)
    if not np.isfinite(z).all():
        return math.nan
    with warnings.catch_warnings():  # early in training there may be no finite temperature
        warnings.simplefilter("ignore", RuntimeWarning)
        fit = fit_out_of_sample("temperature", ids, z, labels, CrossFit(folds))
        return float(fit.score(ids, z, labels).column("nll").mean())
