"""The reader that holds a data set in memory gives the batches of the indexed reader."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from flatcal_dist import inputs
from flatcal_dist.config import load
from flatcal_dist.data import (
    Augmentation,
    BatchPlan,
    DataError,
    Decoding,
    Position,
    Sample,
    Workers,
    evaluation_loader,
    load_index,
    optimizer_steps,
    training_transform,
    write_shards,
)
from flatcal_dist.data.images.transforms import evaluation_transform
from flatcal_dist.data.loading import memory
from flatcal_dist.data.loading.memory import HeldBatches, MemoryBatches
from tests.support.samples import make_samples, png, train_on

PLAN = {"seed": 3, "global_batch_size": 14, "micro_batch_size": 3, "epochs": 3, "window": 20}


def both(index, augmentation, *, workers=0, size=8, channels=3, **plan):
    plan = PLAN | plan
    transform = training_transform(augmentation, size)
    indexed = train_on(index, transform, channels=channels, **plan)
    held = MemoryBatches(
        index, BatchPlan(**plan), augmentation, size, Decoding(channels), Workers(workers)
    )
    assert len(held) == len(indexed)
    return held, indexed


def assert_same(held, indexed):
    compared = 0
    for one, two in zip(held, indexed, strict=True):
        for field in fields(one):
            a, b = getattr(one, field.name), getattr(two, field.name)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert same, field.name
        assert one.images.dtype == torch.uint8
        assert one.images.stride() == two.images.stride()
        compared += len(one.samples)
    assert compared


KINDS = {
    "none": Augmentation("none"),
    "pad_crop": Augmentation("pad_crop"),
    "wide": Augmentation("pad_crop", padding=7, flip=1.0),
    "resized_crop": Augmentation("resized_crop", scale=(0.3, 1.0)),
    "policy": Augmentation("pad_crop", auto_augment="trivial_augment", random_erasing=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_the_same_bytes(index, kind, world_size):
    for rank in range(world_size):
        assert_same(*both(index, KINDS[kind], rank=rank, world_size=world_size))


def test_grey_images_and_one_size_of_them_without_stretching(tmp_path):
    index = load_index(
        write_shards(make_samples(50), tmp_path, "x", split="x", samples_per_shard=20)
    )
    assert_same(*both(index, Augmentation("pad_crop"), channels=1, size=12))


def test_resumed_paired_and_decoded_by_workers(index):
    more = {"start": Position(1, 1), "same_class": True, "workers": 2}
    assert_same(*both(index, Augmentation("pad_crop"), **more))
    assert_same(*both(index, Augmentation("pad_crop"), max_steps=4))


def test_a_second_pass_is_the_same_and_decodes_nothing(index, monkeypatch):
    held, indexed = both(index, Augmentation("pad_crop"))
    list(held)
    monkeypatch.setattr(memory, "Batches", None)
    assert_same(held, indexed)
    assert len(list(optimizer_steps(held))) == 9


def test_bad_images_are_replaced_as_by_the_indexed_reader(tmp_path):
    samples = make_samples(150)
    for bad in (5, 70, 71, 149, *range(80, 130)):
        samples[bad] = Sample(f"s{bad:03d}", b"not an image", "png", bad % 7)
    index = load_index(write_shards(samples, tmp_path, "x", split="x", samples_per_shard=40))
    held, indexed = both(index, Augmentation("pad_crop"))
    assert_same(held, indexed)
    assert sum(len(batch.replaced) for batch in held) > 100


def test_data_of_bad_images_alone_end_in_an_error(tmp_path):
    samples = [Sample(f"s{i:03d}", b"no", "png", 0) for i in range(20)]
    index = load_index(write_shards(samples, tmp_path, "x", split="x", samples_per_shard=20))
    with pytest.raises(DataError, match="None of the 20 training images can be used"):
        list(both(index, Augmentation("none"))[0])
    samples[3] = make_samples(4)[3]
    index = load_index(write_shards(samples, tmp_path / "y", "x", split="x", samples_per_shard=9))
    assert_same(*both(index, Augmentation("none")))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards_are_named(tmp_path, workers):
    shards = write_shards(make_samples(40), tmp_path, "x", split="x", samples_per_shard=20)
    index = load_index(shards)
    shards[1].write_bytes(shards[0].read_bytes()[: shards[1].stat().st_size])
    with pytest.raises(DataError, match=r"the shard was changed or swapped after it was indexed"):
        list(both(index, Augmentation("pad_crop"), workers=workers)[0])


def test_images_of_several_sizes_are_stretched_or_refused(tmp_path):
    samples = make_samples(30)
    samples[20] = Sample("other", png(1, 9, 9), "png", 0)
    index = load_index(write_shards(samples, tmp_path, "x", split="x", samples_per_shard=20))
    assert_same(*both(index, Augmentation("pad_crop")))
    with pytest.raises(DataError, match=r"'other' has 9 x 9 pixels, and others have 10 x 12"):
        list(both(index, Augmentation("resized_crop"))[0])


def test_more_than_half_of_the_free_memory_is_refused(index, monkeypatch):
    monkeypatch.setattr(memory, "_free", lambda device: 2 * 50 * 8 * 8 * 3 - 1)
    with pytest.raises(DataError, match=r"data.reader=memory would hold .* on cpu"):
        list(both(index, Augmentation("pad_crop"))[0])
    monkeypatch.setattr(memory, "_free", lambda device: 2 * 50 * 8 * 8 * 3)
    assert len(list(both(index, Augmentation("pad_crop"))[0])) == 45
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"training images 2 times on cpu"):
        list(both(index, Augmentation("pad_crop"))[0])
    monkeypatch.setattr(memory, "_free", lambda device: None)
    assert len(list(both(index, Augmentation("pad_crop"))[0])) == 45


def test_the_configuration_chooses_it(shards):
    def batches(reader):
        where = [f"data.train={shards[0].parent}", "model.num_classes=7", "data.workers=0"]
        small = ["data.augmentation=pad_crop", "data.image_size=8", "data.global_batch_size=10"]
        config = load(None, [*where, *small, f"data.reader={reader}", "train.epochs=2"])
        train = inputs.open_training(config.data, 7)
        return inputs.training_batches(config, train, Position(), 0, 1, pin_memory=False)

    assert isinstance(batches("memory"), MemoryBatches)
    assert_same(batches("memory"), batches("indexed"))


def test_the_process_stream_is_untouched(index):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    numpys = np.random.get_state()[1].copy()
    list(both(index, Augmentation("pad_crop"))[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)


class Counted:
    """An index that counts how often its images are read."""

    def __init__(self, index):
        self._index, self.reads = index, 0

    def __getattr__(self, name):
        return getattr(self._index, name)

    def __len__(self):
        return len(self._index)

    def read(self, sample):
        self.reads += 1
        return self._index.read(sample)


def evaluated(index, workers=0, **ranks):
    how = evaluation_transform(Augmentation("resized_crop", crop_pct=1.0), 8)
    return evaluation_loader(index, 16, how, Decoding(3), Workers(workers), **ranks)


@pytest.mark.parametrize("rank", [0, 1])
def test_evaluation_batches_are_held_after_one_pass(index, rank):
    counted = Counted(index)
    held = HeldBatches(evaluated(counted, rank=rank, world_size=2))
    expected = list(evaluated(index, rank=rank, world_size=2))
    assert len(held) == len(expected) == 2
    for _ in range(3):
        assert_same(held, expected)
    reads = counted.reads
    assert 0 < reads <= 32, "each image of this rank once, and padding"
    list(held)
    assert counted.reads == reads


def test_batches_of_workers_are_held_in_memory_of_their_own(index):
    held = HeldBatches(evaluated(index, workers=2))
    list(held)
    kept = list(held)
    assert not any(batch.images.is_shared() for batch in kept)
    assert_same(kept, list(evaluated(index)))


def test_a_pass_that_breaks_off_holds_nothing(index):
    counted = Counted(index)
    held = HeldBatches(evaluated(counted))
    next(iter(held))
    assert [batch.samples.tolist() for batch in held] == [
        batch.samples.tolist() for batch in evaluated(index)
    ]


def test_evaluation_batches_that_do_not_fit_are_loaded_each_time(index, monkeypatch):
    counted = Counted(index)
    batch = 16 * 8 * 8 * 3
    held = HeldBatches(evaluated(counted))
    monkeypatch.setattr(memory, "_free", lambda device: 2 * len(held) * batch - 1)
    list(held)
    once = counted.reads
    list(held)
    assert counted.reads == 2 * once
    monkeypatch.setattr(memory, "_free", lambda device: 2 * len(held) * batch)
    list(held)
    list(held)
    assert counted.reads == 3 * once
