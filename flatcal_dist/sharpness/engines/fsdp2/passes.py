"""What passes of FSDP2 leave in places that are not public: gradients, and interrupted passes.

A backward pass that does not reduce leaves its whole gradient inside FSDP2, and the next one adds
to it. A pass that an exception ends leaves blocks gathered and FSDP2 amid a pass. Since version
2.13 torch has `reset_iter_state`, which ends the pass and (up to 2.14 at least) keeps the
gradients. So this module reads private attributes of torch.distributed.fsdp. It was checked with
torch 2.11 and 2.14.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from flatcal_dist.sharpness.errors import StepError

STREAMS = ("all_gather_copy_in", "all_gather", "reduce_scatter", "all_reduce")


def forget_gradients(network: nn.Module) -> None:
    """Drop the whole gradients of backward passes that were not reduced."""
    for group in _groups(network):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


def end_passes(network: nn.Module) -> None:
    """Clean up after an exception amid a pass: no block is gathered, the next pass is a new one."""
    if not isinstance(network, FSDPModule):
        return
    root = network._get_fsdp_state()
    if root._is_root is None:  # no pass has begun yet
        return
    if hasattr(network, "reset_iter_state"):
        network.reset_iter_state()
    else:
        _reset(network, root)


def refuse_unknown(network: nn.Module) -> None:
    """Raise StepError for a torch whose FSDP2 is laid out in another way."""
    try:
        parameters = [p for group in _groups(network) for p in group.fsdp_params]
        known = all(hasattr(p, "unsharded_accumulated_grad") for p in parameters)
    except AttributeError:
        known = False
    if not known:
        raise StepError(
            f"FSDP2 of torch {torch.__version__} keeps gradients in a place that is not known "
            "here: use the torch that launch/constraints.txt names, or DDP"
        )


def _groups(network: nn.Module) -> Iterator[Any]:
    """Yield FSDP2's groups of parameters that are gathered together."""
    for state in _states(network):
        if hasattr(state, "_fsdp_param_groups"):  # since torch 2.12
            yield from state._fsdp_param_groups
        elif state._fsdp_param_group is not None:
            yield state._fsdp_param_group


def _states(network: nn.Module) -> list[Any]:
    """Return FSDP2's state of each block once, the state of the root first."""
    blocks = [m for m in network.modules() if isinstance(m, FSDPModule)]
    return list(dict.fromkeys(block._get_fsdp_state() for block in blocks))


def _reset(network: nn.Module, root: Any) -> None:
    """Do what `reset_iter_state` does, for torch 2.11 and 2.12."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    now, communication = root._device_handle.current_stream(), root._comm_ctx
    for name in STREAMS:
        now.wait_stream(getattr(communication, f"{name}_stream"))
    communication.all_gather_state = communication.reduce_scatter_state = None
    communication.post_forward_order.clear()
    for state in _states(network):
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
    for group in _groups(network):
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._reshard_after_forward_event = None
        group._post_forward_indices.clear()
        group._training_state = TrainingState.IDLE
        group._to_sharded()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
