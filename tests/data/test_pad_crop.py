import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

from flatcal_dist.data import (
    Augmentation,
    BatchPlan,
    Decoding,
    evaluation_transform,
    training_transform,
)
from flatcal_dist.data.images.pad_crop import PadCrop
from flatcal_dist.data.loading.streaming import streaming_loader
from flatcal_dist.data.order import sample_seed, sample_seeds
from flatcal_dist.data.shards.listing import open_stream
from tests.support.samples import QUICK, train_on

SEEDS = sample_seeds(3, 1, np.arange(4000))


def pixels(n=1, size=(6, 5, 3)):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, *size), dtype=np.uint8))


def test_seeds_of_many_samples_are_those_of_each():
    samples = np.array([0, 1, 77, 2**40])
    for seed, epoch in ((0, 0), (2**63 - 1, 5)):
        expected = [sample_seed(seed, epoch, sample) for sample in samples.tolist()]
        assert sample_seeds(seed, epoch, samples).tolist() == expected


def by_numpy(image, row, column, mirrored, padding):
    """The definition: [H, W, C] with a border of zeros, cut, and mirrored after that."""
    height, width, _ = image.shape
    whole = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    whole[padding : padding + height, padding : padding + width] = image
    part = whole[row : row + height, column : column + width]
    return part[:, ::-1] if mirrored else part


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_one_image_and_a_batch_are_the_definition(padding):
    crop, images, seeds = PadCrop(padding, 0.5), pixels(40), SEEDS[:40]
    expected = [
        by_numpy(image, *drawn, padding)
        for image, *drawn in zip(images.numpy(), *crop.draw(seeds), strict=True)
    ]
    assert np.array_equal(crop.batch(images, seeds).numpy(), expected)
    for image, seed, found in zip(images, seeds.tolist(), expected, strict=True):
        one = crop.one(image.permute(2, 0, 1), seed)
        assert np.array_equal(one.permute(1, 2, 0).numpy(), found)


def test_places_and_mirroring_are_uniform_and_independent():
    rows, columns, mirrored = PadCrop(4, 0.25).draw(SEEDS)
    table = np.zeros((9, 9, 2))
    np.add.at(table, (rows, columns, mirrored.astype(int)), 1)
    expected = np.broadcast_to([4000 * 0.75 / 81, 4000 * 0.25 / 81], table.shape)
    chi2 = ((table - expected) ** 2 / expected).sum()  # 161 degrees of freedom: 99.9 % below 222
    assert 110 < chi2 < 222
    assert not PadCrop(4, 0.0).draw(SEEDS)[2].any()
    assert PadCrop(4, 1.0).draw(SEEDS)[2].all()


def test_it_is_torchvisions_crop_with_the_places_drawn():
    image, crop = pixels()[0].permute(2, 0, 1), PadCrop(4, 0.5)
    for seed, row, column, mirrored in zip(
        SEEDS[:20].tolist(), *crop.draw(SEEDS[:20]), strict=True
    ):
        part = F.crop(T.Pad(4)(image), int(row), int(column), 6, 5)
        expected = F.horizontal_flip(part) if mirrored else part
        assert torch.equal(crop.one(image, seed), expected)


def test_the_transform_stretches_first_and_evaluation_does_no_more():
    augmentation = Augmentation("pad_crop", padding=2)
    image = pixels()[0].permute(2, 0, 1)
    transform = pickle.loads(pickle.dumps(training_transform(augmentation, 8)))
    plain = evaluation_transform(augmentation, 8)(image)
    assert torch.equal(plain, evaluation_transform(Augmentation("none"), 8)(image))
    assert torch.equal(transform(image, 9), PadCrop(2, 0.5).one(plain, 9))


def test_policies_and_erasing_follow_the_crop():
    image = pixels(size=(32, 32, 3))[0].permute(2, 0, 1)
    more = Augmentation("pad_crop", auto_augment="trivial_augment", random_erasing=1.0)
    varied = training_transform(more, 32)
    different = 0
    for seed in range(8):
        crop = PadCrop(4, 0.5).one(image, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            policy = T.TrivialAugmentWide(interpolation=T.InterpolationMode.BILINEAR)
            expected = F.pil_to_tensor(policy(F.to_pil_image(crop)))
            expected = T.RandomErasing(1.0, value=[0])(expected)
        assert torch.equal(varied(image, seed), expected)
        different += not torch.equal(varied(image, seed), crop)
    assert different == 8


def test_choices_depend_on_seed_epoch_and_sample_with_each_reader(index):
    plan = {"seed": 3, "global_batch_size": 10, "micro_batch_size": 5, "epochs": 2}
    where = str(index.shards[0].parent)
    stream = open_stream(where, "train", 7, QUICK, None, None)

    def batches(kind):
        transform = training_transform(Augmentation(kind), 8)
        yield from train_on(index, transform, **plan)
        yield from streaming_loader(stream, BatchPlan(**plan), transform, Decoding(3), buffer=4)

    compared = 0
    for batch, plain in zip(batches("pad_crop"), batches("none"), strict=True):
        assert torch.equal(batch.samples, plain.samples)
        seeds = [sample_seed(3, batch.epoch, sample) for sample in batch.samples.tolist()]
        for varied, image, seed in zip(batch.images, plain.images, seeds, strict=True):
            assert torch.equal(varied, PadCrop().one(image, seed))
            compared += 1
    assert compared == 200
