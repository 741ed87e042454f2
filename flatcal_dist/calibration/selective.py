"""The name that users import failure-prediction metrics by; they live in `metrics.selective`."""

from flatcal_dist.calibration.metrics.selective import *  # noqa: F403
