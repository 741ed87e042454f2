"""Mixup and cutmix of pairs of images on the device, the same on any number of ranks.

Partners are the samples at places 2i and 2i + 1 of the global batch. The order of the batch is
random, so these pairs are as good as pairs drawn at random. A pair stays together on one rank and
in one micro-batch as long as every micro-batch holds an even number of samples. The random numbers
of a pair follow from (seed, epoch, its first sample) alone. So N ranks with batch B mix as one rank
with batch N x B does, bit for bit in the random numbers, and a resumed run mixes as if it had not
stopped. Images are mixed once, before both passes of a sharpness-aware step.

Each pair draws its random numbers alone (mode "pair" of timm). This varies less from step to step
than one draw for a whole batch. Targets become probabilities [N, K]. The loss smooths labels. An
accuracy on mixed images says little, so training reports the loss on mixed images, and accuracy on
clean images only.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.special import betaincinv
from torch import Tensor
from torch.nn.functional import one_hot

from flatcal_dist.choices import check
from flatcal_dist.data.order import sample_seed
from flatcal_dist.objectives.targets import Mixed, Targets

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
    """How pairs of images are mixed. The fields are the keys of the section `mixing`.

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
        """Return the mixing for targets of this many classes."""


@dataclass(frozen=True)
class Mixup(MixingRule):
    """mixup (Zhang et al., ICLR 2018) is the weighted sum of two images and of their targets."""

    name: ClassVar[str] = "mixup"

    alpha: Alpha = 0.2

    def mixing(self, classes: int) -> "Mixing":
        return Mixing(classes, mixup=self.alpha, probability=self.probability)


@dataclass(frozen=True)
class CutMix(MixingRule):
    """CutMix (Yun et al., ICCV 2019) puts a rectangle of one image into the other."""

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
class RegMixup(MixingRule):
    """RegMixup (Pinto et al., NeurIPS 2022) trains on clean images, and on mixed ones beside them.

    The loss of an image is the objective of the clean image plus `weight` times the cross-entropy
    of the mixed one, so labels of clean images stay hard, and every objective can be used. A
    forward pass has twice as many images, and batch norm sees both kinds together, as in the
    authors' code (FrancescoPinto/RegMixup). That code takes the mean over both kinds, which is half
    of this loss, and one share for the whole batch.
    """

    name: ClassVar[str] = "regmixup"

    alpha: Alpha = 10.0
    weight: Annotated[
        float, Field(ge=0, le=1000, description="What mixed images weigh beside clean ones.")
    ] = 1.0

    def mixing(self, classes: int) -> "Mixing":
        return Mixing(classes, mixup=self.alpha, probability=self.probability, beside=self.weight)


@dataclass(frozen=True)
class Mixing:
    """mixup (Zhang et al., ICLR 2018), cutmix (Yun et al., ICCV 2019), or each for half the pairs.

    Attributes:
        classes: The number of classes K.
        mixup: The alpha of Beta(alpha, alpha), from which mixup draws the share of the first image;
            0 leaves mixup out.
        cutmix: The same for cutmix.
        probability: The probability that a pair is mixed at all.
        beside: What mixed images weigh beside the clean ones; None: they take their place.
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    beside: float | None = None

    def targets(
        self, images: Tensor, targets: Targets, samples: Tensor, seed: int
    ) -> tuple[Tensor, Targets]:
        """Return what the network sees, and its targets.

        Args:
            images: Floating-point images [N, C, H, W].
            targets: Their classes and the epoch.
            samples: The numbers of the samples [N], on the CPU.
            seed: The seed of the run.

        Returns:
            N mixed images, or 2N images with a clean and a mixed one in turn; and their targets.
        """
        mixed, labels = self(images, targets.labels, samples, seed, targets.epoch)
        if self.beside is None:
            return mixed, replace(targets, labels=labels)
        in_turn = torch.stack([images, mixed], dim=1).flatten(0, 1)
        return in_turn, replace(targets, mixed=Mixed(labels, self.beside))

    def __call__(
        self, images: Tensor, labels: Tensor, samples: Tensor, seed: int, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Mix the images and labels of a micro-batch.

        Args:
            images: Floating-point images [N, C, H, W].
            labels: Their classes [N].
            samples: The numbers of the samples [N], on the CPU.
            seed: The seed of the run.
            epoch: The number of the epoch, from 0.

        Returns:
            Mixed images, and targets [N, K] float32.

        Raises:
            ValueError: N is odd.
        """
        if len(samples) % 2:
            raise ValueError(f"mixing needs an even number of images, got {len(samples)}")
        height, width = images.shape[2:]
        boxes, shares = self.draw(samples[::2].tolist(), seed, epoch, height, width)
        # The share of an image in its mixed pixels: 0 inside the box, 1 outside, `own` without one.
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
        """Draw how pairs are mixed.

        Args:
            firsts: The numbers of the first sample of each pair [n].
            seed: The seed of the run.
            epoch: The number of the epoch, from 0.
            height: The height of the images in pixels.
            width: The width of the images in pixels.

        Returns:
            Boxes [4, n] (top, bottom, left, right; all zero without a box), and the share of an
            image in its target [n] float64.
        """
        uniform = _uniform([sample_seed(seed, epoch, first) for first in firsts], 5)
        mixes = uniform[0] < self.probability
        cuts = mixes & (uniform[1] < self._cutmix_share())
        alpha = np.where(cuts, self.cutmix, self.mixup)
        share = np.where(mixes, betaincinv(alpha, alpha, uniform[2]), 1.0)
        # The box has the relative area 1 - share and a uniform centre. The borders cut it off.
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
    """Return numbers in (0, 1), [count, n], of splitmix64, by another stream than the crops."""
    states = np.array(seeds, np.uint64) ^ np.uint64(0x9A3C5B17D4E8F261)
    numbers = []
    for _ in range(count):
        states = states + np.uint64(0x9E3779B97F4A7C15)
        x = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers.append((((x ^ (x >> np.uint64(31))) >> np.uint64(11)) + 0.5) / 2.0**53)
    return np.stack(numbers)
