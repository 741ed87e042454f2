import pickle

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from flatcal_dist.data import Augmentation, Normalize, evaluation_transform, training_transform


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    waves = [torch.sin(rows / 5 + i) + torch.cos(columns / (6 + i)) for i in range(3)]
    return ((torch.stack(waves) + 2) * 63).to(torch.uint8)


def test_the_seed_decides_and_the_process_stream_is_untouched(image):
    transform = pickle.loads(pickle.dumps(training_transform(Augmentation(), 32)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    crops = [transform(image, seed) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(100)
    assert all(torch.equal(transform(image, seed), crop) for seed, crop in enumerate(crops))
    assert len({crop.numpy().tobytes() for crop in crops}) == 8
    assert all(crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 for crop in crops)
    assert transform(image, 2**64 - 1).shape == (3, 32, 32)


def test_flip_probability(image):
    whole = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3)}
    never, always, half = (
        training_transform(Augmentation(flip=flip, **whole), 32) for flip in (0.0, 1.0, 0.5)
    )
    plain = never(image, 0)
    assert torch.equal(always(image, 0), plain.flip(-1))
    flipped = sum(torch.equal(half(image, seed), plain.flip(-1)) for seed in range(200))
    assert 70 < flipped < 130


def test_none_only_resizes(image):
    plain = Augmentation(kind="none")
    square = image[:, :32, :32]
    assert torch.equal(training_transform(plain, 32)(square, 3), square)
    assert torch.equal(evaluation_transform(plain, 32)(square), square)
    stretched = training_transform(plain, 32)(image, 3)
    assert stretched.shape == (3, 32, 32)
    assert torch.equal(stretched, evaluation_transform(plain, 32)(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_evaluation_agrees_with_timm(image, interpolation, crop_pct):
    ours = evaluation_transform(Augmentation(interpolation=interpolation, crop_pct=crop_pct), 32)(
        image
    )
    timms = create_transform(
        32,
        interpolation=interpolation,
        crop_pct=crop_pct,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert ours.shape == timms.shape
    assert (ours.float() / 255 - timms).abs().max() < 2.5 / 255  # Pillow resizes in integers


def test_normalize():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    untouched = images.clone()
    normalize = Normalize(mean, std)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    out = normalize(images)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), expected, atol=1e-6)
    assert torch.equal(images, untouched)
    assert not normalize.state_dict()
    assert not list(normalize.parameters())
