"""A network that uses other parts of itself in each pass."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.reference import CLASSES


class LeavesOutABlock(nn.Module):
    """Its second forward pass of a step leaves out a block, none uses `spare`; some is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6).requires_grad_(False)
        self.blocks = nn.ModuleList([nn.Linear(6, 16), nn.Linear(6, 16)])
        self.spare, self.head, self.calls = nn.Linear(6, 6), nn.Linear(16, CLASSES), 0
        self.head.bias.requires_grad_(False)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        x = self.blocks[0](x) + (self.blocks[1](x) if self.calls % 2 else 0)
        return self.head(F.gelu(x)) * 4
