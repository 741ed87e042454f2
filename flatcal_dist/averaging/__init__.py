"""Averages of the weights, which are evaluated in place of the last weights."""

from flatcal_dist.averaging.base import AverageRule, Moment, Snapshots
from flatcal_dist.averaging.ema import EMA
from flatcal_dist.averaging.swa import SWA

__all__ = ["EMA", "SWA", "AverageRule", "Moment", "Snapshots"]
