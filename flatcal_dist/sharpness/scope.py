"""Whose gradient perturbs: the scope of m-sharpness over ranks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from flatcal_dist.sharpness.errors import StepError

BUCKET = 64 * 2**20  # bytes of one reduction


@dataclass(frozen=True)
class Scope:
    """Consecutive groups of `ranks` ranks perturb together; `everyone` when that is all of them."""

    name: str
    ranks: int
    everyone: bool
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def of(cls, scope: str | int, world_size: int) -> "Scope":
        """From "global", "rank", "node" or a number of ranks.

        Raises StepError for another name, or groups that do not divide the world.
        """
        sizes = {
            "global": world_size,
            "rank": 1,
            "node": int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        }
        ranks = scope if isinstance(scope, int) else sizes.get(scope)
        if ranks is None or ranks < 1:
            raise StepError(
                f"scope must be one of {', '.join(sizes)} or a number of ranks, not {scope!r}"
            )
        if world_size % ranks:
            raise StepError(
                f"scope {scope!r} makes groups of {ranks} ranks, which do not divide the "
                f"{world_size} ranks that run; choose a divisor, or scope 'global' or 'rank'"
            )
        between = 1 < ranks < world_size
        group = dist.new_subgroups(ranks)[0] if between else None
        return cls(str(scope), ranks, ranks == world_size, group)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the ranks of this rank's group, in place."""
        if self.ranks == 1 or not dist.is_initialized():
            return
        for bucket in _buckets(tensors):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat, group=self.group)
            for tensor, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                tensor.copy_(summed)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size > BUCKET or (buckets[-1] and buckets[-1][0].dtype != tensor.dtype):
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel() * tensor.element_size()
    return [bucket for bucket in buckets if bucket]
