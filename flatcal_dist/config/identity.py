"""What makes two configurations one run: fingerprint and differences. And how they are written."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatcal_dist.config.checking.choosing import CHOOSERS
from flatcal_dist.config.files import private_file
from flatcal_dist.config.root import Config
from flatcal_dist.config.yaml_core import dump_yaml
from flatcal_dist.files import write_text
from flatcal_dist.urls import identified, public

# These may differ between two starts of one run. They change where or how fast the run computes, or
# who watches, not what it is meant to compute (though batch norm and dropout see micro-batches).
# Every other key belongs to the identity of the run.
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
    """Return eight hexadecimal digits that identify what a run computes, in any directory.

    Choices and all that is not at its default count. So the same command finds its run also after
    an update of this package that has new keys. A default that an update changed is found by
    `differences`. Where each micro-batch has its own perturbation, its size counts as well.
    """
    chosen = chosen_values(config)
    kept = {k: identified(v) for k, v in _walk(chosen, "") if not _may_change(k)}
    if perturbs_micro_batches(config):
        kept["data.micro_batch_size"] = config.data.micro_batch_size
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def perturbs_micro_batches(config: Config) -> bool:
    """Tell whether data.micro_batch_size is the number of samples of a perturbation."""
    per_micro_batch = getattr(config.sharpness, "per_micro_batch", False)
    return per_micro_batch and config.data.micro_batch_size is not None


def differences(old: Config, new: Config) -> list[str]:
    """Return what keeps `new` from continuing the run of `old`, one line for each key.

    Another engine may continue it, because checkpoints are resharded. Engines still have different
    fingerprints, so that they can be compared in different directories. Renewed credentials may
    continue it, too.
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
        # Keys that only one of the two choices has follow from the choice, which is in the list.
        and not (key.partition(".")[0] in chosen and (key in before) != (key in after))
    ]


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, without the credentials of URLs."""
    return dump_yaml(public(config.model_dump()))


def write(config: Config, file: Path) -> None:
    """Write the whole configuration, and the credentials of URLs into a private file beside it.

    Only its owner may read the latter. `load` finds both. Raises WriteError.
    """
    if private := _only_private(config.model_dump()):
        write_text(private_file(file), dump_yaml(private), private=True)
    else:
        private_file(file).unlink(missing_ok=True)
    write_text(file, to_yaml(config))


def _only_private(values: dict) -> dict:
    """Return the values that `public` changes, in their sections."""
    opened = {k: _only_private(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {k: v for k, v in opened.items() if v and v != public(values[k])}


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield pairs of dotted key and value, also of what lies in sections and options."""
    yield from _walk(config.model_dump(), "")


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def chosen_values(config: Config) -> dict[str, dict[str, Any]]:
    """Return, by section, the choice that a section makes and the keys that differ from defaults.

    Sections that make no choice and hold defaults alone are left out.
    """
    found = {}
    for name in Config.model_fields:
        section = getattr(config, name)
        by = CHOOSERS[name].by if name in CHOOSERS else None
        fields = type(section).model_fields
        kept = {
            key: value
            for key, value in section.model_dump().items()
            if key == by or value != fields[key].get_default(call_default_factory=True)
        }
        if kept:
            found[name] = kept
    return found


def _may_change(key: str) -> bool:
    return any(key == entry or key.startswith(entry + ".") for entry in MAY_CHANGE)
