"""JSON as columns: an object of lists, a list of objects, or an object per line.

The forms of pandas are also read: an object of objects by row, or columns and data.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from flatcal_dist.calibration.records.tables import Columns, of_list


def read_json(data: bytes) -> Columns:
    """Return the columns of a JSON file. ValueError if it is no table."""
    return _columns(_parse(data.decode(json.detect_encoding(data))))


def read_json_lines(data: bytes) -> Columns:
    """Return the columns of a file with an object per line. ValueError if it is no table."""
    return _columns(_parse_lines(data.decode(json.detect_encoding(data))))


def _columns(stored: Any) -> Columns:
    if isinstance(stored, list):
        if not stored or not all(isinstance(row, dict) for row in stored):
            raise ValueError('expected a list of objects such as {"label": 0, "logits": [1, 2]}')
        names = list(dict.fromkeys(name for row in stored for name in row))
        stored = {name: [row.get(name) for row in stored] for name in names}
    if not isinstance(stored, dict):
        raise ValueError(
            'expected an object such as {"labels": [0, 1], "logits": [[1, 2], [3, 4]]}'
        )
    if set(stored) >= {"columns", "data"} and isinstance(stored["columns"], list):  # pandas' split
        rows, names = stored["data"], [str(name) for name in stored["columns"]]
        if len(set(names)) < len(names) or not all(
            isinstance(row, list) and len(row) == len(names) for row in rows
        ):
            raise ValueError("the rows of data have other lengths than columns has names")
        stored = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    of_rows = {n: list(v.values()) for n, v in stored.items() if isinstance(v, dict)}  # pandas
    if of_rows and len({tuple(v) for v in stored.values() if isinstance(v, dict)}) > 1:
        raise ValueError("its objects do not hold the same rows")
    columns = {n: v for n, v in stored.items() if isinstance(v, list)} | of_rows

    def get(names: Sequence[str], text: bool) -> list[np.ndarray]:
        return [of_list(columns[name], name) for name in names]

    return Columns([name for name in stored if name in columns], get)


def _parse(text: str) -> Any:
    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("an object has two entries of one name")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=no_twins)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _parse_lines(text)  # a .json file can hold an object per line
        raise ValueError(f"it is no JSON: {error}") from None


def _parse_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from None
    return rows
