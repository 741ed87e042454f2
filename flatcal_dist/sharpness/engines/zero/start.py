"""DeepSpeed ZeRO around a network, set up for two passes in each step, on GPUs or CPUs."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from flatcal_dist.sharpness.engines.alone import join_alone
from flatcal_dist.sharpness.engines.base import refuse_part
from flatcal_dist.sharpness.engines.optimizer_probe import refuse_flat_parts
from flatcal_dist.sharpness.engines.zero.parts import deepspeed, layout_of
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.networks import refuse_unheld

BUCKET = 2**25  # elements of one gradient reduction; DeepSpeed's 5e8 would be 2 GB of fp32


def start_zero(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int,
    precision: torch.dtype = torch.float32,
    clip_norm: float | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Return DeepSpeed's engine with ZeRO. Every rank gets the weights of rank 0.

    Args:
        network: The network.
        optimizer: An optimizer of torch over the network's parameters. Its state is partitioned.
        stage: The stage of ZeRO, 1, 2 or 3.
        precision: The type of the weights in the forward pass. The master copy, the reduction of
            gradients and their accumulation are fp32. With float16 losses are scaled.
        clip_norm: The largest norm of the gradient, the same that the step gets.

    Raises:
        StepError: There is no such stage or precision, DeepSpeed cannot hold the network, or the
            optimizer would be another algorithm on parts of the weights.
        RuntimeError: float16 cannot run here.
    """
    if stage not in (1, 2, 3):
        raise StepError(f"ZeRO has the stages 1, 2 and 3, not {stage}")
    if precision not in (torch.float32, torch.bfloat16, torch.float16):
        raise StepError(f"precision must be float32, bfloat16 or float16, not {precision}")
    if precision == torch.float16 and not deepspeed.get_accelerator().is_fp16_supported():
        raise RuntimeError(
            "DeepSpeed does not run float16 on this machine; use bfloat16 (CPUs have it) or float32"
        )
    refuse_unheld(network, "DeepSpeed")
    trained = {name: w for name, w in network.named_parameters() if w.requires_grad}
    refuse_part(trained, {id(w) for group in optimizer.param_groups for w in group["params"]})
    shapes = [[tuple(w.shape) for w in group["params"]] for group in optimizer.param_groups]
    refuse_flat_parts(optimizer, shapes, stage)
    join_alone(deepspeed.get_accelerator().communication_backend_name(), "ZeRO")
    with torch.no_grad():
        # ZeRO lays weights out flat, in the order of their rows. Another memory format
        # (channels_last) has no such order; inputs may keep it, and convolutions then use it.
        # `contiguous` would leave the strides of 1 x 1 convolutions as they are.
        for weight in network.parameters():
            if not weight.is_contiguous() or (weight.dim() and weight.stride(-1) != 1):
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    if precision != torch.float32:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                RunningStatisticsInFp32(module, precision)
    exact = {} if precision == torch.float32 else _of_rank_0(network)
    zero, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        config=configuration(stage, precision, clip_norm),
        dist_init_required=False,
    )
    # DeepSpeed copies the master from weights that it has rounded; and a perturbation of weights
    # that are exact in the low precision is rounded away, where others are moved on average.
    for part in layout_of(zero).parts if exact else ():
        whole = exact[part.name].flatten()
        part.master.copy_(whole.narrow(0, part.start, part.master.numel()))
    return zero


def _of_rank_0(network: nn.Module) -> dict[str, Tensor]:
    """Return rank 0's weights in fp32, before DeepSpeed rounds them."""
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    weights = {
        name: weight.detach().to(device, torch.float32, copy=True).contiguous()
        for name, weight in network.named_parameters()
        if weight.requires_grad
    }
    for weight in weights.values():
        dist.broadcast(weight, src=0)
    return weights


def configuration(stage: int, precision: torch.dtype, clip_norm: float | None) -> dict[str, Any]:
    """Return DeepSpeed's configuration. The arguments are those of `start_zero`."""
    return {
        # We count samples and micro-batches ourselves, and say which micro-batch is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm or 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET},
        "bf16": {"enabled": precision == torch.bfloat16},
        "fp16": {
            "enabled": precision == torch.float16,
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,  # every skipped step halves the scale
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


class InPrecision(nn.Module):
    """A network whose inputs are cast to its precision, and its outputs to fp32.

    Tensors of floating-point numbers are cast, also in lists, tuples and mappings.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, precision: torch.dtype) -> None:
        super().__init__()
        self.engine = engine
        self.precision = precision

    def forward(self, *inputs: Any, **named: Any) -> Any:
        inputs, named = recursively_apply(
            lambda tensor: tensor.to(self.precision), (inputs, named), test_type=_is_real
        )
        return recursively_apply(Tensor.float, self.engine(*inputs, **named), test_type=_is_real)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class RunningStatisticsInFp32:
    """Running statistics of a batch norm in fp32, although its weights are not.

    torch needs both in one precision, and averages in bf16 stop moving a percent or two off the
    right value, because a small step towards the batch's statistics is rounded away. So the layer
    averages into zeros, which rounds momentum * batch relative to itself, and the sum is taken
    here.
    """

    def __init__(self, module: nn.modules.batchnorm._BatchNorm, precision: torch.dtype) -> None:
        self.precision = precision
        self.kept: tuple[Tensor, Tensor] | None = None
        module.register_forward_pre_hook(self._lend)
        module.register_forward_hook(self._take_back, always_call=True)

    def _lend(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor, ...]:
        self.kept = _statistics_of(module)
        module.running_mean, module.running_var = (
            torch.zeros_like(k, dtype=self.precision) if module.training else k.to(self.precision)
            for k in self.kept
        )
        return tuple(x.to(self.precision) for x in inputs)  # of a network that casts in between

    def _take_back(self, module: nn.Module, inputs: Any, output: Tensor | None) -> None:
        if self.kept is None:
            return
        lent, kept, self.kept = _statistics_of(module), self.kept, None
        module.running_mean, module.running_var = kept
        if output is None or not module.training:  # None: the layer raised
            return
        momentum: float | None = vars(module)["momentum"]
        if momentum is None:  # a plain average over all batches
            momentum = 1 / float(module.get_buffer("num_batches_tracked"))
        for ours, theirs in zip(kept, lent, strict=True):
            ours.mul_(1 - momentum).add_(theirs)


def _statistics_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.get_buffer("running_mean"), module.get_buffer("running_var")
