"""The rules: where the descent gradient is taken, of which loss, and how it is changed."""

from flatcal_dist.sharpness.rules.asam import ASAM
from flatcal_dist.sharpness.rules.base import (
    Context,
    Loss,
    Memory,
    Rule,
    Shards,
    dot,
    squared_norm,
)
from flatcal_dist.sharpness.rules.csam import CSAM
from flatcal_dist.sharpness.rules.gsam import GSAM
from flatcal_dist.sharpness.rules.looksam import LookSAM
from flatcal_dist.sharpness.rules.momentum_sam import MomentumSAM
from flatcal_dist.sharpness.rules.sam import SAM

__all__ = [
    "ASAM",
    "CSAM",
    "GSAM",
    "SAM",
    "Context",
    "LookSAM",
    "Loss",
    "Memory",
    "MomentumSAM",
    "Rule",
    "Shards",
    "dot",
    "squared_norm",
]  # fmt: skip
