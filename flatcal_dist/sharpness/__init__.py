"""Sharpness-aware training: rules (the mathematics), the step (the order), and engines."""

from typing import TYPE_CHECKING

from flatcal_dist.lazy import names_of

if TYPE_CHECKING:
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

__getattr__ = names_of(
    __name__,
    {
        "sharpness.engines.base": "Engine",
        "sharpness.engines.replicated": "ReplicatedEngine",
        "sharpness.errors": "StepError",
        "sharpness.result": "StepResult",
        "sharpness.rules": "ASAM CSAM FriendlySAM FunctionalSAM GSAM LESAM "
        "LookSAM MomentumSAM Rule SAM SSAM StaleSAM WSAM",
        "sharpness.step": "SharpnessAwareStep",
    },
)

__all__ = [
    "ASAM", "CSAM", "GSAM", "LESAM", "SAM", "SSAM", "WSAM", "Engine", "FriendlySAM",
    "FunctionalSAM", "LookSAM", "MomentumSAM", "ReplicatedEngine", "Rule", "SharpnessAwareStep",
    "StaleSAM", "StepError", "StepResult",
]  # fmt: skip
