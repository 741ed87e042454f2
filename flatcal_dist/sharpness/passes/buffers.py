"""Buffers of a network by module and name: as they were at a moment, and the same on all ranks.

A forward pass may change a buffer in its memory, or bind its name to another tensor. A buffer may
begin as None, change its shape, and share memory with others or within itself (expand, slices).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BufferState:
    """The buffers of these modules now: which tensors they are, and what is in them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.held = [(module, dict(module._buffers)) for module in modules]
        self.buffers = [b for _, own in self.held for b in own.values() if b is not None]
        # The same memory, seen in the same way; a sparse tensor has no one memory.
        self.views = [b.detach() if _has_strides(b) else b for b in self.buffers]
        self.memory = [_as_stored(distinct_memory(view)) for view in self.views]
        self.values = [memory.clone() for memory in self.memory]

    @torch.no_grad()
    def restore(self) -> None:
        """Bind every name to the tensor that it had, with the values that the tensor had."""
        for module, own in self.held:
            now = module._buffers
            if now.keys() != own.keys() or any(now[name] is not own[name] for name in own):
                now.clear()
                now.update(own)
        for buffer, view in zip(self.buffers, self.views, strict=True):
            if _has_strides(view) and not buffer.is_set_to(view):  # resized, or given other data
                buffer.data = view
        if self.memory:
            torch._foreach_copy_(self.memory, self.values)


def distinct_memory(tensor: Tensor) -> Tensor:
    """Return a view that holds each element of the tensor's memory once, so that it can be written.

    For an expanded tensor the view is one copy, and for overlapping windows it is their whole
    range. Any other tensor is returned as it is.
    """
    if not _has_strides(tensor) or tensor.is_contiguous():
        return tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            return tensor.as_strided((last + 1,), (1,))
        reach += (size - 1) * stride
    return tensor


def _as_stored(tensor: Tensor) -> Tensor:
    """Return the tensor without a conjugation or a sign that torch has yet to carry out."""
    tensor = tensor.conj() if tensor.is_conj() else tensor
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def _has_strides(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


@torch.no_grad()
def set_buffers(module: nn.Module, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the buffers of these names these values. Buffers may have another shape before.

    Args:
        module: The network.
        values: Values by name. Buffers of other names are left alone.
        device: Where new buffers are put.
    """
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, buffer in list(part._buffers.items()):
            value = values.get(f"{prefix}.{name}" if prefix else name)
            if value is None:
                continue
            if buffer is not None and buffer.shape == value.shape:
                _write(buffer.detach(), value)
            else:
                part._buffers[name] = value.to(device, copy=True)


def broadcast_buffers(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give all ranks of the group (None: all that run) the buffers of its first one.

    A buffer that is None, or has another shape, on another rank becomes what it is on the first.
    """
    places = {
        f"{prefix}.{name}" if prefix else name: (part, name)
        for prefix, part in module.named_modules()
        for name in part._buffers
    }
    now = {key: part._buffers[name] for key, (part, name) in places.items()}
    kinds = {key: b if b is None else (b.shape, b.dtype) for key, b in now.items()}
    of_first = [kinds]
    dist.broadcast_object_list(of_first, group=group, group_src=0)
    present = [b for b in now.values() if b is not None]
    device = next(t.device for t in (*present, *module.parameters()))
    for key, kind in of_first[0].items():
        if kind == kinds.get(key):
            continue
        part, name = places[key]
        empty = kind and torch.empty(kind[0], dtype=kind[1], device=device)
        part._buffers[name] = now[key] = empty
    broadcast([now[key] for key, kind in of_first[0].items() if kind], group)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give all ranks of the group (None: all that run) the tensors of its first one, in place.

    A collective takes no notice of strides, so contiguous copies are sent. Not every backend knows
    every type of numbers, so bytes are sent.
    """
    for tensor in tensors:
        if _has_strides(tensor):
            whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
            if whole.numel():
                dist.broadcast(whole.view(-1).view(torch.uint8), group=group, group_src=0)
            if whole.data_ptr() != tensor.data_ptr():
                _write(tensor.detach(), whole)
        else:  # sparse or quantised: rare, and small
            first = [tensor]
            dist.broadcast_object_list(first, group=group, group_src=0)
            tensor.copy_(first[0])


def _write(tensor: Tensor, value: Tensor) -> None:
    """Copy values, as copy_, even if several elements of the tensor share memory."""
    if distinct_memory(tensor) is tensor:
        tensor.copy_(value)
        return
    for own, part in zip(tensor, value, strict=True):
        _write(own, part)
