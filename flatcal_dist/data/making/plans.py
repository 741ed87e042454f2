"""Plans of shards: which source, seed and encoding the shards of a split come from.

A plan lies beside the shards as PREFIX-SPLIT.plan.json. It is locked while shards are written.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.writing import locked

Plan = dict[str, Any]  # the content of PREFIX-SPLIT.plan.json


def refuse_other_plan(directory: Path, name: str, split: str) -> None:
    """Raise DataError if the directory holds other shards of the split, which would be hidden."""
    for path in sorted({*directory.glob("*.plan.json")} - {directory / f"{name}.plan.json"}):
        other = path.name.removesuffix(".plan.json")
        if other.endswith(f"-{split}") and any(directory.glob(f"{escape(other)}-[0-9]*.tar")):
            raise DataError(
                f"{directory} already holds shards {other!r} of split {split!r}: with "
                f"{name!r} beside them, readers would see only one of the two. Delete them "
                f"and {path.name}, or choose another directory."
            )


@contextmanager
def planned(directory: Path, name: str, plan: Plan) -> Iterator[bool]:
    """Write the plan, or compare it with the one that is there, and hold a lock until the end.

    Yields whether the file system has locks. Raises DataError if there is another plan, or if
    another process holds the lock.
    """
    path = directory / f"{name}.plan.json"
    old = sorted(directory.glob(f"{escape(name)}-[0-9]*.tar"))
    if old and not path.exists():
        raise DataError(
            f"{directory} already holds {len(old)} shards of {name!r} ({old[0].name}, ...) without "
            "a plan, so what they hold is not known. Delete them or choose another directory."
        )
    with ExitStack() as stack:
        path.touch()
        try:
            alone = stack.enter_context(locked(path, wait=False))
        except BlockingIOError as error:
            raise DataError(
                f"Another `flatcal shard` is writing {name!r} into {directory}. Wait for its end."
            ) from error
        if old:
            _compare(path, plan)
        else:
            for other in sorted({*directory.glob("*.plan.json")} - {path}):
                _compare_classes(other, path, plan)
            path.write_text(json.dumps(plan, indent=1) + "\n")
        yield alone


def _compare(path: Path, plan: Plan) -> None:
    try:
        old = _flat(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Delete it and its shards.") from error
    new = _flat(plan)
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if different:
        told = [
            f"{key} was {old.get(key)}, is {new.get(key)}"
            if len(f"{old.get(key)}{new.get(key)}") < 60
            else f"{key} differs"
            for key in different
        ]
        raise DataError(
            f"{path.parent} holds shards of {path.name.removesuffix('.plan.json')!r} that were "
            f"planned otherwise: {'; '.join(told)}. Use the same source and options, delete those "
            f"shards and {path.name}, or choose another directory."
        )


def _compare_classes(other: Path, path: Path, plan: Plan) -> None:
    """Raise DataError if another split has other classes: its evaluation would be wrong."""
    theirs = json.loads(other.read_text())["classes"]
    odd = sorted(set(theirs) ^ set(plan["classes"]))
    if odd and other.name.rpartition("-")[0] == path.name.rpartition("-")[0]:
        raise DataError(
            f"This source has {len(plan['classes'])} classes, but {other.name} in {other.parent} "
            f"has {len(theirs)}: {odd[0]!r} is only in one of them ({len(odd)} such classes), so "
            "equal labels would mean different classes. Complete the source, or choose another "
            "directory."
        )


def _flat(plan: Plan) -> dict[str, Any]:
    source = {f"source {key}": value for key, value in plan["source"].items()}
    return {**source, **{key: value for key, value in plan.items() if key != "source"}}
