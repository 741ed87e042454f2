"""Where shards come from, as the configuration says: files, URLs, and the cache of downloads."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from flatcal_dist.config import DataConfig
from flatcal_dist.data import DataError, index_shard
from flatcal_dist.data.shards.access import Access, is_remote
from flatcal_dist.data.shards.cache import ShardCache
from flatcal_dist.data.shards.listing import checksums, list_shards
from flatcal_dist.data.shards.sidecars import sidecar
from flatcal_dist.ranks.distributed import on_all_ranks

DOWNLOAD_ROUND = 60  # seconds; far below the timeout of a collective


def streams(data: DataConfig) -> bool:
    """Tell whether training reads its shards from front to back."""
    if data.train is None:
        return False
    return data.reader == "streaming" or (data.reader == "auto" and remote(data.train))


def remote(pattern: str | list[str]) -> bool:
    """Tell whether any of these shards is a URL or a command."""
    return any(is_remote(one) for one in ([pattern] if isinstance(pattern, str) else pattern))


def access(data: DataConfig) -> Access:
    """Return how patient readers are, and what they may open."""
    return Access(
        stall_timeout=data.stall_timeout, retries=data.retries, allow_pipe=data.allow_pipe
    )


def cache_of(data: DataConfig, key: str) -> ShardCache:
    """Return the cache of downloaded shards. Raises DataError, which names the key, without one."""
    if data.cache is None:
        raise DataError(
            f"{key} is read in any order, so its shards have to be downloaded from their URLs: "
            "name a directory for them, data.cache=DIRECTORY."
        )
    limit = data.cache_limit << 30 if data.cache_limit else None
    return ShardCache(Path(data.cache).expanduser(), access(data), limit)


def download(
    data: DataConfig,
    accelerator: Accelerator,
    *splits: str,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Download shards from URLs that will be read in any order into the cache, and index them.

    All ranks take part, and each begins with another share. They work in rounds, so that no rank
    waits in a collective for as long as a download takes.

    Args:
        data: The configuration of the data.
        accelerator: All its ranks take part.
        splits: "train", "validation" or both.
        alive: It is called after each round.

    Raises:
        FailedTogether: A shard could not be downloaded.
    """
    todo = on_all_ranks(lambda: _to_download(data, splits))
    first = len(todo) * accelerator.process_index // accelerator.num_processes
    todo = todo[first:] + todo[:first]

    def some() -> int:
        until = time.monotonic() + DOWNLOAD_ROUND
        while todo and time.monotonic() < until:
            cache, url, sha256 = todo[0]
            cache.open(url, sha256).close()
            if not sidecar(cache.path(url)).exists():
                index_shard(cache.path(url))
            del todo[0]
        return len(todo)

    while left := max(gather_object([on_all_ranks(some)])):
        accelerator.print(f"downloading: {left:,} shards to go")
        alive()


def _to_download(
    data: DataConfig, splits: Sequence[str]
) -> list[tuple[ShardCache, str, str | None]]:
    found = []
    for split in splits:
        pattern = getattr(data, split)
        if pattern is None or not remote(pattern) or (split == "train" and streams(data)):
            continue
        urls = [n for n in list_shards(pattern, split, access(data)) if is_remote(n)]
        cache = cache_of(data, f"data.{split}")
        digests = checksums(urls, access(data))
        found += [(cache, url, digest) for url, digest in zip(urls, digests, strict=True)]
    return found
