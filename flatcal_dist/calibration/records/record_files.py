"""The columns and settings of records.parquet, in this version and in older and newer ones."""

import json
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flatcal_dist.calibration.confidence.sources import SCORES

METADATA_KEY = b"flatcal_dist.records"
OF_SOFTMAX = ("log_confidence", "nll", "brier", "entropy")  # for both sides of temperature scaling
SIDES = ("", "_after_temperature")
OPTIMUM = "_at_test_optimum"  # a third side, where the temperature was fitted on images kept apart
RANKING = "score_"  # stands before the key of a confidence score
SETTINGS = (
    "classes",
    "temperature",
    "temperature_interval",
    "fold_temperatures",
    "fold_seed",
    "held_out",
    "classwise",
    "logits_dtype",
)
REQUIRED: dict[str, type] = {
    **dict.fromkeys(("label", "prediction", "rank", "fold"), np.int64),
    "compared": np.bool_,
    **{name + side: np.float64 for side in SIDES for name in OF_SOFTMAX},
}
OPTIONAL: dict[str, type] = {
    "real": np.int64,
    **{name + OPTIMUM: np.float64 for name in OF_SOFTMAX},
    **{RANKING + score.key: np.float64 for score in SCORES},
}
DERIVED = (
    "correct",
    *("confidence" + side for side in (*SIDES, OPTIMUM)),
)  # for other readers of the file


def read_columns(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the columns [N] and settings of a file of records.

    Optional columns are there if the file has them. A RuntimeWarning names what is unknown and left
    out. ValueError if the file is something else, or lacks a required column or setting.
    """
    table = pq.read_table(path)
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    if metadata is None:
        raise ValueError(f"{path} holds no records of this package; run `flatcal evaluate`")
    settings, there = json.loads(metadata), set(table.column_names)
    wanted = (*SETTINGS, "tuning", "source")
    _refuse_missing(path, "columns", [c for c in ("id", *REQUIRED) if c not in there])
    _refuse_missing(path, "settings", [s for s in wanted if s not in settings])
    _tell_unknown(path, "columns", there - {"id", *REQUIRED, *OPTIONAL, *DERIVED})
    _tell_unknown(path, "settings", set(settings) - set(wanted))
    types = REQUIRED | {name: kind for name, kind in OPTIONAL.items() if name in there}
    columns = {name: table[name].to_numpy().astype(kind) for name, kind in types.items()}
    columns["id"] = np.array(table["id"].to_pylist(), dtype=np.str_)
    return columns, {name: settings[name] for name in wanted}


def known_fields(path: Path, kind: type, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the stored values that are fields of a dataclass.

    Args:
        path: The file, for messages.
        kind: The dataclass.
        stored: The values by name.

    Raises:
        ValueError: A field without a default is missing.
    """
    known = {field.name: field.default is MISSING for field in fields(kind)}
    missing = [name for name, required in known.items() if required and name not in stored]
    _refuse_missing(path, "settings", missing)
    _tell_unknown(path, "settings", set(stored) - set(known))
    return {name: value for name, value in stored.items() if name in known}


def _refuse_missing(path: Path, what: str, missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"{path} lacks the {what} {', '.join(missing)}: another version wrote it, or something "
            "changed it. Run `flatcal evaluate` again"
        )


def _tell_unknown(path: Path, what: str, unknown: set[str]) -> None:
    if unknown:
        warnings.warn(
            f"{path}: this version does not know the {what} {', '.join(sorted(unknown))}, and "
            "leaves them out",
            RuntimeWarning,
            stacklevel=2,
        )
