"""Logits, probabilities or records of any network, from a file.

A file holds labels [N] and scores of K classes. They may be arrays, or a table with a row per image
and a column per class. Ids are used if there are any. `tables` lists the formats, `column_names`
the names, and `score_arrays` the shapes that are understood. Values decide what a name leaves open,
and `Imported.understood` says how the file was read. A report's records.parquet is read as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from flatcal_dist.calibration.after_training.post_hoc import post_hoc
from flatcal_dist.calibration.checks import FloatArray, IntArray, image_ids, logits_and_labels
from flatcal_dist.calibration.pages.display import counted
from flatcal_dist.calibration.records import column_names, label_arrays, score_arrays
from flatcal_dist.calibration.records.column_names import Found
from flatcal_dist.calibration.records.record_files import METADATA_KEY
from flatcal_dist.calibration.records.records import Records, Source
from flatcal_dist.calibration.records.tables import DAMAGED, Columns, open_columns, text_of

PREDICTIONS = ("pred", "prediction", "predicted", "y_pred", "predicted_class", "predicted_label")


@dataclass(frozen=True)
class Imported:
    """The records of a file, and how it was read.

    Args:
        records: The records.
        class_names: The names of the classes in their order, if the file or the user tells them.
        understood: How the file was read, in one line.
        warnings: What is likely to be a mistake.
    """

    records: Records
    class_names: list[str] | None
    understood: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """The scores of N images and K classes in a file, in the order of its rows.

    Args:
        ids: The ids [N], each of them once.
        labels: The labels [N], in 0..K-1.
        logits: The logits [N, K], which are finite.
        kind: What the file holds: logits, probabilities or log-probabilities.
        class_names: The names of the classes, as in `Imported`.
        understood: How the file was read, as in `Imported`.
        warnings: What is likely to be a mistake.
    """

    ids: list[str]
    labels: IntArray
    logits: FloatArray
    kind: str
    class_names: list[str] | None
    understood: str
    warnings: tuple[str, ...]


def read_file(path: Path) -> Records:
    """Return the records of a file of logits, probabilities or records. Errors: `import_file`."""
    return import_file(path).records


def import_file(
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    labels: Path | None = None,
    scores: str | None = None,
) -> Imported:
    """Read a file of logits, probabilities or records, in any format of `tables`.

    The logarithms of probabilities are taken for logits. A probability of exactly 0 counts as the
    smallest positive number. If it is the probability of the label, NLL would be infinite, and the
    file is refused. A softmax loses energy and the largest logit, so the report leaves them out.

    Args:
        path: The file.
        classes: The names of the classes in their order. Labels and columns may use them.
        labels: Another file that holds the labels, and possibly ids.
        scores: "logits" or "probabilities", which counts more than the name of the scores.

    Raises:
        ValueError: The file cannot be read, or can be read in more than one way. The message names
            the file and the nearest form that is understood.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet" and _is_records(path):
        return Imported(Records.load(path), None, f"{path.name}: records of a report")
    found = read_scores(path, classes=classes, labels=labels, scores=scores)
    source = Source(name=path.stem, probabilities=found.kind != "logits")
    records = Records.from_logits(found.ids, found.labels, found.logits, source=source)
    records = replace(records, post_hoc=post_hoc(found.ids, found.labels, found.logits))
    return Imported(records, found.class_names, found.understood, found.warnings)


def read_scores(
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    labels: Path | None = None,
    scores: str | None = None,
) -> Scores:
    """Return what a file holds, before anything is computed.

    The arguments, and the errors that are raised, are those of `import_file`.
    """
    columns = open_columns(path)
    other = None if labels is None else open_columns(labels)
    try:
        return _Reading(path, columns, other, classes, scores).read()
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_records(path: Path) -> bool:
    try:
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


class _Reading:
    """Reads one file, and collects how it was read."""

    def __init__(
        self, path: Path, columns: Columns, other: Columns | None,
        classes: Sequence[str] | None, wanted: str | None,
    ) -> None:  # fmt: skip
        self.path, self.columns, self.other = path, columns, other
        self.classes = None if classes is None else list(classes)
        self.wanted = wanted
        self.notes = list(columns.notes)
        self.warnings: list[str] = []
        self.used: list[str] = []

    def read(self) -> Scores:
        """Return what the file holds."""
        found = column_names.find_scores(self.columns.names, self.wanted)
        split = found[1] if found else None
        label_names, labels = self._labels(split)
        chosen = found[0] if found else self._scores_by_class(label_names, labels)
        raw = score_arrays.stacked(self._get(chosen.names, text=len(chosen.names) == 1), chosen)
        table = score_arrays.read(raw, len(labels), chosen, self.wanted)
        self.notes += table.notes
        self.warnings += table.warnings
        count = table.scores.shape[1]
        class_names = self._class_names(chosen, count)
        numbers, note = label_arrays.class_numbers(labels, count, class_names, chosen.first)
        self.notes += [note] if note else []
        ids = self._ids(split, len(labels))
        logits = score_arrays.to_logits(table, numbers)
        logits_and_labels(logits, numbers, image_ids(ids, len(logits)))
        self._compare_with_predictions(logits)
        understood = self._understood(logits.shape, chosen, table.kind, label_names)
        return Scores(
            ids, numbers, logits, table.kind, class_names, understood, tuple(self.warnings)
        )

    def _get(self, names: Sequence[str], text: bool = False) -> list[np.ndarray]:
        twins = [name for name in names if self.columns.names.count(name) > 1]
        if twins:
            raise ValueError(f"two columns are called {twins[0]}")
        self.used += names
        return self.columns.get(names, text)

    def _labels(self, split: str | None) -> tuple[list[str], np.ndarray]:
        """The names of the labels' columns, and the labels: numbers or texts [N]."""
        if self.other is not None:
            names = self.other.names
            if len(names) > 1:
                names = column_names.find_labels(names, split)
            arrays = self.other.get(names, True)
            return [f"{name} (--labels)" for name in names], label_arrays.labels(arrays)
        names = self.columns.names
        if not column_names.first_of(names, column_names.LABELS, split) and "arr_1" in names:
            found = ["arr_1"]  # numpy.savez gives this name to an array without a name
        else:
            found = column_names.find_labels(names, split)
        return found, label_arrays.labels(self._get(found, text=True))

    def _scores_by_class(self, label_names: Sequence[str], labels: np.ndarray) -> Found:
        """Scores whose columns have the names of the classes, such as cat and dog."""
        names = self.columns.names
        known = {*label_names, *column_names.find_ids(names, None)}
        answers = set(labels.tolist()) if labels.dtype.kind in "UO" else set()
        rest = [
            name for name in names
            if name and name not in known
            and (name in answers or column_names.split_of(name)[0] not in PREDICTIONS)
        ]  # fmt: skip
        if self.classes is None and answers and answers <= set(rest):
            if answers != set(rest):
                sums = sum(np.asarray(v, np.float64) for v in self.columns.get(rest, False))
                if not np.allclose(sums, 1, atol=score_arrays.OFF):
                    return column_names.scores_by_labels(names, known, None)
            return Found(rest, None, rest)
        return column_names.scores_by_labels(names, known, self.classes)

    def _class_names(self, chosen: Found, count: int) -> list[str] | None:
        if self.classes is not None:
            if len(self.classes) != count:
                raise ValueError(
                    f"there are scores of {count} classes and {len(self.classes)} names of classes"
                )
            if chosen.classes is not None and chosen.classes != self.classes:
                raise ValueError(
                    f"the columns are {', '.join(chosen.classes[:4])}, ... and the names of the "
                    f"classes {', '.join(self.classes[:4])}, ...: expected the same ones in order"
                )
            return self.classes
        if chosen.classes is not None:
            return chosen.classes
        for name in self.columns.names:
            if column_names.plain(name) in column_names.CLASS_NAMES:
                array = self.columns.get([name], True)[0]
                if array.ndim == 1 and array.dtype.kind in "USO" and len(array) == count:
                    self.used.append(name)
                    return text_of(array, name)
        return None

    def _ids(self, split: str | None, images: int) -> list[str]:
        for columns in (self.columns, *([] if self.other is None else [self.other])):
            for name in column_names.find_ids(columns.names, split):
                array = columns.get([name], True)[0]
                if array.ndim == 2 and array.shape[1] == 1:
                    array = array[:, 0]
                if array.ndim != 1 or array.dtype.kind not in "iufUSO" or len(array) != images:
                    if column_names.plain(name) in column_names.IDS[0]:
                        if array.shape == (images,):
                            raise ValueError(
                                f"{name} holds {array.dtype}: expected texts or numbers"
                            )
                        raise ValueError(
                            f"{name} has shape {list(array.shape)}, expected [{images}] to match "
                            "the labels"
                        )
                    continue  # a column `image` may hold pixels
                ids = text_of(array, name)
                missing = sum(not i.strip() for i in ids)
                if missing:
                    raise ValueError(
                        f"{missing} of {len(ids)} images have no id: give each one, or no ids "
                        f"(column {name})"
                    )
                if columns is self.columns:
                    self.used.append(name)
                self.notes.append(f"ids from {name}")
                return self._unique(ids, name)
        return [f"row_{i:07d}" for i in range(images)]

    @staticmethod
    def _unique(ids: list[str], name: str) -> list[str]:
        count = len(ids) - len(set(ids))
        if count > len(ids) / 2:
            raise ValueError(
                f"{name} names {counted(len(set(ids)), 'image')} in {len(ids):,} rows: a row must "
                "be one image with one answer, not a pixel, a box or a crop. Write a row "
                "for each image"
            )
        return ids

    def _compare_with_predictions(self, logits: np.ndarray) -> None:
        """Warn where a column of predictions is not the class of the largest score."""
        for name in self.columns.names:
            if column_names.split_of(name)[0] not in PREDICTIONS or name in self.used:
                continue
            try:
                answers = label_arrays.labels(self.columns.get([name], True))
            except ValueError:
                continue  # the column holds something else
            if answers.dtype.kind == "U" or len(answers) != len(logits):
                continue
            self.used.append(name)
            other = int((answers != logits.argmax(axis=1)).sum())
            if other > 0.01 * len(logits):
                self.warnings.append(
                    f"column {name} differs from the class of the largest score for {other} of "
                    f"{len(logits)} images: are the scores in the order of the labels?"
                )

    def _understood(
        self, shape: tuple[int, ...], chosen: Found, kind: str, label_names: Sequence[str]
    ) -> str:
        where = chosen.names[0]
        if len(chosen.names) > 1:
            where = f"{chosen.names[0]} to {chosen.names[-1]}"
        unused = [name for name in self.columns.names if name not in self.used]
        parts = [
            f"{self.path.name}: {counted(shape[0], 'image')}, {shape[1]:,} classes",
            f"{kind} from {where}",
            "labels from " + column_names.shortened(label_names),
            *self.notes,
        ]
        if not any(note.startswith("ids from") for note in self.notes):
            parts.append("no ids, so images are named by their rows")
        if unused:
            parts.append(f"not used: {column_names.shortened([n or '(no name)' for n in unused])}")
        return "; ".join(parts)
