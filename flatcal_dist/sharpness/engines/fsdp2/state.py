"""The state of a rank of FSDP2: shards as plain tensors, and plain tensors as shards again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flatcal_dist.sharpness.errors import StepError


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, or a tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded(weight: Tensor) -> DTensor:
    """Return a weight as the sharded tensor that it is. Raises StepError for a whole one."""
    if not isinstance(weight, DTensor):
        raise StepError("a weight is whole, where FSDP2 should have sharded it")
    return weight


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters in the order of the indices in the optimizer's state_dict."""
    return [w for group in optimizer.param_groups for w in group["params"]]


def copy_into(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copy saved tensors. Raises StepError where names or shapes differ, before the first copy."""
    shapes = [{n: tuple(t.shape) for n, t in tensors.items()} for tensors in (own, saved)]
    if shapes[0] != shapes[1]:
        raise StepError("the state is of another network: names or shapes differ")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def split(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split the optimizer state of one parameter into this rank's part of shards, and the rest."""
    sharded, rest = {}, {}
    for key, value in state.items():
        if isinstance(value, DTensor):
            sharded[key] = {
                "local": value.to_local().detach(),
                "shape": list(value.shape),
                "stride": list(value.stride()),
                "placement": _plain(key, value.placements[0]),
            }
        else:
            rest[key] = value
    return {"sharded": sharded, "rest": rest}


def join(state: dict[str, dict[str, Any]], weight: DTensor) -> dict[str, Any]:
    """Undo `split`, over the ranks that share the weight."""
    kinds = {"shard": Shard, "replicate": Replicate, "partial": Partial}
    device = weight.to_local().device
    sharded = {}
    for key, value in state["sharded"].items():
        kind, *arguments = value["placement"]
        sharded[key] = DTensor.from_local(
            value["local"].to(device),
            weight.device_mesh,
            [kinds[kind](*arguments)],
            run_check=False,
            shape=torch.Size(value["shape"]),
            stride=tuple(value["stride"]),
        )
    return sharded | state["rest"]


def sharded_like(state: dict[str, Any], weight: DTensor) -> dict[str, Any]:
    """Return the optimizer state of one parameter, in which tensors of this rank are shards."""
    part = weight.to_local()
    return {
        key: DTensor.from_local(
            value.to(part.device),
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape == part.shape
        else value
        for key, value in state.items()
    }


def _plain(key: str, placement: Placement) -> list[Any]:
    if type(placement) is Shard:
        return ["shard", placement.dim]
    if type(placement) is Replicate:
        return ["replicate"]
    if type(placement) is Partial:
        return ["partial", placement.reduce_op]
    raise StepError(f"the optimizer keeps {key!r} as {placement}, which cannot be saved by rank")
