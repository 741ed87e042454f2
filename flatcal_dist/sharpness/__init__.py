"""Sharpness-aware training: rules (the mathematics), the step (the order of things), engines."""

from flatcal_dist.sharpness.engines import Engine, ReplicatedEngine
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.rules import ASAM, CSAM, GSAM, SAM, LookSAM, MomentumSAM, Rule
from flatcal_dist.sharpness.step import SharpnessAwareStep, StepResult

__all__ = [
    "ASAM", "CSAM", "GSAM", "SAM", "Engine", "LookSAM", "MomentumSAM", "ReplicatedEngine", "Rule",
    "SharpnessAwareStep", "StepError", "StepResult",
]  # fmt: skip
