"""Published figures for the same data and network, which a page shows beside the report."""

import csv
import re
from functools import cache
from pathlib import Path
from typing import Any

FIGURES = (
    "accuracy", "nll", "brier", "ece", "adaptive_ece", "nll_after_temperature",
    "ece_after_temperature", "aurc", "auroc", "fpr_at_95_tpr",
)  # fmt: skip
SIZES = {  # the number of classes and images of each test set
    "ImageNet": (1000, 50_000),
    "CIFAR-10": (10, 10_000),
    "CIFAR-100": (100, 10_000),
    "Tiny-ImageNet": (200, 10_000),
}


def references(
    model: str | None, data: str | None, classes: int, images: int
) -> list[dict[str, Any]]:
    """Return the rows of literature.csv for this network and data, each with its source.

    The data match if the numbers of classes and images are those of the test set and its name
    occurs in `data`. For ImageNet the numbers suffice, because no other set has them. Training
    settings differ between papers, and `method` says what is known about them. Rates are fractions.

    Args:
        model: The name of the network.
        data: The name of the evaluated images.
        classes: The number of classes.
        images: The number of images.
    """
    rows = [
        row
        for row in _literature()
        if SIZES[row["data"]] == (classes, images)
        and (row["data"] == "ImageNet" or _plain(row["data"]) in _plain(data or ""))
        and _plain((model or "").split(".")[0]) in row["models"]
    ]
    rows.sort(key=lambda row: row["ece"] is None)  # those on calibration first
    return [{k: v for k, v in row.items() if k != "models"} for row in rows]


@cache
def _literature() -> tuple[dict[str, Any], ...]:
    path = Path(__file__).with_name("literature.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(_row(line) for line in csv.DictReader(file))


def _row(line: dict[str, str]) -> dict[str, Any]:
    names = [line["network"], *line["aliases"].split()]
    return {
        **{key: line[key] for key in ("data", "network", "method", "source")},
        **{key: float(line[key]) if line[key] else None for key in FIGURES},
        "models": {_plain(name) for name in names},
    }


def _plain(text: str) -> str:
    """The letters and digits of a text, in lower case."""
    return re.sub(r"[^a-z0-9]", "", text.lower())
