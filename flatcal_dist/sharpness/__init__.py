"""Sharpness-aware training: rules (the mathematics), the step (the order), and engines."""

from flatcal_dist.sharpness.engines.base import Engine
from flatcal_dist.sharpness.engines.replicated import ReplicatedEngine
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.result import StepResult
from flatcal_dist.sharpness.rules import (
    ASAM,
    CSAM,
    GSAM,
    LESAM,
    SAM,
    SSAM,
    WSAM,
    FriendlySAM,
    FunctionalSAM,
    LookSAM,
    MomentumSAM,
    Rule,
    StaleSAM,
)
from flatcal_dist.sharpness.step import SharpnessAwareStep

__all__ = [
    "ASAM", "CSAM", "GSAM", "LESAM", "SAM", "SSAM", "WSAM", "Engine", "FriendlySAM",
    "FunctionalSAM", "LookSAM", "MomentumSAM", "ReplicatedEngine", "Rule", "SharpnessAwareStep",
    "StaleSAM", "StepError", "StepResult",
]  # fmt: skip
