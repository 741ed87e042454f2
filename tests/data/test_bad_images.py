"""Images that cannot be used: others stand in for them, the same ones however the run is cut."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatcal_dist.data import (
    Augmentation,
    BadImage,
    DataError,
    Decoding,
    Position,
    Sample,
    Workers,
    evaluation_loader,
    evaluation_transform,
    load_index,
    optimizer_steps,
    sample_seed,
    training_transform,
    write_shards,
)
from flatcal_dist.data.loading.substitutes import TRIES, Images
from flatcal_dist.data.order import epoch_order, substitutes
from tests.support.photographs import awkward_image, encoded, photograph
from tests.support.samples import train_on

GOOD_KINDS = ("cmyk", "png", "exif", "gray")
BAD_KINDS = ("truncated", "damaged", "megapixels", "bomb")
SEED = 3
EVERYTHING = Augmentation(
    auto_augment="randaugment", color_jitter=0.4, random_erasing=0.5, fill=(124, 116, 104)
)
TRAIN = training_transform(EVERYTHING, 32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """44 samples in shards of 16: number 5 k + 2 is awkward for k < 8; 30 has a flipped byte."""
    images = [encoded(photograph(i % 10, i)[0].resize((96, 72))) for i in range(44)]
    kinds = GOOD_KINDS + BAD_KINDS
    for k, kind in enumerate(kinds):
        images[5 * k + 2] = awkward_image(kind)
    samples = [Sample(f"s{i:02d}", image, "jpg", i % 10) for i, image in enumerate(images)]
    directory = tmp_path_factory.mktemp("bad")
    paths = write_shards(samples, directory, "x", split="train", samples_per_shard=16)
    _flip_byte(paths[1], images[30])
    return paths


def _flip_byte(shard: Path, image: bytes) -> None:
    """In the middle of the compressed pixels: every decoder would make other pixels of it."""
    data = bytearray(shard.read_bytes())
    place = data.index(image) + len(image) // 2
    data[place] ^= 4
    assert Image.open(io.BytesIO(data[place - len(image) // 2 :][: len(image)])).convert("RGB")
    shard.write_bytes(data)


@pytest.fixture(scope="module")
def index(shards):
    return load_index(shards, classes=10)


BAD = {22: "truncated", 27: "no known format", 32: "100000000|10000 x 10000", 37: "bomb"}
BAD[30] = "not those that were indexed"


def steps_of(index, world_size=1, **options):
    """position -> rows (place in the step, sample, label, image bytes), and all replacements."""
    merged: dict[tuple[int, int], list] = {}
    replaced = []
    for rank in range(world_size):
        loader = train_on(
            index,
            **{
                "seed": SEED,
                "global_batch_size": 8,
                "micro_batch_size": 3,
                "transform": TRAIN,
                "epochs": 2,
                "rank": rank,
                "world_size": world_size,
                **options,
            },
        )
        for step in optimizer_steps(loader):
            rows = merged.setdefault((step[0].epoch, step[0].step), [])
            for batch in step:
                replaced += batch.replaced
                for row in zip(batch.samples, batch.labels, batch.images, strict=True):
                    rows.append((int(row[0]), int(row[1]), row[2].numpy().tobytes()))
    return merged, sorted(replaced, key=lambda r: (r.epoch, r.step, r.sample))


@pytest.fixture(scope="module")
def reference(index):
    return steps_of(index)


def test_all_as_a_plain_loop_has_it(index, reference):
    """Pillow, one image after the other, and substitutes by the definition."""
    steps, replaced = reference
    assert sorted({one.sample for one in replaced}) == sorted(BAD)
    listed = {(one.epoch, one.step, one.sample): one for one in replaced}
    for epoch in range(2):
        order = epoch_order(index.lengths, SEED, epoch, None)
        for step in range(5):
            expected = []
            for sample in order[8 * step : 8 * step + 8].tolist():
                used = sample
                if sample in BAD:
                    tries = substitutes(SEED, epoch, sample, 44)
                    used = next(other for other in tries if other not in BAD)
                    one = listed.pop((epoch, step, sample))
                    assert one.by == used
                    assert any(word in one.reason for word in BAD[sample].split("|"))
                offset, size = int(index.offset[used]), int(index.size[used])
                stored = index.shards[index.shard[used]].read_bytes()[offset : offset + size]
                pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
                image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
                image = TRAIN(image, sample_seed(SEED, epoch, sample))
                expected.append((used, used % 10, image.numpy().tobytes()))
            assert steps[epoch, step] == expected
    assert not listed


MATRIX = [(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 1, 3)]
ALWAYS = {(2, 1), (4, 0), (1, 3)}


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [
        pytest.param(*pair, marks=() if pair in ALWAYS else pytest.mark.exhaustive)
        for pair in MATRIX
    ],
)
def test_ranks_and_workers_change_nothing(index, reference, ranks, workers):
    assert steps_of(index, ranks, workers=workers) == reference


@pytest.mark.parametrize(("start", "ranks"), [((0, 2), 2), ((1, 3), 4)])
def test_resuming_gives_exactly_the_rest(index, reference, start, ranks):
    steps, replaced = steps_of(index, ranks, start=Position(*start))
    assert steps == {at: rows for at, rows in reference[0].items() if at >= start}
    assert replaced == [one for one in reference[1] if (one.epoch, one.step) >= start]


def test_a_substitute_is_cut_otherwise_than_in_its_own_place(index, reference):
    images = [row for epoch in (0, 1) for row in _rows(reference[0], epoch)]
    by = {one.by for one in reference[1]}
    twice = [s for s in by if sum(row[0] == s for row in images) > 1]
    assert twice
    for sample in twice:
        views = [row[2] for row in images if row[0] == sample]
        assert len(set(views)) == len(views)


def _rows(steps, epoch):
    return [row for (e, _), rows in steps.items() if e == epoch for row in rows]


def test_evaluation_names_the_bad_image_and_stops(index, shards):
    transform = evaluation_transform(Augmentation(), 32)
    loader = evaluation_loader(index, 23, transform, Decoding(3), Workers(1))
    with pytest.raises(BadImage) as error:
        list(loader)
    assert str(error.value).startswith(f"{shards[1]}: the image of sample 's22' cannot be decoded")
    assert error.value.reason


def test_a_limit_of_pixels(index):
    small = Images(index, Decoding(3, max_pixels=96 * 72 - 1))
    with pytest.raises(BadImage, match=r"'s00' has 96 x 72 pixels, more than data\.max_pixels="):
        small.image(0)
    assert Images(index, Decoding(3, max_pixels=96 * 72)).image(0).shape == (3, 72, 96)


def test_data_that_is_bad_throughout_ends(tmp_path):
    samples = [Sample(f"s{i}", b"no image", "jpg", 0) for i in range(4)]
    index = load_index(write_shards(samples, tmp_path, "x", split="x", samples_per_shard=4))
    loader = train_on(index, TRAIN, seed=0, global_batch_size=4, micro_batch_size=4, epochs=1)
    with pytest.raises(DataError, match=rf"{TRIES} images drawn in place of .*no known format"):
        list(loader)


def test_substitutes_reach_everything_evenly():
    first = [next(substitutes(0, epoch, sample, 10)) for epoch in range(50) for sample in range(40)]
    counts = np.bincount(first, minlength=10)
    assert counts.min() > 140  # of 200; five standard deviations are 67
    assert counts.max() < 270


def test_a_long_thin_image_is_refused_before_it_fills_the_memory():
    evaluate = evaluation_transform(Augmentation(), 224)
    with pytest.raises(BadImage, match="too long and thin to evaluate: 60000 x 1"):
        evaluate(torch.zeros(3, 1, 60_000, dtype=torch.uint8))
    assert evaluate(torch.zeros(3, 10, 3000, dtype=torch.uint8)).shape == (3, 224, 224)
    assert TRAIN(torch.zeros(3, 1, 60_000, dtype=torch.uint8), 0).shape == (3, 32, 32)
