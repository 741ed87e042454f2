"""Networks whose forward pass reads or changes more than weights: [N, 6] -> logits [N, CLASSES].

Each is a function of weights, buffers and torch's random state; that is what two passes share.
"""

from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.support.reference import CLASSES

WIDTH = 16


def between(*middle: nn.Module) -> nn.Sequential:
    """A layer, these, and a head that is sure of some samples."""
    return nn.Sequential(nn.Linear(6, WIDTH), *middle, nn.Tanh(), head())


def head() -> nn.Linear:
    layer = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        layer.weight.mul_(6)
    return layer


# Norm layers


def batch_norm(momentum: float | None) -> nn.Module:
    return between(nn.BatchNorm1d(WIDTH, momentum=momentum), nn.Dropout(0.2))


class Renorm(nn.Module):
    """Batch renormalization (Ioffe, 2017): the running statistics enter the training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("deviation", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.mean.dtype)  # which autocast made less precise
        mean, deviation = x.mean(0), x.std(0) + 1e-3
        r = (deviation / self.deviation).clamp(0.3, 3).detach()
        d = ((mean - self.mean) / self.deviation).clamp(-5, 5).detach()
        with torch.no_grad():
            self.mean.lerp_(mean, 0.2)
            self.deviation.lerp_(deviation, 0.2)
        return (x - mean) / deviation * r + d


class Planes(nn.Module):
    """A network of images of 4 x 4 with a channel for each input."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body, nn.Flatten(), head())

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(0.5, 1.5, 16).view(4, 4).sin()
        return self.body((x[:, :, None, None] * ramp).contiguous())


def instance_norm() -> nn.Module:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    return Planes(nn.Conv2d(6, 4, 3, padding=1), norm, nn.GELU(), nn.AdaptiveAvgPool2d(2))


def fixed_norm(frozen: bool) -> nn.Module:
    network = batch_norm(0.1)
    network[1].eval()
    with torch.no_grad():
        network[1].running_mean.uniform_(-0.1, 0.1)
    network[1].requires_grad_(not frozen)
    return network


# Weights that are computed from others


def normed(norm) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(6, WIDTH)), nn.Tanh(), between_same(norm), head())


def between_same(norm) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


# Buffers of odd kinds


class Statistic(nn.Module):
    """Keeps a mean of what it sees, and subtracts it; how it is kept is a subclass's matter."""

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.read()
        with torch.no_grad():
            self.keep(x.detach().mean(0))
        return out


class Rebound(Statistic):
    """The names of its buffers are bound to new tensors, as users often write it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros(()))

    def read(self):
        return self.mean * (1 + 0.1 * self.count)

    def keep(self, mean):
        self.mean = 0.8 * self.mean + 0.2 * mean
        self.count = self.count + 1


class StartsAsNone(Statistic):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def read(self):
        return 0 if self.mean is None else self.mean

    def keep(self, mean):
        self.mean = mean if self.mean is None else 0.8 * self.mean + 0.2 * mean


class Grows(Statistic):
    """One row more in each pass, up to four."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, WIDTH))

    def read(self):
        return self.rows.sum(0) / 4

    def keep(self, mean):
        self.rows = torch.cat([self.rows, mean[None]])[-4:]


class Resized(Grows):
    """As Grows, in the memory of one tensor."""

    def keep(self, mean):
        rows = torch.cat([self.rows, mean[None]])[-4:]
        self.rows.resize_(rows.shape).copy_(rows)


class OtherData(Grows):
    """As Grows, by assignment to `data`."""

    def keep(self, mean):
        self.rows.data = torch.cat([self.rows, mean[None]])[-4:]


class Sliced(Statistic):
    """Every other number of some memory; the numbers between them belong to another buffer."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.zeros(WIDTH, 2)
        self.register_buffer("mean", both[:, 0])
        self.register_buffer("count", both[:, 1])

    def read(self):
        return self.mean / (1 + self.count)

    def keep(self, mean):
        self.mean.lerp_(mean, 0.2)
        self.count += 1


class Expanded(Statistic):
    """One number that is seen as many."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(1).expand(WIDTH))

    def read(self):
        return self.one

    def keep(self, mean):
        self.one[:1].lerp_(mean[:1], 0.5)


class OfManyTypes(Statistic):
    """Whole, boolean and complex numbers; some not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(WIDTH, dtype=torch.bool))
        self.register_buffer("wave", torch.ones(WIDTH, dtype=torch.complex64), persistent=False)
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def read(self):
        return torch.where(self.flags, self.mean, self.wave.imag) * (1 + 0.1 * self.calls)

    def keep(self, mean):
        self.calls += 1
        self.flags.logical_xor_(mean > 0)
        self.wave.mul_(1j)
        self.mean.copy_(mean)


class MadeInForward(Statistic):
    """Its buffer is registered in the first pass."""

    def read(self):
        return self.mean if "mean" in self._buffers else 0

    def keep(self, mean):
        if "mean" in self._buffers:
            self.mean.lerp_(mean, 0.2)
        else:
            self.register_buffer("mean", mean)


class Codebook(nn.Module):
    """Vector quantization with codes that are moving averages (van den Oord et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(8, WIDTH))
        self.register_buffer("sizes", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            own = F.one_hot(torch.cdist(x, self.codes).argmin(1), 8).float()
            near = own @ self.codes
            self.sizes.lerp_(own.sum(0), 0.2)
            self.codes.lerp_(own.T @ x / (1 + self.sizes[:, None]), 0.2)
        return x + 0.5 * (near - x).detach()


class Queue(nn.Module):
    """The last samples, in a ring (as MoCo's), are attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ring", torch.randn(20, WIDTH))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        ring = self.ring.clone()  # autograd keeps it
        out = x + (x @ ring.T / 4).softmax(1) @ ring
        with torch.no_grad():
            self.ring[(self.place + torch.arange(len(x))) % 20] = x.detach()
            self.place += len(x)
        return out


# Structure


class Checkpointed(nn.Module):
    """Its block runs again in the backward pass, and counts its statistics again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.head, self.reentrant = nn.Linear(6, WIDTH), head(), reentrant
        norm = nn.BatchNorm1d(WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.GELU(), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        return self.head(x)


class ViT(nn.Module):
    """timm's, with drop path and layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=8, patch_size=4, in_chans=1, embed_dim=12, depth=2, num_heads=2,
            num_classes=CLASSES, init_values=0.5, drop_path_rate=0.2, proj_drop_rate=0.1,
        )  # fmt: skip
        self.register_buffer("mixer", torch.randn(6, 64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x @ self.mixer).view(-1, 1, 8, 8)) * 3


def shared_module() -> nn.Module:
    """One layer at two places, with a norm whose statistics count at each.

    With the usual eps two norms of few samples amplify rounding: the reference in float32 is then
    5e-6 from itself in float64.
    """
    shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, eps=0.1), nn.Tanh())
    return between(shared, shared)


def tied() -> nn.Module:
    network = between(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    network[3].weight = network[1].weight
    return network


ZOO = {
    "batch norm, plain average": partial(batch_norm, None),
    "renorm": lambda: between(Renorm()),
    "instance norm with statistics": instance_norm,
    "norm in eval mode": partial(fixed_norm, False),
    "frozen norm": partial(fixed_norm, True),
    "spectral norm, old": partial(normed, nn.utils.spectral_norm),
    "spectral norm": partial(normed, parametrizations.spectral_norm),
    "weight norm, old": partial(normed, nn.utils.weight_norm),
    "weight norm": partial(normed, parametrizations.weight_norm),
    "rebound": lambda: between(Rebound()),
    "starts as None": lambda: between(StartsAsNone()),
    "grows": lambda: between(Grows()),
    "resized": lambda: between(Resized()),
    "other data": lambda: between(OtherData()),
    "sliced": lambda: between(Sliced()),
    "expanded": lambda: between(Expanded()),
    "of many types": lambda: between(OfManyTypes()),
    "made in forward": lambda: between(MadeInForward()),
    "codebook": lambda: between(Codebook()),
    "queue": lambda: between(Queue()),
    "checkpointed": partial(Checkpointed, False),
    "checkpointed, reentrant": partial(Checkpointed, True),
    "ViT": ViT,
    "shared module": shared_module,
    "tied": tied,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name]()


# Of these the first batches would have a sample at CSAM's jump, which the reference refuses.
OTHER_BATCHES = {"tied": 10}


def batches(name: str) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Those that a network is trained on, by number."""
    return partial(_batch, 500 + OTHER_BATCHES.get(name, 0))


def _batch(seed: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + number)
    inputs = torch.randn(24, 6, generator=generator)
    return inputs, torch.randint(CLASSES, (24,), generator=generator)
