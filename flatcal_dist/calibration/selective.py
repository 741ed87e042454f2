"""Metrics of failure prediction under a short name for users, see `metrics.selective`."""

from flatcal_dist.calibration.metrics.selective import *  # noqa: F403
