"""Objectives: the losses that are minimized, one for each sample."""

from flatcal_dist.objectives.base import Objective, Pairs
from flatcal_dist.objectives.brier import Brier
from flatcal_dist.objectives.confidence_penalty import ConfidencePenalty
from flatcal_dist.objectives.crl import CRL
from flatcal_dist.objectives.cross_entropy import CrossEntropy, cross_entropy
from flatcal_dist.objectives.cs_kd import CSKD
from flatcal_dist.objectives.csam import csam_loss
from flatcal_dist.objectives.flsc import FLSc
from flatcal_dist.objectives.flsd import FLSD
from flatcal_dist.objectives.focal import Focal
from flatcal_dist.objectives.label_smoothing import LabelSmoothing
from flatcal_dist.objectives.lp_norm import LpNorm
from flatcal_dist.objectives.margin_smoothing import MarginSmoothing
from flatcal_dist.objectives.mmce import MMCE
from flatcal_dist.objectives.targets import Targets

__all__ = [
    "CRL", "CSKD", "FLSD", "MMCE", "Brier", "ConfidencePenalty", "CrossEntropy", "FLSc", "Focal",
    "LabelSmoothing", "LpNorm", "MarginSmoothing", "Objective", "Pairs", "Targets",
    "cross_entropy", "csam_loss",
]  # fmt: skip
