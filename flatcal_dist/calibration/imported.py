"""Logits or records of any network, from a file, so that it can get the report.

    npz       arrays `logits` [N, K] or `probabilities` [N, K], `labels` int [N], `ids` [N] if any
    parquet   columns `label`, `id` if any, and the scores: one list column `logits` or
              `probabilities`, or a column per class, logit_0, logit_1, ... or probability_0, ...;
              or the records.parquet of a report
    csv       the same columns, without the list

Names decide what the scores are; values never do. Also understood: label, labels, target, targets;
id, ids; logits_0; prob_0, probs_0, p_0. Without ids images are called row_0000000 and so on.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from .records import METADATA_KEY, Records, Source

LABELS = ("label", "labels", "target", "targets")
IDS = ("id", "ids")
LOGITS = ("logits", "logit")
PROBABILITIES = ("probabilities", "probability", "probs", "prob", "p")
SUFFIXES = (".npz", ".parquet", ".csv")


def read_file(path: Path) -> Records:
    """The records of a file of logits, probabilities or records. Raises ValueError.

    Probabilities become logits by their logarithm. One that is exactly 0 counts as the smallest
    positive number; if it is the label's own, NLL would be infinite, and the file is refused.
    Energy and the largest logit are lost in a softmax, and left out of the report.
    """
    path = Path(path)
    reader = {".npz": _npz, ".parquet": _parquet, ".csv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
    try:
        found = reader(path)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if isinstance(found, Records):
        return found
    try:
        return _records(path, *found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _records(path: Path, names: Iterable[str], get: Callable[[str], np.ndarray]) -> Records:
    """names: what the file holds; get: one of them as an array."""
    names = list(names)
    labels = get(_one(names, LABELS, "the labels"))
    scores, are_logits = _scores(names, get)
    ids = _ids(names, get, len(scores))
    if labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels % 1 == 0).all():
        labels = labels.astype(np.int64)  # a csv or data frame whose column passed through floats
    if not are_logits:
        scores = _log_probabilities(scores, labels)
    source = Source(name=path.stem, probabilities=not are_logits)
    return Records.from_logits(ids, labels, scores, source=source)


def _one(names: list[str], wanted: tuple[str, ...], what: str) -> str:
    found = [name for name in names if name.lower() in wanted]
    if len(found) != 1:
        state = "none is" if not found else f"{', '.join(found)} all are"
        raise ValueError(
            f"expected one of {', '.join(wanted)} to hold {what}, and {state} among "
            f"{', '.join(names[:8])}{', ...' * (len(names) > 8)}"
        )
    return found[0]


def _ids(names: list[str], get: Callable[[str], np.ndarray], images: int) -> list[str]:
    if not any(name.lower() in IDS for name in names):
        return [f"row_{i:07d}" for i in range(images)]
    ids = get(_one(names, IDS, "the ids")).tolist()
    missing = sum(i is None or i != i or str(i).strip() == "" for i in ids)
    if missing:
        raise ValueError(f"{missing} of {len(ids)} images have no id: give each one, or no ids")
    return [str(i) for i in ids]


def _scores(names: list[str], get: Callable[[str], np.ndarray]) -> tuple[np.ndarray, bool]:
    """The scores [N, K], and whether they are logits."""
    whole = [n for n in names if n.lower() in LOGITS + PROBABILITIES]
    columns: dict[bool, dict[int, str]] = {True: {}, False: {}}
    for name in names:
        part = re.fullmatch(r"([a-z]+)_(\d+)", name.lower())
        for are_logits, words in ((True, LOGITS), (False, PROBABILITIES)):
            if part and part[1] in words:
                if int(part[2]) in columns[are_logits]:
                    raise ValueError(f"two columns hold class {int(part[2])}, one of them {name}")
                columns[are_logits][int(part[2])] = name
    if len(whole) + bool(columns[True]) + bool(columns[False]) != 1:
        raise ValueError(
            "expected the scores either as logits or as probabilities, whole or a column per class "
            f"(logit_0, ... or probability_0, ...), and found {', '.join(names[:8])}"
            f"{', ...' * (len(names) > 8)}"
        )
    if whole:
        return get(whole[0]), whole[0].lower() in LOGITS
    are_logits = bool(columns[True])
    numbered = columns[are_logits]
    missing = sorted(set(range(max(numbered) + 1)) - numbered.keys())
    if missing:
        raise ValueError(f"there is no column for class {missing[0]}, but one for {max(numbered)}")
    return np.stack([get(numbered[c]) for c in range(len(numbered))], axis=1), are_logits


def _log_probabilities(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    p = np.asarray(p, np.float64)
    if p.ndim != 2:
        raise ValueError(f"probabilities must have shape [N, K], got {p.shape}")
    if not np.isfinite(p).all() or (p < 0).any() or (p > 1 + 1e-6).any():
        raise ValueError("probabilities must lie in 0..1; if these are logits, call them logits")
    off = np.abs(p.sum(axis=1) - 1).max(initial=0)
    if off > 0.01:
        raise ValueError(
            f"the probabilities of an image must sum to 1; one sum is off by {off:.3g}"
        )
    rows = np.arange(len(p))
    inside = len(labels) == len(p) and labels.dtype.kind == "i" and labels.size
    if inside and (labels >= 0).all() and (labels < p.shape[1]).all():
        zero = int((p[rows, labels] == 0).sum())
        if zero:
            raise ValueError(
                f"{zero} images give their own label the probability 0, so NLL is infinite: export "
                "logits, or probabilities that were not rounded"
            )
    return np.log(np.maximum(p, np.finfo(np.float64).tiny))


def _npz(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise ValueError(f"{path} cannot be read: it is no npz archive, as numpy.savez writes")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read without unpickling: {error}") from None
    return list(arrays), arrays.__getitem__


def _parquet(path: Path) -> Any:
    schema = pq.read_schema(path)
    if METADATA_KEY in (schema.metadata or {}):
        return Records.load(path)
    return _table(pq.read_table(path))


def _csv(path: Path) -> Any:
    # Ids such as 00123 are names, not numbers.
    types = dict.fromkeys((*IDS, *(i.upper() for i in IDS)), pa.string())
    options = pyarrow.csv.ConvertOptions(column_types=types)
    return _table(pyarrow.csv.read_csv(path, convert_options=options))


def _table(table: pa.Table) -> Any:
    def get(name: str) -> np.ndarray:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            lengths = set(pa.compute.list_value_length(column).to_pylist())
            if len(lengths) != 1 or None in lengths:
                raise ValueError(f"the lists in column {name} have different lengths")
            return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        values = column.to_numpy(zero_copy_only=False)
        if column.null_count and name.lower() not in IDS:
            raise ValueError(f"column {name} has {column.null_count} empty or NaN cells")
        return values

    return table.column_names, get
