"""What happens to an image between decoding and the network.

Transforms work on uint8 tensors in the worker processes; `Normalize` turns whole batches into
float32 on the device. Augmentation draws from a seed per sample, never from the process's own
random stream, so it is the same on any number of ranks and workers.
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

Evaluation = Callable[[Tensor], Tensor]  # uint8 [C, H, W] -> uint8 [C, S, S]
Training = Callable[[Tensor, int], Tensor]  # the same, given the sample's seed


AutoAugment = Literal["none", "randaugment", "autoaugment", "trivial_augment", "augmix"]


@dataclass(frozen=True)
class Augmentation:
    """How images are cut to the network's size and varied.

    "resized_crop": training takes a random crop of relative area `scale` and aspect `ratio`,
    resizes it, and mirrors it with probability `flip`; evaluation resizes the shorter side to
    image_size / crop_pct and cuts out the centre, as timm does.
    "none": no randomness, no cropping; an image of another size is stretched to image_size.

    After crop and flip of training, in this order:
    auto_augment: "randaugment" (Cubuk et al., CVPR workshops 2020; `operations` of strength
    `magnitude` out of 0..30 each), "autoaugment" (Cubuk et al., CVPR 2019, ImageNet's policy),
    "trivial_augment" (Müller and Hutter, ICCV 2021, wide), "augmix" (Hendrycks et al., ICLR 2020,
    the images alone, strength `magnitude` out of 0..10), as torchvision has them.
    color_jitter: brightness, contrast and saturation change by up to this share each.
    random_erasing: probability that a rectangle (2 to 33 % of the area) is painted with `fill`
    (Zhong et al., AAAI 2020); `fill`: uint8, one per channel, by default black.
    """

    kind: Literal["none", "resized_crop"] = "resized_crop"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
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
    """The transform (image uint8 [C, H, W], seed) -> uint8 [C, image_size, image_size]."""
    if augmentation.kind == "none":
        return _Unseeded(_stretch(augmentation, image_size))
    crop = _Crop(
        image_size,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        interpolation=InterpolationMode(augmentation.interpolation),
        antialias=True,
    )
    steps = [crop, T.RandomHorizontalFlip(augmentation.flip)]
    if in_pillow := _colours_and_shapes(augmentation):
        # These are two to three times as fast on Pillow's images as on tensors.
        steps += [T.ToPILImage(), *in_pillow, T.PILToTensor()]
    if augmentation.random_erasing:
        steps.append(T.RandomErasing(augmentation.random_erasing, value=list(augmentation.fill)))
    return _Seeded(T.Compose(steps))


class _Crop(T.RandomResizedCrop):
    """The same pixels, resized from a copy of the crop: a quarter faster than from a view of it."""

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
    """The transform image uint8 [C, H, W] -> uint8 [C, image_size, image_size].

    It raises BadImage for one so long that resizing would take more memory than MAX_PIXELS do.
    """
    if augmentation.kind == "none":
        return _stretch(augmentation, image_size)
    interpolation = InterpolationMode(augmentation.interpolation)
    shorter = math.floor(image_size / augmentation.crop_pct)
    resize = T.Resize(shorter, interpolation=interpolation, antialias=True)
    return _Bounded(T.Compose([resize, T.CenterCrop(image_size)]), shorter)


def _stretch(augmentation: Augmentation, image_size: int) -> Evaluation:
    interpolation = InterpolationMode(augmentation.interpolation)
    return T.Resize((image_size, image_size), interpolation=interpolation, antialias=True)


def stack(images: Sequence[Tensor]) -> Tensor:
    """Images [C, H, W] to a batch [N, C, H, W] that lies in memory as they do, as [N, H, W, C]."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Bounded:
    """Resizing the shorter side of an image of 1 x 60,000 pixels would make gigabytes of it."""

    transform: Evaluation
    shorter: int

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        if self.shorter**2 * max(height, width) > MAX_PIXELS * min(height, width):
            raise BadImage("the image", f"is too long and thin to evaluate: {width} x {height}")
        return self.transform(image)


@dataclass(frozen=True)
class _Seeded:
    """A random torchvision transform whose randomness is the seed's alone."""

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


class Normalize(nn.Module):
    """uint8 [N, C, H, W] -> float32, contiguous: (x / 255 - mean) / std per channel.

    `mean` and `std` are fractions of full intensity, one per channel. Holds no parameters and
    nothing that a checkpoint would store.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        # On 0..255 images: one subtraction, one division.
        for name, values in (("mean", mean), ("std", std)):
            scaled = torch.tensor(values, dtype=torch.float64).mul(255).float().view(-1, 1, 1)
            self.register_buffer(name, scaled, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device).contiguous()  # the device turns [N, H, W, C] around
        return images.to(torch.float32).sub_(self.mean).div_(self.std)
