"""Learning-rate schedules. Each is a function of the step's number and has no state."""

from flatcal_dist.schedules.base import Length, Schedule, ShareOfPeak
from flatcal_dist.schedules.by_timm import Constant, Cosine, MultiStep
from flatcal_dist.schedules.cyclical import Cyclical
from flatcal_dist.schedules.swa_2022 import SWA2022
from flatcal_dist.schedules.swa_constant import SWAConstant

__all__ = [
    "SWA2022",
    "Constant",
    "Cosine",
    "Cyclical",
    "Length",
    "MultiStep",
    "SWAConstant",
    "Schedule",
    "ShareOfPeak",
]
