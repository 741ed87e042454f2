"""Text files of columns, in the forms that programs write.

The text may be UTF-8 or UTF-16, with or without a byte order mark. Commas, semicolons, tabs, bars
or spaces separate columns. Numbers have decimal points, or decimal commas as Excel writes them in
many countries. A line `sep=;` and comments may stand before the header. numpy.savetxt writes the
header as a comment.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.csv

from flatcal_dist.calibration.records.tables import Columns, is_number, refuse_thousands

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*")
DECIMAL_POINT = re.compile(r"\s*[+-]?\d*\.\d*([eE][+-]?\d+)?\s*")
BOMS = (
    (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"),
)  # fmt: skip
LOOKED_AT = 1 << 22  # bytes in which the header must end
SAMPLE = 200  # rows that are searched for decimal commas


def read_delimited(data: bytes) -> Columns:
    """Return the columns of a text file. ValueError if it is no table with a header."""
    data, notes = _utf8(data)
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    header, separator, body = _header(data)
    if separator == " ":
        body = b"\n".join(b" ".join(line.split()) for line in body.splitlines())
    names = [name.strip() for name in _cells(header, separator)]
    _refuse_headless(names)
    if not body.strip():
        raise ValueError("it has a header line and no rows below it")
    if separator != ",":
        notes.append(f"columns separated by {SEPARATORS.get(separator, 'spaces')}")

    def get(wanted: Sequence[str], text: bool) -> list[np.ndarray]:
        places = [names.index(name) for name in wanted]
        decimal = "." if text else _decimal(body, separator, places, names)
        kind = pa.string() if text else pa.float64()
        columns = [f"c{i}" for i in range(len(names))]
        with _by_name(names):
            table = pyarrow.csv.read_csv(
                pa.BufferReader(body),
                read_options=pyarrow.csv.ReadOptions(column_names=columns),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=separator, newlines_in_values=b'"' in body
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types={columns[i]: kind for i in places},
                    include_columns=[columns[i] for i in places],
                    decimal_point=decimal,
                ),
            )
        found = []
        for name, place in zip(wanted, places, strict=True):
            column = table.column(columns[place])
            if column.null_count:
                raise ValueError(f"column {name} has {column.null_count} empty or NaN cells")
            found.append(column.to_numpy())
        return found

    return Columns(names, get, tuple(notes))


@contextmanager
def _by_name(names: Sequence[str]) -> Iterator[None]:
    """Name the column of a cell that is no number. Arrow would give its place alone."""
    try:
        yield
    except pa.ArrowInvalid as error:
        found = re.search(r"column #(\d+):.*invalid value '(.*)'", str(error), re.DOTALL)
        if found is None:
            raise
        raise ValueError(
            f"column {names[int(found[1])]} holds {found[2][:40]!r}, which is no number"
        ) from None


def _utf8(data: bytes) -> tuple[bytes, list[str]]:
    for mark, encoding in BOMS:
        if data.startswith(mark):
            text = data[len(mark) :]
            if encoding == "utf-8":
                return text, []
            return text.decode(encoding).encode(), [encoding[:6].upper()]
    start = data[:2000]
    zeros = [start[0::2].count(0), start[1::2].count(0)]
    if max(zeros) > len(start) / 8:  # Latin letters in UTF-16 without a mark
        return data.decode("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le").encode(), ["UTF-16"]
    if 0 in start:
        raise ValueError("it is no text: expected a table with a header line")
    return data, []


def _header(data: bytes) -> tuple[str, str, bytes]:
    """The header line, the separator of its columns, and the rows below it."""
    place, comments, announced = 0, [], None
    while True:
        end = data.find(b"\n", place, place + LOOKED_AT)
        if end < 0 and len(data) - place > LOOKED_AT:
            raise ValueError("its first line has no end: expected a table with a header line")
        end = len(data) if end < 0 else end
        line = _decoded(data[place:end]).strip("\r\n")
        if place >= len(data):
            raise ValueError("it is empty: expected a header line and a row per image")
        following = end + 1
        if line.startswith("sep=") and len(line) == 5:
            announced = line[4]
        elif line.startswith("#"):
            comments.append(line.lstrip("# "))
        elif line.strip():
            break
        place = following
    row = next((r for r in data[following : following + LOOKED_AT].split(b"\n") if r.strip()), b"")
    separator = announced or _separator(line, _decoded(row))
    if comments and all(map(is_number, _cells(line, separator))):
        return comments[-1], separator, data[place:]
    return line, separator, data[following:]


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise ValueError("it is neither UTF-8 nor UTF-16: save it as UTF-8") from None


def _separator(header: str, row: str) -> str:
    """The separator that cuts header and first row into the most columns."""
    counts = {s: (len(_cells(header, s)), len(_cells(row, s))) for s in SEPARATORS}
    fits = {s: n for s, (n, m) in counts.items() if n > 1 and (n == m or not row.strip())}
    if fits:
        return max(fits, key=lambda s: fits[s])
    if len(header.lstrip("# ").split()) == len(row.split()) > 1:
        return " "
    return max(counts, key=lambda s: counts[s][0])


def _cells(line: str, separator: str) -> list[str]:
    if separator == " ":
        return line.split()
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error as error:
        raise ValueError(f"its header line cannot be read: {error}") from None


def _refuse_headless(names: list[str]) -> None:
    numbers = [int(n) for n in names if n.isascii() and n.isdecimal()]
    counted = numbers in (list(range(len(names))), list(range(1, len(names) + 1)))
    if len(names) > 1 and all(map(is_number, names)) and not counted:
        raise ValueError(
            f"its first line holds numbers ({', '.join(names[:3])}, ...): expected a header line "
            "that names the columns, such as label,logit_0,logit_1"
        )


def _decimal(body: bytes, separator: str, places: Sequence[int], names: Sequence[str]) -> str:
    """The decimal sign of numbers in these columns, a comma or a point."""
    lines = [_decoded(line) for line in body[:LOOKED_AT].split(b"\n")[:SAMPLE]]
    rows = [_cells(line, separator) for line in lines]
    cells = [row[i] for row in rows for i in places if i < len(row)]
    refuse_thousands(cells, names[places[0]])
    commas = any(DECIMAL_COMMA.fullmatch(cell) for cell in cells)
    points = any(DECIMAL_POINT.fullmatch(cell) for cell in cells)
    if commas and points:
        raise ValueError("numbers are written with decimal commas and with decimal points")
    return "," if commas else "."
