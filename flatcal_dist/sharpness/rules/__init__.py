"""The rules: where the descent gradient is taken, of which loss, and how it is changed."""

from flatcal_dist.sharpness.rules.asam import ASAM
from flatcal_dist.sharpness.rules.base import (
    AscentRule,
    Context,
    Loss,
    Memory,
    Rule,
    Shards,
    dot,
    squared_norm,
)
from flatcal_dist.sharpness.rules.csam import CSAM
from flatcal_dist.sharpness.rules.friendly_sam import FriendlySAM
from flatcal_dist.sharpness.rules.functional_sam import FunctionalSAM
from flatcal_dist.sharpness.rules.gsam import GSAM
from flatcal_dist.sharpness.rules.le_sam import LESAM
from flatcal_dist.sharpness.rules.looksam import LookSAM
from flatcal_dist.sharpness.rules.momentum_sam import MomentumSAM
from flatcal_dist.sharpness.rules.sam import SAM
from flatcal_dist.sharpness.rules.ssam import SSAM
from flatcal_dist.sharpness.rules.stale_sam import StaleSAM
from flatcal_dist.sharpness.rules.wsam import WSAM

__all__ = [
    "ASAM",
    "CSAM",
    "GSAM",
    "LESAM",
    "SAM",
    "SSAM",
    "WSAM",
    "AscentRule",
    "Context",
    "FriendlySAM",
    "FunctionalSAM",
    "LookSAM",
    "Loss",
    "Memory",
    "MomentumSAM",
    "Rule",
    "Shards",
    "StaleSAM",
    "dot",
    "squared_norm",
]  # fmt: skip
