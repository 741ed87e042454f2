"""Files of many formats as named columns. `column_names` decides what a column means.

    npz, npy, pt, pth   arrays by name; a single array has the name of its file, and labels and ids
                        come from files beside it: labels.npy and ids.npy beside logits.npy
    parquet, feather    columns; lists of any kind are arrays of more dimensions
    csv, tsv, txt       see `delimited`; also compressed, as .csv.gz, .bz2 or .xz
    json, jsonl         an object of lists, a list of objects, or an object per line

Nothing is unpickled. From files of PyTorch, only tensors are read.
"""

import bz2
import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pyarrow.parquet as pq

COMPRESSED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
SUFFIXES = (
    ".npz", ".npy", ".pt", ".pth", ".parquet", ".feather", ".csv", ".tsv", ".txt", ".json",
    ".jsonl", ".ndjson",
)  # fmt: skip
DAMAGED = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pa.ArrowException,
    NotImplementedError, RecursionError, MemoryError, UnicodeError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """What a file holds, by name.

    Args:
        names: The names of its columns or arrays, in their order.
        get: Returns the arrays of some names. The first axis usually counts images. If its second
            argument is true, and the format has no types, cells stay texts.
        notes: How the file was read.
    """

    names: list[str]
    get: Callable[[Sequence[str], bool], list[np.ndarray]]
    notes: tuple[str, ...] = ()


def of_arrays(arrays: dict[str, np.ndarray], notes: Sequence[str] = ()) -> Columns:
    """Return arrays by name as columns."""
    return Columns(list(arrays), lambda names, text: [arrays[n] for n in names], tuple(notes))


def open_columns(path: Path) -> Columns:
    """Return the columns of a file. ValueError, with the name of the file, if it is unreadable."""
    path = Path(path)
    inner, unpack = path, None
    if path.suffix.lower() in COMPRESSED:
        inner, unpack = path.with_suffix(""), COMPRESSED[path.suffix.lower()]
    suffix = inner.suffix.lower()
    if suffix not in SUFFIXES or (unpack and suffix in (".npz", ".npy", ".pt", ".pth")):
        advice = "pickled objects can run code, and are not read. " * (
            suffix in (".pkl", ".pickle")
        )
        raise ValueError(
            f"{path} is none of {', '.join(SUFFIXES)} (csv, tsv, txt and json also as .gz, .bz2 or "
            f".xz): {advice}write the arrays logits and labels with numpy.savez, or a csv with a "
            "column per class, logit_0, logit_1 and so on"
        )
    try:
        if suffix in BINARY:
            return BINARY[suffix](path)
        data = path.read_bytes()
        data = unpack(data) if unpack else data
        return _of_text(data, suffix)
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, MemoryError):
        return "it announces more than the memory holds"
    return lines[0] if lines else type(error).__name__


def _of_text(data: bytes, suffix: str) -> Columns:
    from flatcal_dist.calibration.records import delimited, json_tables

    if suffix == ".json":
        return json_tables.read_json(data)
    if suffix in (".jsonl", ".ndjson"):
        return json_tables.read_json_lines(data)
    return delimited.read_delimited(data)


def _npz(path: Path) -> Columns:
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise OSError("it is no npz archive, as numpy.savez writes")
    with np.load(path, allow_pickle=False) as file:
        if len(set(file.files)) < len(file.files):
            raise ValueError("the archive holds two arrays of one name")
        names = file.files
        return of_arrays({n: _no_objects(partial(file.__getitem__, n), n) for n in names})


def _no_objects(read: Callable[[], Any], name: str) -> np.ndarray:
    try:
        array = read()
    except DAMAGED:
        raise
    except Exception as error:  # for a damaged header, numpy raises errors of many kinds
        if "pickle" not in str(error):
            raise OSError(f"{name} is damaged: {_reason(error)}") from None
        raise ValueError(
            f"{name} cannot be read without unpickling. Write numbers as numbers and text as "
            "numpy.array(texts, dtype=str)"
        ) from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array, as numpy.save writes")
    return array


def _npy(path: Path) -> Columns:
    def read(file: Path) -> np.ndarray:
        return _no_objects(lambda: np.load(file, allow_pickle=False), file.name)

    array = read(path)
    if array.dtype.names:
        return of_arrays({name: array[name] for name in array.dtype.names})
    return _with_partners(path, array, read)


def _with_partners(path: Path, array: np.ndarray, read: Callable[[Path], np.ndarray]) -> Columns:
    """An array that is alone in its file, with labels and ids from the files beside it."""
    from flatcal_dist.calibration.records.column_names import (
        IDS,
        LABELS,
        kind_of_stem,
        partner_stems,
        plain,
    )

    arrays, notes = {kind_of_stem(path.stem) or "arr_0": array}, []
    for name, words in (("labels", LABELS[0]), ("ids", IDS[0])):
        stems = partner_stems(path.stem, words)
        found = [
            file
            for file in sorted(path.parent.iterdir())
            if file.suffix == path.suffix and file != path and plain(file.stem) in stems
        ]
        if len(found) > 1:
            raise ValueError(
                f"both {found[0].name} and {found[1].name} could belong to it: leave one, or name "
                "it with --labels"
            )
        for file in found:
            arrays[name] = read(file)
            notes.append(f"{name} from {file.name} beside it")
    return of_arrays(arrays, notes)


def _pt(path: Path) -> Columns:
    def read(file: Path) -> Any:
        return tensors(file)

    stored = read(path)
    if not isinstance(stored, dict):
        if not isinstance(stored, np.ndarray):
            raise ValueError(
                "expected a dictionary of tensors, such as {'logits': logits, 'labels': labels}, "
                f"found {type(stored).__name__}"
            )
        return _with_partners(path, stored, read)
    arrays = {
        str(name): value if isinstance(value, np.ndarray) else of_list(value, str(name))
        for name, value in stored.items()
        if isinstance(value, np.ndarray | list | tuple)
    }
    return of_arrays(arrays)


def tensors(path: Path) -> Any:
    """Return what a PyTorch file holds, with tensors as arrays. bfloat16 becomes float32.

    ValueError if it holds more than tensors, OSError if it is damaged.
    """
    import pickle

    import torch

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            "it holds more than tensors, and unpickling that would run its code: save "
            "{'logits': logits, 'labels': labels} as tensors, or use numpy.savez"
        ) from None
    except FileNotFoundError:
        raise
    except Exception:  # for damaged bytes, the unpickler raises errors of many kinds
        raise OSError("it is damaged, or no file that torch.save wrote") from None

    def converted(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_complex():
                raise ValueError(
                    f"a tensor of {value.dtype}, {value.layout}, is no table of numbers"
                )
            value = value.detach()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        if isinstance(value, dict):
            return {name: converted(part) for name, part in value.items()}
        return value

    return converted(stored)


def _parquet(path: Path) -> Columns:
    schema = pq.read_schema(path)
    return _arrow(schema.names, lambda names: pq.read_table(path, columns=list(names)))


def _feather(path: Path) -> Columns:
    table = pyarrow.feather.read_table(path)
    return _arrow(table.column_names, table.select)


def _arrow(names: list[str], select: Callable[[Sequence[str]], pa.Table]) -> Columns:
    def get(wanted: Sequence[str], text: bool) -> list[np.ndarray]:
        table = select(wanted)
        return [_values(table.column(name).combine_chunks(), name) for name in wanted]

    return Columns(names, get)


def _values(column: pa.Array, name: str) -> np.ndarray:
    """A column [n, ...], in which lists of equal lengths are further axes."""
    if isinstance(column, pa.FixedShapeTensorArray):
        return column.to_numpy_ndarray()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_nested(kind):
        if not hasattr(kind, "value_type") or pa.types.is_map(kind):
            raise ValueError(f"column {name} holds {kind}, which is neither numbers nor lists")
        lengths = pc.list_value_length(column).unique().to_pylist()
        if len(lengths) > 1 or None in lengths:
            raise ValueError(f"the lists in column {name} have different lengths")
        inner = _values(column.flatten(), name)
        return inner.reshape(len(column), *lengths, *inner.shape[1:])
    if pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if column.null_count and not text:
        raise ValueError(f"column {name} has {column.null_count} empty or NaN cells")
    return column.to_numpy(zero_copy_only=False)


def of_list(values: Any, name: str) -> np.ndarray:
    """Return nested lists as an array. ValueError if numbers, texts or truth values are mixed."""
    kinds: set[type] = set()
    pending = [values]
    while pending:
        for value in pending.pop():
            if isinstance(value, list | tuple):
                pending.append(value)
            else:
                kinds.add(type(value))
    if type(None) in kinds:
        raise ValueError(f"{name} has empty entries, or some rows have none")
    if (kinds - {int, float} and len(kinds) > 1) or not kinds <= {int, float, str, bool}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{name} holds {found}: expected numbers, or texts, throughout")
    try:
        array = np.array(values)
    except ValueError:
        raise ValueError(f"the lists in {name} have different lengths") from None
    if array.dtype.kind not in "biufU":
        raise ValueError(f"{name} holds numbers beyond 64 bits")
    return array


def text_of(values: np.ndarray, name: str) -> list[str]:
    """Return a column as texts: bytes as UTF-8, and whole numbers without a decimal point."""
    if values.ndim != 1:
        raise ValueError(f"{name} must have one entry per image, found shape {list(values.shape)}")
    texts = []
    for value in values.tolist():
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                raise ValueError(f"{name} holds bytes that are not UTF-8: {value[:40]!r}") from None
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        elif value is None or value != value:
            value = ""
        texts.append(str(value))
    return texts


def is_number(text: str) -> bool:
    """Return whether a text is a number, with a decimal point or a decimal comma."""
    return re.fullmatch(r"\s*[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?\s*", text) is not None


def refuse_thousands(texts: Iterable[str], name: str) -> None:
    """Raise ValueError if 1,234 beside 892 may be a whole number with a thousands separator.

    A zero before the sign, or another number of digits after it, is a sign of decimals.
    """
    whole = grouped = ""
    for text in map(str.strip, texts):
        if re.fullmatch(r"[+-]?[1-9]\d{0,2}([.,]\d{3})+", text):
            grouped = text
        elif re.fullmatch(r"[+-]?\d{1,3}", text):
            whole = text if text.strip("+-0") else whole
        else:
            return
    if whole and grouped:
        raise ValueError(
            f"column {name} holds {grouped} beside {whole}: these may be whole numbers with a "
            "thousands separator, or decimals. Write numbers without thousands separators"
        )


BINARY: dict[str, Callable[[Path], Columns]] = {
    ".npz": _npz, ".npy": _npy, ".pt": _pt, ".pth": _pt, ".parquet": _parquet,
    ".feather": _feather,
}  # fmt: skip
