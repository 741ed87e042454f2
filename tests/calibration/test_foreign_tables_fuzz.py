"""Tables with random faults: the right meaning or a reason, never a traceback or nonsense."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flatcal_dist.calibration.records.imported import Scores, read_scores
from tests.calibration.test_foreign_tables import check
from tests.support.foreign_tables import IDS, NAMES, SAME, K, N, P, Y, Z, scores, text

Table = dict[str, Any]


def write(table: Table, suffix: str, path: Path) -> Path:
    """Columns [N] and scores [N, K] in one of the formats."""
    path = path / f"a{suffix}"
    arrays = {str(name): np.asarray(value) for name, value in table.items()}
    if suffix == ".npz":
        np.savez(path, **arrays)
    elif suffix == ".pt":
        torch.save(
            {n: v.tolist() if v.dtype.kind in "US" else torch.tensor(v) for n, v in arrays.items()},
            path,
        )
    elif suffix == ".parquet":
        pq.write_table(pa.table({n: v.tolist() for n, v in arrays.items()}), path)
    elif suffix == ".json":
        path.write_text(json.dumps({n: v.tolist() for n, v in arrays.items()}))
    else:
        names = []
        for name, value in arrays.items():
            one = name.removesuffix("ities").removesuffix("s")
            names += scores(one) if value.ndim == 2 else [name]
        path.write_text(text(names, *arrays.values()))
    return path


def set_at(column: str, value: Callable[[np.random.Generator], Any]) -> Callable:
    def mutated(table: Table, rng: np.random.Generator) -> Table:
        array = np.array(table[column])
        place = tuple(rng.integers(0, n) for n in array.shape)
        array = array.astype(object) if isinstance(value(rng), str) else array
        array[place] = value(rng)
        return table | {column: array if array.dtype != object else array.astype(str)}

    return mutated


def renamed(old: str, *new: str) -> Callable:
    def mutated(table: Table, rng: np.random.Generator) -> Table:
        return {(rng.choice(new) if n == old else n): v for n, v in table.items()}

    return mutated


def changed(column: str, *change: Callable[[Any], Any]) -> Callable:
    def mutated(table: Table, rng: np.random.Generator) -> Table:
        return table | {column: change[rng.integers(len(change))](np.asarray(table[column]))}

    return mutated


def without(column: str) -> Callable:
    return lambda table, rng: {n: v for n, v in table.items() if n != column}


def shuffled(table: Table, rng: np.random.Generator) -> Table:
    names = list(table)
    rng.shuffle(names)
    return {name: table[name] for name in names}


HARMLESS = {
    "order": shuffled,
    "label name": renamed("label", "labels", "Target", "y_true", "GT", "trueLabel", "class_id"),
    "id name": renamed("id", "ID", "ids", "image_path", "FileName", "key", "sample id"),
    "label type": changed("label", lambda y: y.astype(np.uint8), lambda y: y.astype(np.float64),
                          lambda y: y.astype(np.int16), lambda y: y.astype(str)),
    "other columns": lambda t, rng: t | {"loss": rng.normal(size=N), "split": ["val"] * N},
    "answers": lambda t, rng: t | {"prediction": Z.argmax(axis=1)},
}  # fmt: skip
FATAL = {
    "NaN": set_at("logits", lambda rng: rng.choice([np.nan, np.inf, -np.inf])),
    "label beyond": set_at("label", lambda rng: int(rng.choice([-1, K, 255, -100, 2**40]))),
    "label between": set_at("label", lambda rng: "1.5"),
    "label empty": set_at("label", lambda rng: ""),
    "label a name": set_at("label", lambda rng: "cat"),
    "no label": without("label"),
    "no scores": without("logits"),
    "twice": lambda t, rng: t | {"id": [IDS[0], *IDS[:-1]]},
    "id empty": set_at("id", lambda rng: rng.choice(["", "  "])),
    "two labels": lambda t, rng: t | {"target": Y},
    "strange scores": renamed("logits", "features", "embedding", "confidences"),
    "short labels": changed("label", lambda y: y[:-1]),
    "short ids": changed("id", lambda i: i[:-1]),
    "called probabilities": renamed("logits", "probabilities", "probs"),
    "texts": changed("logits", lambda z: z.astype(str)[:, 0], lambda z: np.array(["x"] * len(z))),
    "constant names": changed("label", lambda y: np.array(NAMES)[y]),
}  # fmt: skip
FORMATS = (".npz", ".pt", ".parquet", ".json", ".csv")


@pytest.mark.parametrize("suffix", FORMATS)
def test_faults_of_contents(tmp_path, suffix):
    rng = np.random.default_rng(FORMATS.index(suffix))
    plain = {"id": IDS, "label": Y, "logits": Z}
    for _ in range(3):
        for name, mutate in HARMLESS.items():
            table = mutate(mutate(plain, rng) if name == "order" else plain, rng)
            check(read_scores(write(table, suffix, tmp_path)))
        for name, mutate in FATAL.items():
            table = HARMLESS[rng.choice(["order", "other columns"])](mutate(plain, rng), rng)
            try:
                path = write(table, suffix, tmp_path)
            except (ValueError, pa.ArrowInvalid):
                continue  # this format cannot hold it
            with pytest.raises(ValueError, match=r"\.\w+") as caught:
                pytest.fail(f"{name}: {read_scores(path).understood}")
            assert str(path) in str(caught.value), name


def invariants(found: Scores) -> None:
    images, classes = found.logits.shape
    assert len(found.ids) == len(set(found.ids)) == len(found.labels) == images
    assert classes >= 2
    assert found.labels.min() >= 0
    assert found.labels.max() < classes
    assert np.isfinite(found.logits).all()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    array, kind = bytearray(data), rng.integers(6)
    place = int(rng.integers(len(data)))
    length = int(rng.integers(1, 40))
    if kind == 0:
        return bytes(array[:place])
    if kind == 1:
        del array[place : place + length]
    elif kind == 2:
        array[place:place] = array[: place + length][-length:]
    elif kind == 3:
        array[place : place + length] = rng.bytes(length)
    elif kind == 4:
        for at in rng.integers(0, len(data), 5):
            array[at] ^= 1 << rng.integers(8)
    else:
        a, b = (bytes([rng.choice(list(b',;\t."[]{}0-'))]) for _ in "ab")
        return bytes(array).replace(a, b, int(rng.integers(1, 30)))
    return bytes(array)


def test_damaged_bytes(tmp_path):
    """Some 350 files: one byte more or less in all of the forms, six times."""
    rng = np.random.default_rng(11)
    refused = read = 0
    for form, (name, make) in SAME.items():
        folder = tmp_path / form.replace(" ", "_").replace("'", "")
        folder.mkdir()
        make(folder / name)
        whole = (folder / name).read_bytes()
        for _ in range(6):
            (folder / name).write_bytes(damaged(whole, rng))
            found = reason = None
            try:
                found = read_scores(folder / name)
            except ValueError as error:
                reason = str(error)
            if found is None:
                assert str(folder / name) in reason
                refused += 1
            else:
                invariants(found)
                read += 1
    assert refused > 100
    assert read > 30


def test_probabilities_with_random_faults(tmp_path):
    rng = np.random.default_rng(3)
    for _ in range(40):
        p, row = P.copy(), rng.integers(N)
        fault = rng.integers(5)
        if fault == 0:
            p[row] *= 1.2
        elif fault == 1:
            p[row, rng.integers(K)] = -0.01
        elif fault == 2:
            p[row] = np.eye(K)[(Y[row] + 1) % K]
        elif fault == 3:
            p[row, 0] = np.nan
        else:
            p[row] = 0
        path = write({"label": Y, "probs": p}, rng.choice(FORMATS), tmp_path)
        with pytest.raises(ValueError, match=r"probabilit|NaN"):
            read_scores(path)
