"""Batches of the streaming reader, with shards on a real web server."""

import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flatcal_dist.data import (
    Augmentation,
    BatchPlan,
    DataError,
    Decoding,
    Position,
    Workers,
    load_index,
    training_transform,
    write_shards,
)
from flatcal_dist.data.images.decode import decode
from flatcal_dist.data.loading.streaming import streaming_loader
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.listing import Stream, open_stream
from tests.support.samples import ALERT, EVEN, PATTERN, QUICK, make_samples, png
from tests.support.web import serving


def opened(pattern: str, access: Access = QUICK, **options) -> Stream:
    return open_stream(pattern, "train", 7, access, **options)


def batches(stream: Stream, *, rank: int = 0, world_size: int = 1, workers: int = 0, **options):
    sizes = {"global_batch_size": 24, "micro_batch_size": 3, "epochs": 2, **options}
    plan = BatchPlan(seed=5, rank=rank, world_size=world_size, **sizes)
    transform = training_transform(Augmentation("resized_crop"), 8)
    loader = streaming_loader(stream, plan, transform, Decoding(3), Workers(workers), buffer=10)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def expected_numbers(directory: Path) -> dict[int, tuple[bytes, int]]:
    """Number -> image and label, read through the index."""
    found = {}
    for shard in sorted(directory.glob("*.tar")):
        index = load_index([shard])
        for i in range(len(index)):
            digest = hashlib.sha256(f"{shard.name}/{index.key(i)}".encode()).hexdigest()
            found[int(digest[:16], 16) // 2] = index.read(i), int(index.label[i])
    return found


MATRIX = [(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 1, 3)]
ALWAYS = {(1, 0), (4, 1), (2, 3)}


@pytest.mark.parametrize(
    ("world_size", "workers"),
    [
        pytest.param(*pair, marks=() if pair in ALWAYS else pytest.mark.exhaustive)
        for pair in MATRIX
    ],
)
def test_every_sample_once_on_any_number_of_ranks_and_workers(web, even, world_size, workers):
    """Shards divide evenly: each epoch is all of them, each rank has equally many micro-batches."""
    stream = opened(f"{web.url}/{PATTERN}")
    known = expected_numbers(even)
    ranks = [
        batches(stream, rank=rank, world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]
    count = 24 // world_size // 3
    order = [(e, s, i == count - 1) for e in range(2) for s in range(4) for i in range(count)]
    for rank in ranks:
        assert [(b.epoch, b.step, b.last) for b in rank] == order
        assert {len(b.labels) for b in rank} == {3}
    for epoch in range(2):
        numbers = [n for r in ranks for b in r if b.epoch == epoch for n in b.samples.tolist()]
        assert sorted(numbers) == sorted(known)
    both = [torch.stack([b.samples, b.labels], 1).tolist() for r in ranks for b in r]
    labels = dict(itertools.chain.from_iterable(both))
    assert labels == {number: label for number, (_, label) in known.items()}
    asked = Counter(name for name, _ in web.requests)
    requests = [asked[path.name] for path in even.glob("*.tar")]
    if workers < 3:
        assert set(requests) == {2}, "one an epoch"
    else:  # whose parts of an epoch end inside of shards: these are read by two
        assert sum(requests) <= 2 * (12 + world_size * workers - 1)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 3), (2, 0), (4, 1)])
def test_uneven_shards_whose_counts_are_known(shards, world_size, workers):
    """50 samples in shards of 12, 12, 12, 12 and 2, 3 steps of 15: 45 of them, none twice."""
    with serving(shards[0].parent) as web:
        stream = opened(f"{web.url}/")
        options = {"global_batch_size": 15, "micro_batch_size": 4}
        ranks = [
            batches(stream, rank=rank, world_size=world_size, workers=workers, **options)
            for rank in range(world_size)
        ]
    assert len({len(rank) for rank in ranks}) == 1
    for epoch in range(2):
        numbers = [n for r in ranks for b in r if b.epoch == epoch for n in b.samples.tolist()]
        assert len(numbers) == len(set(numbers)) == 45
        assert set(numbers) <= set(expected_numbers(shards[0].parent))


def test_images_are_decoded_and_augmented_as_by_the_indexed_reader(web, even):
    """The crop follows from (seed, epoch, sample): another epoch is another, workers are not."""
    from flatcal_dist.data import sample_seed

    known = expected_numbers(even)
    stream = opened(f"{web.url}/{PATTERN}")
    transform = training_transform(Augmentation("resized_crop"), 8)
    for b in batches(stream, max_steps=5):
        for image, number in zip(b.images, b.samples.tolist(), strict=True):
            whole = decode(known[number][0], 3, "x")
            assert torch.equal(image, transform(whole, sample_seed(5, b.epoch, number)))


def test_epochs_differ_and_runs_do_not(web):
    stream = opened(f"{web.url}/{PATTERN}")
    first, again = batches(stream, workers=3), batches(stream, workers=3)
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    epochs = [torch.cat([b.samples for b in first if b.epoch == e]) for e in (0, 1)]
    assert not torch.equal(*epochs)
    step = torch.cat([b.samples for b in first if (b.epoch, b.step) == (0, 0)]).tolist()
    known = {n: i // EVEN for i, n in enumerate(expected_numbers(Path(web.directory)))}
    assert len({known[n] for n in step}) > 3, "a step mixes shards"


@pytest.mark.parametrize("workers", [0, 3])
def test_a_resumed_run_goes_on_exactly(web, workers):
    """With the same ranks and workers, from any step, the end of an epoch among them."""
    stream = opened(f"{web.url}/{PATTERN}")
    options = {"rank": 1, "world_size": 2, "workers": workers, "max_steps": 7}
    whole = batches(stream, **options)
    for step in (1, 3, 4, 6):
        rest = batches(stream, **options, start=Position(*divmod(step, 4)))
        assert len(rest) == len(whole) - step * 4
        for a, b in zip(whole[step * 4 :], rest, strict=True):
            assert (a.epoch, a.step, a.last) == (b.epoch, b.step, b.last)
            assert torch.equal(a.samples, b.samples)
            assert torch.equal(a.images, b.images)
    with pytest.raises(DataError, match="cannot start at step 5 of epoch 0"):
        batches(stream, start=Position(0, 5))


def test_what_is_skipped_is_not_decoded(web, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "flatcal_dist.data.loading.streaming.decode",
        lambda *words: decoded.append(0) or decode(*words),
    )
    batches(opened(f"{web.url}/{PATTERN}"), start=Position(0, 3), max_steps=4)
    assert len(decoded) == 24


def test_without_counts_worker_shards_come_again_and_that_is_said(own_web, tmp_path, capfd):
    """Two ranks: one gets shards of 8 and 4, the other of 8, 4 or 2; each takes 12 an epoch."""
    write_shards(make_samples(22), tmp_path, "u", split="train", samples_per_shard=8)
    (tmp_path / "_info.json").unlink()
    stream = opened(f"{own_web.url}/u-{{0000..0002}}.tar", epoch_samples=24)
    known = expected_numbers(tmp_path)
    ranks = [
        batches(stream, rank=r, world_size=2, global_batch_size=24, micro_batch_size=12)
        for r in (0, 1)
    ]
    assert [len(rank) for rank in ranks] == [2, 2]
    said = capfd.readouterr().err
    for epoch in range(2):
        own = [ranks[r][epoch].samples.tolist() for r in (0, 1)]
        assert set(own[0]) | set(own[1]) <= set(known)
        repeated = [12 - len(set(numbers)) for numbers in own]
        assert sum(repeated) > 0
        for rank in (0, 1):
            line = f"epoch {epoch}, rank {rank}, worker 0: the shards of this worker held "
            assert (f"{line}{repeated[rank]} images too few" in said) == (repeated[rank] > 0)
    assert "approximate epochs" in stream.promise


def test_too_few_shards_for_so_many_readers(own_web, tmp_path):
    write_shards(make_samples(20), tmp_path, "u", split="train", samples_per_shard=10)
    (tmp_path / "_info.json").unlink()
    stream = opened(f"{own_web.url}/u-{{0000..0001}}.tar", epoch_samples=20)
    with pytest.raises(DataError, match="2 shards for 3 readers"):
        batches(stream, workers=3, global_batch_size=12)


def test_counts_come_from_info_or_from_the_configuration(own_web, tmp_path):
    write_shards(make_samples(20), tmp_path, "u", split="train", samples_per_shard=8)
    pattern = f"{own_web.url}/u-{{0000..0002}}.tar"
    assert opened(pattern).lengths == (8, 8, 4)
    assert len(opened(pattern)) == 20
    assert opened(f"{own_web.url}/").shards == opened(pattern).shards
    assert len(opened(pattern, epoch_samples=15)) == 15
    assert "no image comes twice" in opened(pattern).promise
    with pytest.raises(DataError, match=r"epoch_samples=21.*hold 20 samples"):
        opened(pattern, epoch_samples=21)
    own_web.always["_info.json"] = "500"
    with pytest.raises(DataError, match=r"_info.json: gave up"):
        opened(pattern, epoch_samples=15)
    own_web.always["_info.json"] = "404"
    assert opened(pattern, epoch_samples=15).lengths is None
    with pytest.raises(DataError, match=r"data.epoch_samples=N"):
        opened(pattern)
    own_web.always.clear()
    (tmp_path / "_info.json").write_text("<html>")
    with pytest.raises(DataError, match=r"_info.json does not have the form"):
        opened(pattern)


@pytest.mark.parametrize(("said", "message"), [(7, "more than the 7"), (9, "only 8 of the 9")])
def test_counts_that_are_wrong_are_found(own_web, tmp_path, said, message):
    write_shards(make_samples(16), tmp_path, "u", split="train", samples_per_shard=8)
    info = json.loads((tmp_path / "_info.json").read_text())
    info["splits"]["train"]["shard_lengths"] = [said, 8]
    (tmp_path / "_info.json").write_text(json.dumps(info))
    stream = opened(f"{own_web.url}/")
    with pytest.raises(DataError, match=rf"u-0000.tar holds {message}"):
        batches(stream, global_batch_size=said + 8, micro_batch_size=99)


MODES = ["404", "500", "cut", "stall", "long", "short", "unsized cut"]
BAD = [(mode, workers) for mode in MODES for workers in (0, 2)]


@pytest.mark.parametrize(
    ("mode", "workers"),
    [
        pytest.param(*one, marks=pytest.mark.exhaustive if one == ("stall", 0) else ())
        for one in BAD
    ],
)
def test_a_shard_that_cannot_be_had_ends_the_epoch_in_an_error(web, mode, workers):
    web.always["e-train-0007.tar"] = mode
    access = ALERT if mode == "stall" else QUICK
    with pytest.raises(DataError, match=r"http://127.0.0.1:\d+/e-train-0007.tar"):
        batches(opened(f"{web.url}/{PATTERN}", access), workers=workers)
    assert web.count("e-train-0007.tar") <= 1 + QUICK.retries


def test_a_line_that_fails_now_and_then_changes_nothing(web):
    stream = opened(f"{web.url}/{PATTERN}", ALERT)
    calm = batches(stream, workers=2)
    for number, mode in enumerate(["stall", "cut", "reset", "500"]):
        web.script[f"e-train-{number:04d}.tar"] = [mode, "fine", mode]
    bad = batches(stream, workers=2)
    assert all(torch.equal(a.images, b.images) for a, b in zip(calm, bad, strict=True))
    assert not any(web.script.values())


@pytest.mark.parametrize("place", ["label", "image"])
def test_a_flipped_bit_is_found_by_the_recorded_checksum(own_web, tmp_path, place):
    """A label that became another, or pixels: nothing else could tell."""
    shards = write_shards(make_samples(8), tmp_path, "f-train", split="train", samples_per_shard=4)
    with tarfile.open(shards[1]) as tar:
        suffix = {"label": ".cls", "image": ".png"}[place]
        member = next(m for m in tar if m.name.endswith(suffix))
    with shards[1].open("r+b") as file:
        file.seek(member.offset_data + (40 if place == "image" else 0))
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    for pattern in (f"{own_web.url}/", str(tmp_path)):
        with pytest.raises(DataError, match=r"f-train-0001.tar is damaged: its SHA-256 is"):
            batches(open_stream(pattern, "train", 7, QUICK), global_batch_size=4)
    (tmp_path / "f-train.sha256").unlink()
    assert batches(open_stream(pattern, "train", 7, QUICK), global_batch_size=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_used_is_replaced_and_that_is_said(own_web, tmp_path, workers):
    """By the next of its micro-batch, with that one's label, as often as it comes."""
    samples = make_samples(12)
    for number in (3, 7):
        samples[number] = replace(samples[number], image=samples[number].image[:60])
    write_shards(samples, tmp_path, "u", split="train", samples_per_shard=6)
    stream = opened(f"{own_web.url}/")
    options = {"workers": workers, "global_batch_size": 12, "micro_batch_size": 4}
    found = batches(stream, **options)
    assert len(found) == 6
    replaced = [one for batch in found for one in batch.replaced]
    bad = [(0, "s003"), (1, "s007")]
    assert sorted(one.sample for one in replaced if one.epoch == 0) == bad
    assert sorted(one.sample for one in replaced if one.epoch == 1) == bad
    known = {}
    for number, sample in enumerate(samples):
        shard = number // 6
        digest = hashlib.sha256(f"u-000{shard}.tar/{sample.key}".encode()).hexdigest()
        known[int(digest[:16], 16) // 2] = (shard, sample.key), sample.label
    for batch in found:
        names = [known[number][0] for number in batch.samples.tolist()]
        assert [known[n][1] for n in batch.samples.tolist()] == batch.labels.tolist()
        assert not set(names) & set(bad)
        assert all(one.by in names and "cannot be decoded" in one.reason for one in batch.replaced)
    rest = batches(stream, **options, start=Position(1, 0))
    for a, b in zip(found[3:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.replaced == b.replaced


def test_a_micro_batch_without_any_good_image_is_an_error(own_web, tar):
    tar(("a.png", png(0)[:60]), ("a.cls", b"1"), name="u.tar")
    with pytest.raises(DataError, match=r"No image of a micro-batch of 1 .*/u.tar: .* 'a' cannot"):
        batches(opened(f"{own_web.url}/u.tar", epoch_samples=1), global_batch_size=1)


def test_paths_can_be_streamed_too(even):
    stream = opened(str(even / PATTERN))
    numbers = [n for b in batches(stream, epochs=1) for n in b.samples.tolist()]
    assert sorted(numbers) == sorted(expected_numbers(even))
