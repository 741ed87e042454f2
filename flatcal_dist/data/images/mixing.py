"""Mixup and cutmix of pairs, on the device, the same on any number of ranks.

Partners are neighbours in the global batch, the samples at places 2i and 2i + 1 of it. Its order is
a random one, so they are as good as any drawn at random; and as long as every micro-batch holds an
even number of samples, a pair never falls apart between two ranks or micro-batches. What a pair
draws follows from (seed, epoch, its first sample) alone. So N ranks with batch B mix as one rank
with N x B does, bit for bit in the draws, and a resumed run mixes as if it had not stopped. Both
passes of a sharpness-aware step see the images that were mixed once, before it.

Each pair draws for itself (timm's mode "pair"), which varies less from step to step than one draw
for a whole batch does. Targets become probabilities [N, K]; label smoothing is the loss's. An
accuracy on mixed images says little: train/loss is reported, accuracy on clean images only.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.special import betaincinv
from torch import Tensor
from torch.nn.functional import one_hot

from flatcal_dist.choices import check
from flatcal_dist.data.order import sample_seed

Alpha = Annotated[
    float,
    Field(
        gt=0,
        le=1000,
        description="The parameter of Beta(alpha, alpha), from which the share of the first image "
        "of a pair is drawn.",
    ),
]


@dataclass(frozen=True)
class MixingRule(ABC):
    """How pairs of images are mixed: the keys of the configuration's section `mixing`.

    Raises ValueError for a field outside its bounds.
    """

    name: ClassVar[str]

    probability: Annotated[
        float, Field(ge=0, le=1, description="The probability that a pair of images is mixed.")
    ] = 1.0

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def mixing(self, classes: int) -> "Mixing":
        """For targets of this many classes."""


@dataclass(frozen=True)
class Mixup(MixingRule):
    """mixup (Zhang et al., ICLR 2018): the sum of two images, weighted, and of their targets."""

    name: ClassVar[str] = "mixup"

    alpha: Alpha = 0.2

    def mixing(self, classes: int) -> "Mixing":
        return Mixing(classes, mixup=self.alpha, probability=self.probability)


@dataclass(frozen=True)
class CutMix(MixingRule):
    """CutMix (Yun et al., ICCV 2019): a rectangle of one image in the other."""

    name: ClassVar[str] = "cutmix"

    alpha: Alpha = 1.0

    def mixing(self, classes: int) -> "Mixing":
        return Mixing(classes, cutmix=self.alpha, probability=self.probability)


@dataclass(frozen=True)
class MixupCutMix(MixingRule):
    """Each pair is mixed by mixup or by CutMix, with equal probability, as in DeiT."""

    name: ClassVar[str] = "mixup_cutmix"

    mixup_alpha: Alpha = 0.8
    cutmix_alpha: Alpha = 1.0

    def mixing(self, classes: int) -> "Mixing":
        return Mixing(classes, self.mixup_alpha, self.cutmix_alpha, self.probability)


@dataclass(frozen=True)
class Mixing:
    """mixup (Zhang et al., ICLR 2018) or cutmix (Yun et al., ICCV 2019), half and half where both.

    mixup, cutmix: alpha of Beta(alpha, alpha), from which the share of the first image is drawn; 0
    leaves it out. probability: that a pair is mixed at all.
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    def __call__(
        self, images: Tensor, labels: Tensor, samples: Tensor, seed: int, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Images float [N, C, H, W] and labels [N] to mixed images and targets [N, K] float32.

        samples: their numbers [N], on the CPU. Raises ValueError for an odd N.
        """
        if len(samples) % 2:
            raise ValueError(f"mixing needs an even number of images, got {len(samples)}")
        height, width = images.shape[2:]
        boxes, shares = self.draw(samples[::2].tolist(), seed, epoch, height, width)
        # Of each pixel, the share of the pair's own image: shares outside the box, 0 inside.
        top, bottom, left, right = boxes.repeat_interleave(2, 1).to(images.device)
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
        inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
        inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
        own = shares.repeat_interleave(2).to(images.device)
        is_box = (bottom > top) & (right > left)
        pixels = torch.where(is_box[:, None, None, None], ~inside, own[:, None, None, None])
        partner = torch.arange(len(samples), device=images.device) ^ 1
        mixed = torch.lerp(images[partner], images, pixels.to(images.dtype))
        target = one_hot(labels, self.classes).float()
        return mixed, torch.lerp(target[partner], target, own[:, None].float())

    def draw(
        self, firsts: list[int], seed: int, epoch: int, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Of pairs: box [4, n] (top, bottom, left, right; zeros: none), own share [n] float64."""
        uniform = _uniform([sample_seed(seed, epoch, first) for first in firsts], 5)
        mixes = uniform[0] < self.probability
        cuts = mixes & (uniform[1] < self._cutmix_share())
        alpha = np.where(cuts, self.cutmix, self.mixup)
        share = np.where(mixes, betaincinv(alpha, alpha, uniform[2]), 1.0)
        # A box of relative area 1 - share around a uniform centre, cut off at the borders.
        side = np.where(cuts, np.sqrt(1 - share), 0.0)
        boxes = []
        for length, centre in ((height, uniform[3]), (width, uniform[4])):
            half = np.floor(length * side).astype(np.int64) // 2
            middle = np.floor(length * centre).astype(np.int64)
            boxes += [np.clip(middle - half, 0, length), np.clip(middle + half, 0, length)]
        top, bottom, left, right = boxes
        area = (bottom - top) * (right - left)
        share = np.where(cuts, 1 - area / (height * width), share)
        return torch.from_numpy(np.stack(boxes) * (area > 0)), torch.from_numpy(share)

    def _cutmix_share(self) -> float:
        return 0.5 if self.mixup and self.cutmix else float(self.cutmix > 0)


def _uniform(seeds: list[int], count: int) -> np.ndarray:
    """[count, n] numbers in (0, 1): outputs of splitmix64, another stream than the crops'."""
    states = np.array(seeds, np.uint64) ^ np.uint64(0x9A3C5B17D4E8F261)
    numbers = []
    for _ in range(count):
        states = states + np.uint64(0x9E3779B97F4A7C15)
        x = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers.append((((x ^ (x >> np.uint64(31))) >> np.uint64(11)) + 0.5) / 2.0**53)
    return np.stack(numbers)
