"""Objectives: what is minimized, a loss for each sample."""

from flatcal_dist.objectives.base import Objective
from flatcal_dist.objectives.cross_entropy import CrossEntropy, cross_entropy
from flatcal_dist.objectives.csam import csam_loss
from flatcal_dist.objectives.focal import Focal
from flatcal_dist.objectives.label_smoothing import LabelSmoothing

__all__ = ["CrossEntropy", "Focal", "LabelSmoothing", "Objective", "cross_entropy", "csam_loss"]
