"""What makes two configurations one run: the fingerprint, the differences, and what is written."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatcal_dist.config.choosing import CHOOSERS
from flatcal_dist.config.files import dump_yaml, private_file
from flatcal_dist.config.root import Config
from flatcal_dist.files import write_text
from flatcal_dist.urls import identified, public

# What may differ between two starts of one run: it changes where or how fast the run computes, or
# who watches, not what it is meant to compute (batch norm and dropout do see the micro-batches).
# Everything else belongs to the identity of the run.
MAY_CHANGE = (
    "run.dir", "run.axes", "run.world_size", "run.start_again", "data.workers",
    "data.micro_batch_size",
    "data.max_bad_samples", "data.cache", "data.cache_limit", "data.stall_timeout", "data.retries",
    "data.allow_pipe",
    "train.log_every_steps", "train.validate_every_epochs", "train.checkpoint_every_epochs",
    "train.checkpoint_every_steps", "train.keep_checkpoints", "train.keep_best",
    "train.stop_after_minutes", "train.stop_margin_minutes", "train.hang_minutes",
    "train.collective_timeout_minutes", "sharpness.allow_other_samples", "evaluate", "wandb",
)  # fmt: skip


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits that identify what the run computes, whatever its directory."""
    kept = {k: identified(v) for k, v in flatten(config) if not _may_change(k)}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(old: Config, new: Config) -> list[str]:
    """What keeps `new` from continuing the run of `old`: one line per key.

    Another engine does not: a checkpoint is resharded. It has a fingerprint of its own all the
    same, so that engines are compared in different directories. Neither do renewed credentials.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    chosen = {c.section for c in CHOOSERS.values() if before[c.key] != after[c.key]}
    return [
        f"{key}: the run has {public(before.get(key))!r}, now {public(after.get(key))!r}"
        + " (they differ in what is not shown)"
        * (public(before.get(key)) == public(after.get(key)))
        for key in sorted(before.keys() | after.keys())
        if identified(before.get(key)) != identified(after.get(key))
        and not _may_change(key)
        and key != "train.engine"
        # Keys that only one of two choices has follow from the choice, which is named.
        and not (key.partition(".")[0] in chosen and (key in before) != (key in after))
    ]


def to_yaml(config: Config) -> str:
    """The resolved configuration, loadable again, without the credentials of URLs."""
    return dump_yaml(public(config.model_dump()))


def write(config: Config, file: Path) -> None:
    """Write it resolved; credentials of URLs beside it, into a file that its owner alone may read.

    `load` finds both. Raises WriteError.
    """
    if private := _only_private(config.model_dump()):
        write_text(private_file(file), dump_yaml(private), private=True)
    else:
        private_file(file).unlink(missing_ok=True)
    write_text(file, to_yaml(config))


def _only_private(values: dict) -> dict:
    """What `public` changes, in the sections where it stands."""
    opened = {k: _only_private(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {k: v for k, v in opened.items() if v and v != public(values[k])}


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value, sections and options opened."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}" if path else str(key))
        else:
            yield path, value

    yield from walk(config.model_dump(), "")


def _may_change(key: str) -> bool:
    return any(key == entry or key.startswith(entry + ".") for entry in MAY_CHANGE)
