"""Transforms of images between decoding and the network.

Transforms work on uint8 tensors in the worker processes. `Normalize` turns whole batches into
float32 on the device. Augmentation draws from one seed for each sample, and never from the random
stream of the process. So it is the same on any number of ranks and workers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

from flatcal_dist.data.errors import BadImage
from flatcal_dist.data.images.decode import MAX_PIXELS
from flatcal_dist.data.images.pad_crop import PadCrop

Evaluation = Callable[[Tensor], Tensor]  # uint8 [C, H, W] -> uint8 [C, S, S]
Training = Callable[[Tensor, int], Tensor]  # the same, with the seed of the sample


AutoAugment = Literal["none", "randaugment", "autoaugment", "trivial_augment", "augmix"]


@dataclass(frozen=True)
class Augmentation:
    """How images are cut to the size of the network and varied.

    After the crop, training applies auto_augment, color_jitter and random_erasing in this order.

    Attributes:
        kind: "resized_crop" takes a random crop in training and resizes it. In evaluation it
            resizes the shorter side to image_size / crop_pct and cuts out the centre, as timm does.
            "pad_crop" adds zeros on all sides in training and cuts out a part of image_size.
            "none" neither crops nor varies. The latter two stretch images of another size to
            image_size first, and do nothing else in evaluation.
        scale: The least and the largest share of the area that a crop takes.
        ratio: The least and the largest aspect ratio of a crop.
        padding: The number of pixels that pad_crop adds on each side.
        flip: The probability that a crop is mirrored.
        interpolation: How images are resized.
        crop_pct: The share of the resized image that evaluation sees, along each side.
        auto_augment: "randaugment" (Cubuk et al., CVPR workshops 2020), "autoaugment" (Cubuk et
            al., CVPR 2019, the policy for ImageNet), "trivial_augment" (Müller and Hutter, ICCV
            2021, wide), or "augmix" (Hendrycks et al., ICLR 2020, the images alone), as torchvision
            has them.
        magnitude: The strength of randaugment (0 to 30) or augmix (0 to 10).
        operations: How many operations randaugment applies.
        color_jitter: The largest share by which brightness, contrast and saturation change.
        random_erasing: The probability that a rectangle of 2 to 33 % of the area is painted with
            `fill` (Zhong et al., AAAI 2020).
        fill: The colour of these rectangles, uint8, one value for each channel.
    """

    kind: Literal["none", "resized_crop", "pad_crop"] = "resized_crop"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: float = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: float = 0.875
    auto_augment: AutoAugment = "none"
    magnitude: int = 9
    operations: int = 2
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    fill: tuple[int, ...] = (0,)


def training_transform(augmentation: Augmentation, image_size: int) -> Training:
    """Return the transform (image uint8 [C, H, W], seed) -> uint8 [C, image_size, image_size]."""
    if augmentation.kind == "none":
        return _Unseeded(stretch(augmentation, image_size))
    if augmentation.kind == "pad_crop":
        more = _after_the_crop(augmentation)
        return _PadCrop(
            stretch(augmentation, image_size),
            PadCrop(augmentation.padding, augmentation.flip),
            _Seeded(T.Compose(more)) if more else None,
        )
    crop = _Crop(
        image_size,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        interpolation=InterpolationMode(augmentation.interpolation),
        antialias=True,
    )
    flip = T.RandomHorizontalFlip(augmentation.flip)
    return _Seeded(T.Compose([crop, flip, *_after_the_crop(augmentation)]))


def _after_the_crop(augmentation: Augmentation) -> list[nn.Module]:
    steps: list[nn.Module] = []
    if in_pillow := _colours_and_shapes(augmentation):
        # These are two to three times as fast on Pillow's images as on tensors.
        steps += [T.ToPILImage(), *in_pillow, T.PILToTensor()]
    if augmentation.random_erasing:
        steps.append(T.RandomErasing(augmentation.random_erasing, value=list(augmentation.fill)))
    return steps


def is_of_integers(augmentation: Augmentation) -> bool:
    """Tell whether an image that was stretched before is only padded, cut and mirrored."""
    return augmentation.kind != "resized_crop" and not _after_the_crop(augmentation)


class _Crop(T.RandomResizedCrop):
    """A random-resized crop that resizes a copy of the crop.

    The pixels are the same, and it is a quarter faster than resizing a view.
    """

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        cut = F.crop(inpt, **params).permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return F.resize(cut, self.size, self.interpolation, antialias=self.antialias)


def _colours_and_shapes(augmentation: Augmentation) -> list[nn.Module]:
    smooth = {"interpolation": InterpolationMode.BILINEAR}
    magnitude = augmentation.magnitude
    steps: list[nn.Module] = []
    match augmentation.auto_augment:
        case "randaugment":
            steps.append(T.RandAugment(augmentation.operations, magnitude, **smooth))
        case "autoaugment":
            steps.append(T.AutoAugment(**smooth))
        case "trivial_augment":
            steps.append(T.TrivialAugmentWide(**smooth))
        case "augmix":
            steps.append(T.AugMix(severity=magnitude, **smooth))
    if strength := augmentation.color_jitter:
        steps.append(T.ColorJitter(strength, strength, strength))
    return steps


def evaluation_transform(augmentation: Augmentation, image_size: int) -> Evaluation:
    """Return the transform image uint8 [C, H, W] -> uint8 [C, image_size, image_size].

    The transform raises BadImage for an image so long that resizing would take more memory than
    MAX_PIXELS pixels.
    """
    if augmentation.kind != "resized_crop":
        return stretch(augmentation, image_size)
    interpolation = InterpolationMode(augmentation.interpolation)
    shorter = math.floor(image_size / augmentation.crop_pct)
    resize = T.Resize(shorter, interpolation=interpolation, antialias=True)
    return _Bounded(T.Compose([resize, T.CenterCrop(image_size)]), shorter)


def stretch(augmentation: Augmentation, image_size: int) -> Evaluation:
    """Return the transform that resizes images to image_size whatever their shape."""
    interpolation = InterpolationMode(augmentation.interpolation)
    return T.Resize((image_size, image_size), interpolation=interpolation, antialias=True)


def stack(images: Sequence[Tensor]) -> Tensor:
    """Return a batch [N, C, H, W] of images [C, H, W]; its memory is [N, H, W, C], as theirs is."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Bounded:
    """A transform that refuses images which are too long and thin.

    Resizing the shorter side of an image of 1 x 60,000 pixels would take gigabytes.
    """

    transform: Evaluation
    shorter: int

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        if self.shorter**2 * max(height, width) > MAX_PIXELS * min(height, width):
            raise BadImage("the image", f"is too long and thin to evaluate: {width} x {height}")
        return self.transform(image)


@dataclass(frozen=True)
class _Seeded:
    """A random transform of torchvision whose randomness follows from the seed alone."""

    transform: Callable[[Tensor], Tensor]

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the GPUs as well, which fork_rng does not undo here.
            torch.default_generator.manual_seed(seed)
            return self.transform(image)


@dataclass(frozen=True)
class _Unseeded:
    transform: Callable[[Tensor], Tensor]

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        return self.transform(image)


@dataclass(frozen=True)
class _PadCrop:
    stretch: Callable[[Tensor], Tensor]
    crop: PadCrop
    more: "_Seeded | None"

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        part = self.crop.one(self.stretch(image), seed)
        return self.more(part, seed) if self.more else part


class Normalize(nn.Module):
    """A layer from uint8 [N, C, H, W] to contiguous float32: (x / 255 - mean) / std per channel.

    `mean` and `std` are fractions of full intensity, one for each channel. The layer holds no
    parameters and nothing that a checkpoint would store.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Both are scaled to 0..255, so that a batch needs one subtraction and one division.
        for name, values in (("mean", mean), ("std", std)):
            scaled = torch.tensor(values, dtype=torch.float64).mul(255).float().view(-1, 1, 1)
            self.register_buffer(name, scaled, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device).contiguous()  # the device turns [N, H, W, C] around
        return images.to(torch.float32).sub_(self.mean).div_(self.std)
