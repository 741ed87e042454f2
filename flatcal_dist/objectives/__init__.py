"""Objectives: the losses that are minimized, one for each sample."""

from flatcal_dist.objectives.base import Objective, Pairs
from flatcal_dist.objectives.crl import CRL
from flatcal_dist.objectives.cross_entropy import CrossEntropy, cross_entropy
from flatcal_dist.objectives.cs_kd import CSKD
from flatcal_dist.objectives.csam import csam_loss
from flatcal_dist.objectives.focal import Focal
from flatcal_dist.objectives.label_smoothing import LabelSmoothing
from flatcal_dist.objectives.mmce import MMCE
from flatcal_dist.objectives.targets import Targets

__all__ = [
    "CRL", "CSKD", "MMCE", "CrossEntropy", "Focal", "LabelSmoothing", "Objective", "Pairs",
    "Targets", "cross_entropy", "csam_loss",
]  # fmt: skip
