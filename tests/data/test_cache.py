"""The shard cache: whole, once, whoever asks and whoever dies."""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import tarfile
import time
from pathlib import Path

import pytest

from flatcal_dist.data import DataError, index_shard, write_shards
from flatcal_dist.data.loading.pieces import Piece, read_piece
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.cache import ShardCache
from flatcal_dist.data.shards.listing import open_stream
from tests.support.samples import make_samples
from tests.support.web import Web, serving

QUICK = Access(stall_timeout=60, retries=2, backoff=0.01)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards o-0000 to o-0003 of 6 samples; the same names with others in other/."""
    directory = tmp_path_factory.mktemp("origin")
    write_shards(make_samples(24), directory, "o", split="train", samples_per_shard=6)
    other = make_samples(6, "other")
    write_shards(other, directory / "other", "o", split="train", samples_per_shard=6)
    return directory


@pytest.fixture
def web(origin):
    with serving(origin) as served:
        yield served


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path / "cache", QUICK)


def fetch(cache: ShardCache, url: str, **options) -> bytes:
    with cache.open(url, **options) as file:
        return file.read()


def held(cache: ShardCache) -> list[str]:
    """What is there besides locks, without the hashes."""
    names = (path.name for path in cache.directory.iterdir() if not path.name.endswith(".lock"))
    return sorted(name.partition("-")[2] for name in names)


def test_a_shard_is_downloaded_once_and_whole(web: Web, origin, tmp_path):
    cache = ShardCache(tmp_path / "cache", Access(stall_timeout=1, retries=2, backoff=0.01))
    url = f"{web.url}/o-0001.tar"
    content = (origin / "o-0001.tar").read_bytes()
    web.script["o-0001.tar"] = ["cut", "stall"]
    for _ in range(3):
        assert fetch(cache, url) == content
    assert web.count("o-0001.tar") == 3, "two failures, one success, nothing after"
    about = json.loads(cache.path(url).with_suffix(".json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    assert about == {"url": url, "size": len(content), "sha256": digest}
    assert held(cache) == ["o-0001.json", "o-0001.tar"]


def test_shards_of_one_name_do_not_collide(web, origin, cache):
    first, second = f"{web.url}/o-0000.tar", f"{web.url}/other/o-0000.tar"
    for _ in range(2):
        assert fetch(cache, first) == (origin / "o-0000.tar").read_bytes()
        assert fetch(cache, second) == (origin / "other/o-0000.tar").read_bytes()
    assert cache.path(first) != cache.path(first + "?version=2")
    hostile = cache.path("https://host/..%2f..%2fetc/pass wd?x=/../../y")
    assert hostile.parent == cache.directory


@pytest.mark.parametrize("mode", ["500", "404", "cut", "long", "short", "unsized cut"])
def test_nothing_is_kept_of_what_did_not_come_whole(web, cache, mode):
    web.always["o-0001.tar"] = mode
    with pytest.raises(DataError, match=r"http://127.0.0.1:\d+/o-0001.tar"):
        fetch(cache, f"{web.url}/o-0001.tar")
    assert held(cache) == []
    assert web.count("o-0001.tar") <= 1 + QUICK.retries


def test_what_came_wrong_is_asked_for_once_more(web, origin, cache):
    web.script["o-0001.tar"] = ["unsized cut"]
    content = (origin / "o-0001.tar").read_bytes()
    assert fetch(cache, f"{web.url}/o-0001.tar") == content
    good = hashlib.sha256((origin / "o-0002.tar").read_bytes()).hexdigest()
    assert fetch(cache, f"{web.url}/o-0002.tar", sha256=good.upper())
    with pytest.raises(DataError, match=rf"o-0003.tar came twice .* expected {good}"):
        fetch(cache, f"{web.url}/o-0003.tar", sha256=good)


def test_recorded_checksums_are_checked_while_streaming(tmp_path, cache):
    """By the file that is written beside the shards."""
    write_shards(make_samples(12), tmp_path, "s", split="train", samples_per_shard=6)
    path = tmp_path / "s.sha256"
    digest = hashlib.sha256((tmp_path / "s-0001.tar").read_bytes()).hexdigest()
    assert digest in path.read_text()
    wrong = digest[::-1]
    path.write_text(path.read_text().replace(digest, wrong))
    with serving(tmp_path) as web:
        stream = open_stream(f"{web.url}/", "train", 7, QUICK, cache=cache)
        assert len(list(read_piece(stream, Piece(0, 0, 6)))) == 6
        with pytest.raises(DataError, match=rf"s-0001.tar came twice .* expected {wrong}"):
            next(read_piece(stream, Piece(1, 0, 6)))


@pytest.mark.parametrize("recorded", [True, False])
def test_a_flipped_bit_in_a_kept_shard_is_found(tmp_path, cache, recorded):
    """Of its label, say; by the checksum from beside the shard, or else by that of the download."""
    write_shards(make_samples(6), tmp_path, "s", split="train", samples_per_shard=6)
    if not recorded:
        (tmp_path / "s.sha256").unlink()
    with serving(tmp_path) as web:
        stream = open_stream(f"{web.url}/", "train", 7, QUICK, cache=cache)
        assert len(list(read_piece(stream, Piece(0, 0, 6)))) == 6
        kept = cache.path(stream.shards[0])
        with tarfile.open(kept) as tar:
            label = next(member for member in tar if member.name.endswith(".cls"))
        with kept.open("r+b") as file:
            file.seek(label.offset_data)
            file.write(b"6")
        with pytest.raises(DataError, match=rf"is damaged: .* Delete {kept}"):
            list(read_piece(stream, Piece(0, 0, 6)))


@pytest.mark.parametrize(
    "damage", ["cut", "fifo", "no json", "{", "[]", '{"size": []}', "[" * 9999]
)
def test_a_damaged_entry_is_downloaded_again(web, origin, cache, damage):
    url = f"{web.url}/o-0001.tar"
    content = fetch(cache, url)
    path = cache.path(url)
    if damage == "cut":
        os.truncate(path, 700)
    elif damage == "no json":
        path.with_suffix(".json").unlink()
    elif damage == "fifo":
        path.unlink()
        os.mkfifo(path)
    else:
        path.with_suffix(".json").write_text(damage)
    assert fetch(cache, url) == content
    assert web.count("o-0001.tar") == 2


def _fetch_to(queue, cache: ShardCache, url: str) -> None:
    queue.put(hashlib.sha256(fetch(cache, url)).hexdigest())


def test_processes_that_ask_at_once_download_once(web, origin, cache):
    """Four processes, one request; three of them wait for the lock and find the shard."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    url = f"{web.url}/o-0002.tar"
    processes = [
        context.Process(target=_fetch_to, args=(queue, cache, url), daemon=True) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert found == {hashlib.sha256((origin / "o-0002.tar").read_bytes()).hexdigest()}
    assert web.count("o-0002.tar") == 1


def test_a_dead_downloader_blocks_nobody(web, cache):
    """Killed in the middle, the lock in its hands and half a shard on the disk."""
    web.script["o-0003.tar"] = ["stall"]
    url = f"{web.url}/o-0003.tar"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=fetch, args=(cache, url), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    # Before its request has come, the stall would meet the next one.
    while not web.count("o-0003.tar") or not list(cache.directory.glob(".*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    while process.is_alive():  # `join` waits for whoever inherited its pipe, too
        time.sleep(0.01)
    assert len(list(cache.directory.glob(".*.part"))) == 1
    assert fetch(cache, url)
    assert held(cache) == ["o-0003.json", "o-0003.tar"]


def test_beyond_the_limit_what_was_unused_longest_goes(web, origin, cache):
    size = (origin / "o-0000.tar").stat().st_size
    small = ShardCache(cache.directory, QUICK, limit=2 * size)
    urls = [f"{web.url}/o-{number:04d}.tar" for number in range(4)]
    fetch(small, urls[0])
    index_shard(small.path(urls[0]))  # now the indexed reader's
    for age, url in ((300, urls[1]), (200, urls[2])):
        fetch(small, url)
        os.utime(small.path(url), (time.time() - age,) * 2)
    fetch(small, urls[1])  # used again
    with small.open(urls[2]) as still:
        os.utime(small.path(urls[2]), (time.time() - 200,) * 2)
        fetch(small, urls[3])
        assert still.read() == (origin / "o-0002.tar").read_bytes(), "open, so readable"
    tars = [name for name in held(small) if name.endswith(".tar")]
    assert tars == ["o-0000.tar", "o-0001.tar", "o-0003.tar"]
    assert fetch(small, urls[2]), "and it can be had again"


def _with_little_room(queue, cache: ShardCache, url: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # writing beyond fails, as on full disk
    try:
        fetch(cache, url)
    except DataError as error:
        queue.put(str(error))


def test_a_disk_without_room_is_said(web, cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (queue, cache, f"{web.url}/o-0001.tar")
    process = context.Process(target=_with_little_room, args=arguments, daemon=True)
    process.start()
    message = queue.get(timeout=60)
    process.join(60)
    assert "data.cache_limit" in message
    assert str(cache.directory) in message
    assert held(cache) == []


def test_a_directory_that_cannot_be_one(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache: .* cannot take o-0001.tar"):
        fetch(ShardCache(tmp_path / "file", QUICK), f"{web.url}/o-0001.tar")
