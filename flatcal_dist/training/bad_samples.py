"""RUN/bad_samples.jsonl lists the images of the training data that were replaced.

The file has one JSON object for each replacement: the step of the run (from 1), epoch, shard, key,
reason, and the key of the image that took its place. The list follows from the steps alone. A run
that goes on from a checkpoint drops the entries after it, and finds them again.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import gather_object
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from flatcal_dist.data import DataError, Index, Replaced
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.files import WriteError, open_to_append, read_bytes, write_text
from flatcal_dist.ranks.distributed import FailedTogether, on_all_ranks
from flatcal_dist.urls import shown


class Entry(TypedDict):
    """One replacement. `step` counts from 1."""

    step: int
    epoch: int
    shard: str
    key: str
    reason: str
    replaced_by: str


ENTRY = TypeAdapter(Entry)


class BadSamples:
    """The list of replaced images. All ranks know it, so they stop together; rank 0 writes it.

    All ranks create it together.

    Args:
        file: Where it is kept.
        train: The training data.
        epoch_steps: The number of steps of an epoch.
        limit: How many different images may be replaced.
        done: How many steps of the run are done.
        main: Whether this is rank 0.
        say: It prints a line for the person who watches.

    Raises:
        FailedTogether: The file cannot be read or written.
    """

    def __init__(
        self,
        file: Path,
        train: Index | Stream,
        epoch_steps: int,
        limit: int,
        done: int,
        main: bool,
        say: Callable[[str], None],
    ) -> None:
        self.file, self.train, self.epoch_steps = file, train, epoch_steps
        self.limit, self.main, self.say = limit, main, say
        entries = on_all_ranks(lambda: [e for e in _read(file) if e["step"] <= done])
        self.replaced = len(entries)
        self.samples = {(entry["shard"], entry["key"]) for entry in entries}

        def drop_later_ones() -> None:
            if main and file.exists():
                write_text(file, "".join(json.dumps(entry) + "\n" for entry in entries))

        on_all_ranks(drop_later_ones)

    def add(self, replaced: Sequence[Replaced]) -> None:
        """List what the ranks replaced in a step. Each passes what it replaced; all call this.

        Raises FailedTogether beyond the limit.
        """
        found = sorted(gather_object(list(replaced)), key=lambda r: (r.step, r.sample))
        entries = on_all_ranks(lambda: [self._entry(one) for one in found])
        on_all_ranks(lambda: self._append(entries))
        self.replaced += len(entries)
        for entry in entries:
            sample = (entry["shard"], entry["key"])
            if sample not in self.samples:
                self.samples.add(sample)
                self.say(f"{entry['shard']}: image {entry['key']!r} replaced: {entry['reason']}")
        if len(self.samples) > self.limit:
            raise FailedTogether(
                f"{len(self.samples)} different images of the training data cannot be used, more "
                f"than data.max_bad_samples={self.limit}. They are listed in {self.file}; the "
                f"last: image {entry['key']!r} of {entry['shard']} {entry['reason']}. Mend the "
                "shards, or raise data.max_bad_samples; the run goes on from its last checkpoint"
            )

    def _entry(self, one: Replaced) -> Entry:
        shard, key = self._where(one.sample)
        return {
            "step": one.epoch * self.epoch_steps + one.step + 1,
            "epoch": one.epoch,
            "shard": shard,
            "key": key,
            "reason": one.reason,
            "replaced_by": self._where(one.by)[1],
        }

    def _where(self, sample: int | tuple[int, str]) -> tuple[str, str]:
        """Return shard and key of a sample of the index (its number) or a stream (shard, key)."""
        if isinstance(sample, tuple):
            return shown(str(self.train.shards[sample[0]])), sample[1]
        assert isinstance(self.train, Index)  # samples of a stream have no numbers
        shard = str(self.train.shards[self.train.shard[sample]])
        try:
            return shard, self.train.key(sample)
        except (DataError, IndexError):  # its sidecar was changed since the run began
            return shard, f"number {sample}"

    def _append(self, entries: list[Entry]) -> None:
        if not self.main:
            return
        try:
            with open_to_append(self.file) as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        except OSError as error:
            raise error if isinstance(error, WriteError) else WriteError(self.file, error) from None


def _read(file: Path) -> list[Entry]:
    """Return the entries so far. A line that was cut off by a kill is left out."""
    entries = []
    for line in read_bytes(file).split(b"\n") if file.exists() else ():
        try:
            entries.append(ENTRY.validate_json(line))
        except ValueError:
            continue
    return entries
