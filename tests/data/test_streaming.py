"""The streaming reader against a real HTTP server that stalls, cuts, resets and refuses."""

import hashlib
import io
import itertools
import json
import os
import pickle
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import make_samples, png
from fsspec.implementations.memory import MemoryFileSystem

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
from flatcal_dist.data.shards.connections import NotThere
from flatcal_dist.data.shards.listing import Stream, list_shards, open_stream
from flatcal_dist.data.shards.remote import RemoteFile, read_small
from flatcal_dist.data.shards.tar_stream import read_samples
from tests.support.web import Web, serving

QUICK = Access(stall_timeout=60, retries=3, backoff=0.01)  # a busy machine is no bad connection
ALERT = Access(stall_timeout=1, retries=3, backoff=0.01)  # where silence is meant
EVEN, PATTERN = 8, "e-train-{0000..0011}.tar"  # 12 shards of 8: they divide among 1, 2, 3, 4, 6, 12


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("even")
    write_shards(make_samples(96), directory, "e-train", split="train", samples_per_shard=EVEN)
    return directory


@pytest.fixture
def web(even):
    with serving(even) as served:
        yield served


@pytest.fixture
def own_web(tmp_path):
    with serving(tmp_path) as served:
        yield served


def read(web: Web, name: str, access: Access = QUICK) -> bytes:
    with RemoteFile(f"{web.url}/{name}", access) as file:
        return b"".join(iter(lambda: file.read(5000), b""))


# One file over a bad line


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "script",
    [
        [],
        ["stall"],
        ["cut", "cut"],
        ["reset"],
        ["500", "503", "429"],
        ["unsized"],
        ["cut", "500", "stall"],
    ],
    ids=" ".join,
)
def test_a_bad_connection_is_mended(even, script, ranges):
    """All bytes, in order, each failure costing one request, and going on where it can."""
    name = "e-train-0003.tar"
    with serving(even, ranges=ranges) as web:
        web.script[name] = list(script)
        access = ALERT if "stall" in script else QUICK
        assert read(web, name, access) == (even / name).read_bytes()
        failures = [s for s in script if s != "unsized"]
        assert web.count(name) == len(failures) + 1
        if "cut" in script:
            assert web.requests[1][1] > 0, "the second asks for the rest"


@pytest.mark.parametrize("mode", ["500", "stall", "cut", "reset", "long"])
def test_a_connection_that_stays_bad_ends_in_an_error(web, mode):
    name = "e-train-0001.tar"
    web.always[name] = mode
    access = ALERT if mode == "stall" else QUICK
    with pytest.raises(DataError, match=rf"{name}: gave up at byte .* after 4 attempts") as error:
        read(web, name, access)
    assert web.count(name) == 1 + QUICK.retries
    assert web.url in str(error.value)


def test_a_connection_that_crawls_counts_as_one_that_stalls(web):
    """A byte now and then is never silence, and would keep a run for days."""
    name = "e-train-0001.tar"
    web.script[name] = ["trickle"]
    crawling = Access(stall_timeout=0.3, retries=1, backoff=0.01)
    assert read(web, name, crawling) == (web.directory / name).read_bytes()
    assert web.count(name) == 2
    web.always[name] = "trickle"
    with pytest.raises(DataError, match=rf"{name}: gave up .* only \d+ bytes came in"):
        read(web, name, crawling)


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_what_is_not_there_is_not_asked_for_again(web, status):
    web.always["e-train-0001.tar"] = status
    with pytest.raises(NotThere, match=rf"/e-train-0001.tar: the server answered {status}"):
        read(web, "e-train-0001.tar")
    assert len(web.requests) == 1


def test_nobody_listens():
    with serving(Path()) as web:
        url = web.url
    with pytest.raises(DataError, match=r"gave up at byte 0 after 4 attempts.*Connection"):
        read_small(f"{url}/a.tar", QUICK)


def test_a_shard_that_changes_in_the_middle_is_refused(own_web, tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(20_000))
    own_web.script["a.tar"] = ["cut"]
    with RemoteFile(f"{own_web.url}/a.tar", QUICK) as file:
        file.read(5000)
        (tmp_path / "a.tar").write_bytes(bytes(30_000))
        with pytest.raises(DataError, match="changed while it was read"):
            list(iter(lambda: file.read(5000), b""))


def test_passwords_and_signatures_stay_out_of_messages(web):
    url = web.url.replace("http://", "http://me:secret@") + "/none.tar?signature=secret"
    with pytest.raises(NotThere) as error:
        read_small(url, QUICK)
    assert "none.tar" in str(error.value)
    assert "secret" not in str(error.value)


def test_a_pipe_is_a_command_and_has_to_be_allowed(even, tmp_path):
    name = str(even / "e-train-0001.tar")
    told = f"pipe:touch {tmp_path}/ran; cat {name}"
    with pytest.raises(DataError, match=r"data.allow_pipe"):
        list_shards([told], "train", QUICK)
    with pytest.raises(DataError, match=r"data.allow_pipe"):
        read_small(told, QUICK)
    assert not (tmp_path / "ran").exists()
    allowed = Access(stall_timeout=60, retries=1, backoff=0.01, allow_pipe=True)
    assert read_small(told, allowed) == (even / "e-train-0001.tar").read_bytes()
    assert (tmp_path / "ran").exists()
    # It fails in the middle once: the second attempt goes on at the same byte.
    once = f"pipe:if mkdir {tmp_path}/once; then head -c 3000 {name}; exit 7; else cat {name}; fi"
    assert read_small(once, allowed) == (even / "e-train-0001.tar").read_bytes()
    with pytest.raises(DataError, match="ended with code 3"):
        read_small("pipe:exit 3", allowed)
    with pytest.raises(DataError, match="no byte came for too long"):
        read_small("pipe:sleep 60", Access(0.1, 1, 0.01, allow_pipe=True))


@pytest.mark.parametrize("url", ["ftp://host/a.tar", "file:///etc/passwd", "s4://b/a.tar"])
def test_other_schemes_are_refused(url):
    with pytest.raises(DataError, match="is no scheme that shards are read from"):
        list_shards(url, "train", QUICK)
    with pytest.raises(DataError, match="is no scheme that shards are read from"):
        read_small(url, QUICK)


def test_names_are_not_rewritten_from_the_environment(monkeypatch):
    """webdataset would replace {WDS_X} and apply WDS_REWRITE; here braces are only braces."""
    monkeypatch.setenv("WDS_REWRITE", "http://host=pipe:touch ")
    monkeypatch.setenv("WDS_X", "pipe:touch")
    assert list_shards("http://host/{WDS_X}.tar", "train", QUICK) == ["http://host/{WDS_X}.tar"]


class _Store(MemoryFileSystem):
    """An object store whose reads fail as those of stores do: not by OSError; or end too early."""

    protocol = "s3"
    store: dict = {}  # noqa: RUF012
    reads = itertools.count()

    def open(self, path, mode="rb", **options):
        if mode == "wb":
            return super().open(path, mode, **options)
        file = super().open(path, mode)
        inner = file.read

        def read(size=-1):
            number = next(self.reads)
            if number == 2:
                raise RuntimeError("EndpointConnectionError")
            return b"" if number == 4 else inner(size)

        return _File(read, file)


class _File:
    def __init__(self, read, file):
        self.read, self.seek, self.close, self.size = read, file.seek, file.close, file.size


def test_object_stores_are_read_through_fsspec(even, monkeypatch):
    registry = sys.modules["fsspec.registry"]._registry
    monkeypatch.setitem(registry, "s3", _Store)
    content = (even / "e-train-0002.tar").read_bytes()
    fsspec.filesystem("s3").pipe("bucket/a.tar", content)
    with RemoteFile("s3://bucket/a.tar", QUICK) as file:
        assert b"".join(iter(lambda: file.read(4000), b"")) == content
    with pytest.raises(NotThere, match=r"s3://bucket/b.tar: no such shard"):
        read_small("s3://bucket/b.tar", QUICK)


def test_a_scheme_without_its_package_says_so(monkeypatch):
    def missing(scheme):
        raise ImportError("install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match="gs:// needs another package: install gcsfs"):
        read_small("gs://bucket/a.tar", QUICK)


# One shard


def samples_of(content: bytes, classes: int = 7) -> list[tuple[str, bytes, int]]:
    return list(read_samples(io.BytesIO(content), "http://host/a.tar", classes))


def test_samples_are_those_of_the_index(even):
    for shard in sorted(even.glob("*.tar"))[:2]:
        index = load_index([shard])
        expected = [(index.key(i), index.read(i), int(index.label[i])) for i in range(len(index))]
        assert samples_of(shard.read_bytes()) == expected


def test_a_tar_cut_anywhere_is_an_error(even):
    """At every block's beginning, where tarfile takes the end for the end; and within blocks."""
    whole = (even / "e-train-0001.tar").read_bytes()
    samples = samples_of(whole)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
    cuts = [*range(0, end + 1, 512), *range(100, end, 5000), end + 511]
    assert len(cuts) > 40
    for cut in cuts:
        with pytest.raises(DataError, match=r"a.tar cannot be read.*cut short"):
            samples_of(whole[:cut])
    assert samples_of(whole[: end + 512]) == samples, "one block of zeros is an end"


def test_a_damaged_header_is_an_error(even):
    whole = (even / "e-train-0001.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        offsets = [member.offset for member in tar]
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset + 3] ^= 1
        with pytest.raises(DataError, match=r"a.tar cannot be read"):
            samples_of(bytes(damaged))


def test_foreign_shards_that_are_wrong_are_named(tar):
    image, good = png(0), ("b.cls", b"1")
    cases = [
        ([("a.png", image), ("b.png", image), ("a.cls", b"1"), good], "'a' has no label.*adjacent"),
        ([("a.png", image)], "sample 'a' has no label"),
        ([("a.cls", b"1"), ("b.png", image), good], "sample 'a' has no image"),
        ([("a.png", b""), ("a.cls", b"1")], "sample 'a' has an empty image"),
        ([("a.png", image), ("a.jpg", image), ("a.cls", b"1")], "'a' has several images"),
        ([("a.png", image), ("a.cls", b"cat")], "'a' has the label 'cat'"),
        ([("a.png", image), ("a.cls", b"7")], "'a' has the label 7, outside 0..6"),
        ([("a.png", image), ("a.cls", b"-1")], "'a' has the label -1, outside 0..6"),
        ([("a.png", image), ("a.cls", b"1"), ("a.cls", b"2")], "a.cls: duplicate"),
        (
            [*[("a.png", image), ("a.cls", b"1")], *[("b.png", image), good]] * 2,
            "members of sample 'a' are not adjacent",
        ),
        ([("../a.png", image), ("../a.cls", b"1")], "absolute name or one with"),
        ([("/a.png", image), ("/a.cls", b"1")], "absolute name or one with"),
    ]
    for members, message in cases:
        with pytest.raises(DataError, match=message) as error:
            samples_of(tar(*members).read_bytes())
        assert "http://host/a.tar" in str(error.value)


def test_a_compressed_or_joined_tar_is_an_error(tar):
    members = [("a.png", png(0)), ("a.cls", b"1")]
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        samples_of(tar(*members, mode="w:gz").read_bytes())
    with pytest.raises(DataError, match="data follows the end-of-archive mark"):
        samples_of(tar(*members).read_bytes() * 2)


def test_sizes_that_would_not_fit_into_memory_are_refused():
    plain, sparse, pax = tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE
    large = r"'a.png' has [\d,]+ bytes"
    for size, kind, message in (
        (1 << 32, plain, large),
        (1 << 34, plain, large),  # too large for its field: a pax header says so
        (1 << 10, sparse, "'a.png' is no file but a sparse file"),
        (1 << 32, pax, "a header of"),
    ):
        header = tarfile.TarInfo("a.png")
        header.size, header.type = size, kind
        with pytest.raises(DataError, match=message):
            samples_of(header.tobuf())


class _Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_nothing_is_unpickled(tar, tmp_path, monkeypatch):
    """Members that webdataset's own decoding would unpickle or hand to torch.load."""
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    trap = pickle.dumps(_Trap())
    names = ["a.pyd", "a.pickle", "a.pkl", "a.pth", "a.cls", "a.png"]
    content = {"a.cls": b"1", "a.png": png(0)}
    shard = tar(*[(name, content.get(name, trap)) for name in names])
    assert samples_of(shard.read_bytes()) == [("a", png(0), 1)]
    assert not (tmp_path / "sprung").exists()


# Batches


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


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["404", "500", "cut", "stall", "long", "short", "unsized cut"])
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
