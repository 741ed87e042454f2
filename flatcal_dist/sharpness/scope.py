"""The ranks whose gradient perturbs: the scope of m-sharpness."""

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
    """Groups of `ranks` consecutive ranks that perturb together.

    `everyone` says that there is one group of all ranks.
    """

    name: str
    ranks: int
    everyone: bool
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def of(cls, scope: str | int, world_size: int) -> "Scope":
        """Return the scope of this name or number, with its group. Called by all ranks."""
        ranks = ranks_of(scope, world_size)
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


def ranks_of(scope: str | int, world_size: int) -> int:
    """Return how many ranks perturb together in a scope: "global", "rank", "node", or a number.

    Raises StepError for another name, for groups that do not divide the world, and for nodes whose
    size is not known or not the same everywhere.
    """
    if scope == "node":
        ranks = _ranks_of_a_node(world_size)
    elif isinstance(scope, int):
        ranks = scope
    else:
        ranks = {"global": world_size, "rank": 1}.get(scope, 0)
    if ranks < 1:
        raise StepError(
            f"scope must be one of global, rank, node or a number of ranks, not {scope!r}"
        )
    if world_size % ranks:
        raise StepError(
            f"scope {scope!r} makes groups of {ranks} ranks, which do not divide the "
            f"{world_size} ranks that run; choose a divisor, or scope 'global' or 'rank'"
        )
    return ranks


def _ranks_of_a_node(world_size: int) -> int:
    if world_size == 1:
        return 1
    sizes: list[str | None] = [os.environ.get("LOCAL_WORLD_SIZE")] * world_size
    if dist.is_initialized():
        dist.all_gather_object(sizes, sizes[0])
    if sizes[0] is None or len(set(sizes)) > 1:
        raise StepError(
            f"scope 'node' needs LOCAL_WORLD_SIZE, the same on every rank, and found {set(sizes)}: "
            "launchers set it, and under srun you export it; or give the number of ranks as scope"
        )
    return int(sizes[0])


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
