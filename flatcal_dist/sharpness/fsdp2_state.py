"""State of a rank of FSDP2: shards as plain tensors, and shards made of them again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """In the order of the indices in its state_dict."""
    return [w for group in optimizer.param_groups for w in group["params"]]


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def copy_into(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    shapes = [{n: tuple(t.shape) for n, t in tensors.items()} for tensors in (own, saved)]
    if shapes[0] != shapes[1]:
        raise ValueError("the state is of another network: names or shapes differ")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def split(state: dict[str, Any], weight: DTensor) -> dict[str, dict[str, Any]]:
    """Optimizer state of one parameter: what is sharded as it is, and the rest."""
    sharded, rest = {}, {}
    for key, value in state.items():
        if isinstance(value, DTensor):
            if value.shape != weight.shape or value.placements != weight.placements:
                raise ValueError(f"the optimizer's {key!r} is not sharded as its parameter is")
            sharded[key] = copied(value.to_local())
        else:
            rest[key] = copied(value) if isinstance(value, Tensor) else value
    return {"sharded": sharded, "rest": rest}


def join(state: dict[str, dict[str, Any]], weight: DTensor) -> dict[str, Any]:
    sharded = {
        key: DTensor.from_local(
            value.to(weight.to_local().device),
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )
        for key, value in state["sharded"].items()
    }
    return sharded | state["rest"]
