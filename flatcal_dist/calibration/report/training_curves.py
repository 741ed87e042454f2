"""The figures of each epoch of a training run, for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "val/"
COLUMNS = (
    "accuracy", "nll", "ece", "signed_gap", "auroc", "aurc",
    "mean_entropy", "mean_entropy_correct", "mean_entropy_wrong",
)  # fmt: skip


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]] | None:
    """Return columns with an entry per validated epoch, from the records of a metrics.jsonl.

    The columns are `epoch` [E] and all `COLUMNS` that were logged as `val/NAME`, each [E], with
    None where an epoch lacks the figure. If a resumed run logged an epoch twice, the last record
    counts. The result is None if no epoch was validated.
    """
    epochs: dict[float, Mapping[str, Any]] = {}
    for record in metrics:
        if "epoch" in record and any(key.startswith(PREFIX) for key in record):
            epochs[record["epoch"]] = record
    if not epochs:
        return None
    order = sorted(epochs)
    columns = {name: [epochs[e].get(PREFIX + name) for e in order] for name in COLUMNS}
    known = {k: v for k, v in columns.items() if any(x is not None for x in v)}
    return {"epoch": order, **known}
