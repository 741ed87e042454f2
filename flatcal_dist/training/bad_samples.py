"""RUN/bad_samples.jsonl: which images of the training data were replaced, and when to stop.

One JSON object per replacement: step (of the run, from 1), epoch, shard, key, reason, and the key
that was trained on instead. Like everything else of a run the list follows from its steps alone: a
run that goes on from a checkpoint drops what was listed after it, and finds it again.
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
    """All ranks know the whole list, so they agree on its end; rank 0 (`main`) writes it.

    Made by all ranks together, after `done` steps of the run. Raises FailedTogether.
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
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        on_all_ranks(lambda: main and file.exists() and write_text(file, lines))

    def add(self, replaced: Sequence[Replaced]) -> None:
        """List what the ranks replaced in a step, each its own; called by all of them.

        Raises FailedTogether, on all ranks, beyond the limit.
        """
        found = sorted(gather_object(list(replaced)), key=lambda r: (r.step, r.sample))
        entries = on_all_ranks(lambda: [self._entry(one) for one in found])
        on_all_ranks(lambda: self.main and self._append(entries))
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
        """Shard and key."""
        if isinstance(sample, tuple):
            return shown(self.train.shards[sample[0]]), sample[1]
        shard = str(self.train.shards[self.train.shard[sample]])
        try:
            return shard, self.train.key(sample)
        except (DataError, IndexError):  # its sidecar was changed since the run began
            return shard, f"number {sample}"

    def _append(self, entries: list[Entry]) -> None:
        try:
            with open_to_append(self.file) as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        except OSError as error:
            raise error if isinstance(error, WriteError) else WriteError(self.file, error) from None


def _read(file: Path) -> list[Entry]:
    """The entries of the list so far; a line that is none, cut off by a kill say, is left out."""
    entries = []
    for line in read_bytes(file).split(b"\n") if file.exists() else ():
        try:
            entries.append(ENTRY.validate_json(line))
        except ValueError:
            continue
    return entries
