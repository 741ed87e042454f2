"""Running statistics of norm layers, estimated again for weights that are an average.

An average of weights is another network. The running statistics that training leaves behind
describe the activations of other weights, so the averaged network is evaluated with the wrong
means and variances (Izmailov et al., UAI 2018, section 3.2).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from flatcal_dist.networks.evaluation_mode import in_evaluation_mode

STATISTICS = ("running_mean", "running_var")
MOMENTUM = "momentum"  # an attribute of the layers, a number or None

Statistics = dict[str, Tensor]  # by the buffer's name in the network, float32


def norm_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a network, by name, whose statistics a pass in training mode changes.

    They are the modules in training mode with a buffer `running_mean` or `running_var` and an
    attribute `momentum`: batch norm of torch, SyncBatchNorm, instance norm with statistics, and
    layers of other libraries that follow torch. A frozen layer (in evaluation mode, or with a
    momentum of 0) keeps its statistics and is not among them.
    """
    return {name: m for name, m in network.named_modules() if _is_norm(m) and not _is_frozen(m)}


def has_statistics(network: nn.Module) -> bool:
    """Return whether any layer keeps running statistics, frozen or not."""
    return any(_is_norm(module) for module in network.modules())


def _is_norm(module: nn.Module) -> bool:
    momentum = getattr(module, MOMENTUM, "none")
    return bool(_buffers(module)) and (momentum is None or isinstance(momentum, int | float))


def _is_frozen(module: nn.Module) -> bool:
    # Instance norm takes None for 0, where batch norm takes it for a plain average of all batches.
    momentum = getattr(module, MOMENTUM)
    never = momentum == 0 or (isinstance(module, _InstanceNorm) and momentum is None)
    return bool(never) or not module.training


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    found = {name: module._buffers.get(name) for name in STATISTICS}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def statistics_of(layers: dict[str, nn.Module]) -> Statistics:
    """Return the buffers themselves, in the order of the network."""
    return {
        f"{layer}.{name}" if layer else name: buffer
        for layer, module in layers.items()
        for name, buffer in _buffers(module).items()
    }


@torch.no_grad()
def reestimate(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, bool]],
    ranks: int,
) -> Statistics:
    """Return statistics of the layers' inputs over all batches of all ranks.

    The network stays as it is. A batch norm gets mean and unbiased variance over all values that
    passed through it, combined from the batches by counts (Wu and Johnson, 2021, arXiv 2105.07576,
    section 3). Other layers get the mean of what each batch gave them, weighted by its samples. A
    layer that no batch reached keeps its statistics. Within a batch the layers normalize as in
    training. All other modules are in evaluation mode, as they will be when the statistics are
    used: dropout is off, and other buffers are not touched. The result has the same bits for any
    number of ranks that take the same batches in turn.

    Args:
        model: The module that is called, with inputs [N, ...].
        layers: The layers of the network within `model`, as `norm_layers` gives them.
        batches: The batches of this rank: inputs, and whether they count. Every rank has as many,
            and surplus batches do not count.
        ranks: The number of ranks that take part. It is 1 also where each rank has another network.

    Returns:
        Statistics by buffer name, on the device of the layers.
    """
    if not layers:
        return {}
    sums = Sums(layers)
    total = sums.take(counts=False)
    # A compiled network runs as it is written: it would not notice the hooks.
    with _collecting(model, sums), torch.compiler.set_stance("force_eager"):
        for inputs, counts in batches:
            model(inputs)
            # In the order of the batches, which the ranks take in turn.
            for part in _of_all_ranks(sums.take(counts), ranks):
                total = total + part
    return sums.statistics(total)


def _of_all_ranks(part: Tensor, ranks: int) -> list[Tensor]:
    if ranks == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(ranks)]
    dist.all_gather(parts, part)
    return parts


class Sums:
    """What the layers saw since `take`: a count for each layer, and sums of its buffers' sizes."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.sizes = {n: [b.numel() for b in _buffers(m).values()] for n, m in layers.items()}
        self.device = next(iter(statistics_of(layers).values())).device
        self._clear()

    def _clear(self) -> None:
        self.sums = {
            name: [
                torch.zeros(size, dtype=torch.float64, device=self.device) for size in (1, *sizes)
            ]
            for name, sizes in self.sizes.items()
        }

    def add(self, name: str, inputs: Tensor) -> None:
        """Add a batch, whose statistics a forward pass with momentum 1 has left in the buffers."""
        layer = self.layers[name]
        count = _values_per_channel(layer, inputs)
        if not count:
            return  # of an empty batch they are NaN
        values = [buffer.double().flatten() for buffer in _buffers(layer).values()]
        if _pools(layer):
            mean, variance = values
            parts = [mean * count, variance * (count - 1) + mean.square() * count]
        else:
            parts = [value * count for value in values]
        self.sums[name][0] += count
        for held, part in zip(self.sums[name][1:], parts, strict=True):
            held += part

    def take(self, counts: bool) -> Tensor:
        """Return the sums as one vector, of zeros unless they count, and begin at zero again."""
        flat = torch.cat([part for parts in self.sums.values() for part in parts])
        self._clear()
        return flat if counts else torch.zeros_like(flat)

    def statistics(self, total: Tensor) -> Statistics:
        """Return statistics from the sum of such vectors.

        A layer that saw nothing keeps its statistics.
        """
        found = {n: b.detach().float().clone() for n, b in statistics_of(self.layers).items()}
        for name, layer in self.layers.items():
            sizes = (1, *self.sizes[name])
            count, *parts = total[: sum(sizes)].split(sizes)
            total = total[sum(sizes) :]
            if not count:
                continue
            values = [part / count for part in parts]
            if _pools(layer):
                mean, square = values
                biased = (square - mean.square()).clamp(min=0)
                values[1] = biased * count / (count - 1).clamp(min=1)
            for key, value in zip(statistics_of({name: layer}), values, strict=True):
                found[key] = value.to(found[key].dtype).view_as(found[key])
        return found


def _pools(layer: nn.Module) -> bool:
    """Return whether mean and variance are taken over all values of a channel.

    Counts then combine the batches.
    """
    return isinstance(layer, _BatchNorm) and len(_buffers(layer)) == 2


def _values_per_channel(layer: nn.Module, inputs: Tensor) -> int:
    """Return the number of values of each channel of a batch norm's input [N, C, ...].

    For another layer it is the number of samples.
    """
    if not isinstance(layer, _BatchNorm):
        return len(inputs)
    return math.prod(inputs.shape) // max(inputs.shape[1], 1)


@contextmanager
def _collecting(model: nn.Module, sums: Sums) -> Iterator[None]:
    """Let `sums` see each batch's statistics, with all but the layers in evaluation mode."""
    layers = sums.layers
    kept = {name: copy_of_buffers(layer) for name, layer in layers.items()}
    momenta = {name: getattr(layer, MOMENTUM) for name, layer in layers.items()}

    def seen(name: str) -> Callable:
        return lambda _, inputs, named, __: sums.add(name, [*inputs, *named.values()][0])

    hooks = [m.register_forward_hook(seen(n), with_kwargs=True) for n, m in layers.items()]
    # SyncBatchNorm as batch norm: which samples meet must not depend on the number of ranks.
    alone = mock.patch.object(nn.SyncBatchNorm, "forward", _BatchNorm.forward)
    try:
        with in_evaluation_mode(model), alone:
            for layer in layers.values():
                layer.training = True
                setattr(layer, MOMENTUM, 1.0)
                if isinstance(layer, _BatchNorm | _InstanceNorm):  # 0 * inf would not forget
                    for buffer in _buffers(layer).values():
                        buffer.zero_()
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            setattr(layer, MOMENTUM, momenta[name])
            restore_buffers(layer, kept[name])


def copy_of_buffers(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each buffer of a module, without its children, and a copy of its values, by name."""
    return {n: (b, b.clone()) for n, b in module._buffers.items() if b is not None}


@torch.no_grad()
def restore_buffers(module: nn.Module, kept: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Give a module the buffers and the values that `copy_of_buffers` found."""
    for name, (buffer, values) in kept.items():
        buffer.copy_(values)
        module._buffers[name] = buffer
