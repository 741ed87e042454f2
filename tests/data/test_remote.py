"""One shard from a web server that stalls, cuts, resets and refuses; from stores and pipes."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from flatcal_dist.data import (
    DataError,
)
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.connections import NotThere
from flatcal_dist.data.shards.listing import list_shards
from flatcal_dist.data.shards.remote import RemoteFile, read_small
from tests.support.samples import ALERT, QUICK
from tests.support.web import Web, serving


def read(web: Web, name: str, access: Access = QUICK) -> bytes:
    with RemoteFile(f"{web.url}/{name}", access) as file:
        return b"".join(iter(lambda: file.read(5000), b""))


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
    access = replace(ALERT, stall_timeout=0.5) if mode == "stall" else QUICK
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
