import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

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
    training_transform,
    write_shards,
)
from flatcal_dist.data.order import epoch_order
from tests.support.samples import make_samples, png, train_on

TRAIN = training_transform(Augmentation(scale=(0.3, 1.0)), 8)
EVALUATE = evaluation_transform(Augmentation(), 8)


def training(index, **options):
    return train_on(
        index,
        **{
            "seed": 3,
            "global_batch_size": 14,
            "micro_batch_size": 3,
            "transform": TRAIN,
            "epochs": 3,
            "window": 20,
            **options,
        },
    )


def steps_of(index, world_size=1, **options):
    """Each optimizer step over all ranks: position -> sample -> (label, bytes of the image)."""
    merged: dict[tuple[int, int], dict[int, tuple[int, bytes]]] = {}
    counts: dict[tuple[int, int], set[int]] = {}
    for rank in range(world_size):
        loader = training(index, rank=rank, world_size=world_size, **options)
        seen = 0
        for step in optimizer_steps(loader):
            assert [batch.last for batch in step] == [False] * (len(step) - 1) + [True]
            seen += len(step)
            position = (step[0].epoch, step[0].step)
            counts.setdefault(position, set()).add(len(step))
            samples = merged.setdefault(position, {})
            for batch in step:
                assert (batch.epoch, batch.step) == position
                assert 0 < len(batch.samples) <= 3
                rows = zip(batch.samples.tolist(), batch.labels.tolist(), batch.images, strict=True)
                for sample, label, image in rows:
                    assert sample not in samples
                    samples[sample] = (label, image.numpy().tobytes())
        assert seen == len(loader)
    assert all(len(each) == 1 for each in counts.values())  # every rank the same number
    return merged


@pytest.fixture(scope="module")
def reference(index):
    return steps_of(index)


def test_reference_is_the_order(index, reference):
    assert list(reference) == [(epoch, step) for epoch in range(3) for step in range(3)]
    for (epoch, step), samples in reference.items():
        order = epoch_order(index.lengths, 3, epoch, 20)
        assert list(samples) == order[14 * step : 14 * step + 14].tolist()
        assert all(label == sample % 7 for sample, (label, _) in samples.items())


def test_augmentation_changes_from_epoch_to_epoch(reference):
    views = {}
    for samples in reference.values():
        for sample, (_, image) in samples.items():
            views.setdefault(sample, set()).add(image)
    often = [images for images in views.values() if len(images) > 1]
    assert len(often) > 25


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_do_not_depend_on_ranks_and_workers(index, reference, world_size, workers):
    assert steps_of(index, world_size, workers=workers) == reference


@pytest.mark.parametrize(
    "context", ["spawn", pytest.param("forkserver", marks=pytest.mark.exhaustive)]
)
def test_start_methods(index, reference, context):
    steps = steps_of(index, workers=1, max_steps=1, context=context)
    assert steps == {(0, 0): reference[0, 0]}


@pytest.mark.parametrize(
    ("start", "world_size"), [((0, 1), 1), ((0, 2), 4), ((1, 0), 2), ((1, 2), 3), ((2, 3), 1)]
)
def test_resume_gives_exactly_the_rest(index, reference, start, world_size):
    rest = {position: samples for position, samples in reference.items() if position >= start}
    assert steps_of(index, world_size, start=Position(*start)) == rest


def test_last_step_of_an_epoch_is_the_first_of_the_next(index, reference):
    assert next(iter(steps_of(index, start=Position(0, 3)))) == (1, 0)


def test_max_steps_wins_over_epochs(index):
    assert len(steps_of(index, max_steps=2)) == 2
    assert len(steps_of(index, max_steps=10)) == 10  # beyond the three epochs
    assert len(steps_of(index, max_steps=5, start=Position(1, 1))) == 1
    assert len(steps_of(index, max_steps=5, start=Position(2, 0))) == 0


def test_a_second_pass_is_the_same(index):
    loader = training(index, max_steps=2, workers=1)
    one, two = ([batch.images for batch in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_impossible_positions_and_sizes_are_refused(index):
    with pytest.raises(DataError, match=r"cannot start at step 4 of epoch 0: an epoch .* 3 steps"):
        training(index, start=Position(0, 4))
    with pytest.raises(DataError, match="50 samples, fewer than one global batch of 51"):
        training(index, global_batch_size=51)
    with pytest.raises(DataError, match="leaves a rank with 0 samples"):
        training(index, world_size=15)


def test_loading_leaves_the_process_stream_alone(index):
    torch.manual_seed(1)
    np.random.seed(1)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        list(training(index, workers=workers, max_steps=1))
        list(evaluation_loader(index, 20, EVALUATE, Decoding(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)


def test_gray_batches_are_contiguous_uint8(index):
    batch = next(iter(training(index, channels=1)))
    assert batch.images.shape == (3, 1, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    assert batch.labels.dtype == batch.samples.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["damaged", "swapped"])
def test_errors_arrive_as_they_were_raised(tmp_path, kind, workers):
    samples = make_samples(8)
    samples[5] = Sample("bad", b"not an image", "png", 0)
    shards = write_shards(samples, tmp_path, "x", split="x", samples_per_shard=4)
    index = load_index(shards)
    if kind == "swapped":
        data = shards[1].read_bytes()
        shards[1].write_bytes(data.replace(b"bad.png", b"new.png"))
    message = {
        "damaged": f"{shards[1]}: the image of sample 'bad' cannot be decoded",
        "swapped": f"{shards[1]}: reading the image of sample 'bad' found another member",
    }[kind]
    expected = {"damaged": BadImage, "swapped": DataError}[kind]
    loaders = [evaluation_loader(index, 3, EVALUATE, Decoding(3), Workers(workers))]
    if kind == "swapped":  # training replaces a damaged image, see test_bad_images.py
        loaders.append(training(index, global_batch_size=8, workers=workers))
    for loader in loaders:
        with pytest.raises(DataError) as error:
            list(loader)
        assert type(error.value) is expected
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (1, 2), (2, 2)]
)
def test_evaluation_covers_each_sample_once(index, world_size, workers):
    counted = {}
    lengths = set()
    for rank in range(world_size):
        loader = evaluation_loader(
            index,
            16,
            EVALUATE,
            Decoding(3),
            Workers(workers),
            rank=rank,
            world_size=world_size,
        )
        batches = list(loader)
        assert len(loader) == len(batches)
        lengths.add(len(batches))
        for batch in batches:
            assert batch.images.shape == (16, 3, 8, 8)
            for i in torch.nonzero(batch.valid).flatten().tolist():
                sample = int(batch.samples[i])
                assert sample not in counted
                counted[sample] = (int(batch.labels[i]), batch.images[i].numpy().tobytes())
            last = int(batch.valid.sum()) - 1
            for i in torch.nonzero(~batch.valid).flatten().tolist():
                assert int(batch.samples[i]) == 49
                assert torch.equal(batch.images[i], batch.images[max(last, 0)])
    assert len(lengths) == 1
    assert sorted(counted) == list(range(50))
    assert all(label == sample % 7 for sample, (label, _) in counted.items())
    assert len({image for _, image in counted.values()}) == 50


@pytest.mark.parametrize("kept", ["error", "loader"])
def test_workers_end_with_the_epoch_that_fails_or_is_left(tmp_path, index, kept):
    """Not when Python forgets the error, or the loader, whose workers would go on reading."""
    before = set(torch.multiprocessing.active_children())
    if kept == "error":
        shards = write_shards(make_samples(8), tmp_path, "x", split="x", samples_per_shard=4)
        index = load_index(shards)
        shards[1].write_bytes(shards[1].read_bytes().replace(b"s005.png", b"else.png"))
    loader = training(index, global_batch_size=8, workers=2)
    batches = iter(loader)
    if kept == "error":
        with pytest.raises(DataError, match="found another member") as error:
            list(batches)
        assert error.traceback
    else:
        next(batches)
        assert set(torch.multiprocessing.active_children()) - before
        batches.close()
    assert not set(torch.multiprocessing.active_children()) - before


class KillsItself:
    """A transform that gets the signals of Ctrl-C, a closed terminal and SLURM while it works."""

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        assert multiprocessing.parent_process() is not None
        asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        for number in asking:
            os.kill(os.getpid(), number)
        assert torch.get_num_threads() == 1
        return TRAIN(image, seed)


def test_workers_leave_signals_to_the_main_process(index, reference):
    steps = steps_of(index, transform=KillsItself(), workers=2, max_steps=2)
    assert steps == {position: reference[position] for position in ((0, 0), (0, 1))}


FAILS = """
import sys
from pathlib import Path
from flatcal_dist.data import *

if __name__ == "__main__":
    loader = training_loader(
        load_index(expand(sys.argv[1])),
        BatchPlan(seed=0, global_batch_size=8, micro_batch_size=4, epochs=9),
        training_transform(Augmentation(), 8), Decoding(3), Workers(2, context=sys.argv[2]),
    )
    batches = iter(loader)
    next(batches)
    raise RuntimeError("the training failed")
"""


@pytest.mark.parametrize(
    "context", ["fork", pytest.param("forkserver", marks=pytest.mark.exhaustive)]
)
def test_a_run_that_fails_ends_with_its_workers(shards, tmp_path, context):
    """The traceback keeps the loader alive; Python's exit then ends the workers by SIGTERM."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    run = subprocess.run(
        [sys.executable, str(script), str(shards[0].parent), context],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 1
    assert run.stderr.strip().endswith("RuntimeError: the training failed")


def test_pinning_keeps_everything(index, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    batch = next(iter(training(index)))
    pinned = batch.pin_memory()
    assert pinned.images is not batch.images
    assert torch.equal(pinned.images, batch.images)
    assert (pinned.epoch, pinned.step, pinned.last) == (batch.epoch, batch.step, batch.last)


def test_images_are_those_of_their_samples(index):
    plain = training_transform(Augmentation(kind="none"), 12)
    from flatcal_dist.data.images.decode import decode

    for batch in training(index, transform=plain, max_steps=1):
        for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
            assert torch.equal(image, plain(decode(png(sample), 3, "x"), 0))
