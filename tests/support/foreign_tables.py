"""One table of scores in the many forms in which programs write it."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import torch

N, K = 24, 4
NAMES = ["cat", "dog", "ox", "golden retriever"]
rng = np.random.default_rng(5)
Z = rng.normal(size=(N, K)).round(6) * 2
Y = np.concatenate([np.arange(K), rng.integers(0, K, N - K)])
P = np.exp(Z) / np.exp(Z).sum(axis=1, keepdims=True)
IDS = [f"{i:05d}" for i in range(N)]
MEMBERS = rng.normal(size=(3, N, K))
MEAN = (np.exp(MEMBERS) / np.exp(MEMBERS).sum(axis=2, keepdims=True)).mean(axis=0)
BINARY = rng.uniform(0.05, 0.95, N)
TWO = np.stack([1 - BINARY, BINARY], axis=1)
TWO_LABELS = (rng.uniform(size=N) < BINARY).astype(int)


def text(
    names: list[str], *columns: Any, sep: str = ",", decimal: str = ".", first: str = ""
) -> str:
    """A table as text; columns of numbers [N] or [N, n], or of texts."""

    def cell(value: Any) -> str:
        return repr(float(value)).replace(".", decimal) if isinstance(value, float) else str(value)

    flat = [c for column in columns for c in (column.T if np.ndim(column) == 2 else [column])]
    rows = [sep.join(cell(v) for v in row) for row in zip(*(np.asarray(c).tolist() for c in flat),
                                                         strict=True)]  # fmt: skip
    return first + "\n".join([sep.join(names), *rows]) + "\n"


def scores(word: str, first: int = 0) -> list[str]:
    return [f"{word}_{i}" for i in range(first, K + first)]


def parquet(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)


PLAIN = text(["id", "label", *scores("logit")], IDS, Y, Z)
OF_P = text(["id", "label", *scores("prob")], IDS, Y, P)
ROWS = [{"id": i, "label": int(y), "logits": z} for i, y, z in zip(IDS, Y, Z.tolist(), strict=True)]
LISTS = pa.array(Z.tolist(), pa.large_list(pa.float64()))

# name of the file: what writes it. All of them hold Z (or P), Y and IDS.
SAME: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "comma": ("a.csv", lambda f: f.write_text(PLAIN)),
    "tabs": ("a.tsv", lambda f: f.write_text(text(["id", "label", *scores("logit")], IDS, Y, Z,
                                                  sep="\t"))),
    "tabs in csv": ("a.csv", lambda f: f.write_text(PLAIN.replace(",", "\t"))),
    "semicolons, decimal commas": ("a.csv", lambda f: f.write_text(
        text(["id", "label", *scores("logit")], IDS, Y, Z, sep=";", decimal=","))),
    "decimal commas in quotes": ("a.csv", lambda f: f.write_text(text(
        ["id", "label", *scores("logit")], IDS, Y,
        np.array([[f'"{v!r}"'.replace(".", ",") for v in row] for row in Z.tolist()])))),
    "Excel's sep=": ("a.csv", lambda f: f.write_text(
        text(["id", "label", *scores("logit")], IDS, Y, Z, sep=";", first="sep=;\n"))),
    "bars": ("a.txt", lambda f: f.write_text(PLAIN.replace(",", "|"))),
    "spaces": ("a.txt", lambda f: f.write_text(PLAIN.replace(",", "   "))),
    "savetxt": ("a.txt", lambda f: f.write_text("# " + PLAIN.replace(",", " "))),
    "comments": ("a.csv", lambda f: f.write_text("# of a run\n\n" + PLAIN)),
    "UTF-16": ("a.csv", lambda f: f.write_bytes(PLAIN.encode("utf-16"))),
    "UTF-16 without mark": ("a.csv", lambda f: f.write_bytes(PLAIN.encode("utf-16-be"))),
    "UTF-8 with mark": ("a.csv", lambda f: f.write_bytes(PLAIN.encode("utf-8-sig"))),
    "CRLF": ("a.csv", lambda f: f.write_bytes(PLAIN.replace("\n", "\r\n").encode())),
    "CR": ("a.csv", lambda f: f.write_bytes(PLAIN.replace("\n", "\r").encode())),
    "gz": ("a.csv.gz", lambda f: f.write_bytes(gzip.compress(PLAIN.encode()))),
    "bz2": ("a.tsv.bz2", lambda f: f.write_bytes(bz2.compress(PLAIN.encode()))),
    "xz": ("a.csv.xz", lambda f: f.write_bytes(lzma.compress(PLAIN.encode()))),
    "index of pandas": ("a.csv", lambda f: f.write_text(
        text(["", "Id", "y_true", *scores("logit")], np.arange(N), IDS, Y, Z))),
    "image_path": ("a.csv", lambda f: f.write_text(
        text(["image_path", "true_label", *scores("logits")], IDS, Y, Z))),
    "columns from 1": ("a.csv", lambda f: f.write_text(
        text(["filename", "label", *scores("prob", 1)], IDS, Y + 1, P))),
    "columns from 1, labels from 0": ("a.csv", lambda f: f.write_text(
        text(["filename", "label", *scores("prob", 1)], IDS, Y, P))),
    "columns by class": ("a.csv", lambda f: f.write_text(
        text(["id", "label", *(f"prob_{n}" for n in NAMES)], IDS, [NAMES[y] for y in Y], P))),
    "columns are classes": ("a.csv", lambda f: f.write_text(
        text(["id", *NAMES, "label"], IDS, P, [NAMES[y] for y in Y]))),
    "bare numbers": ("a.csv", lambda f: f.write_text(
        text(["id", "target", *map(str, range(K))], IDS, Y, Z))),
    "camel case": ("a.csv", lambda f: f.write_text(
        text(["imageId", "trueLabel", *(f"Logit{i}" for i in range(K))], IDS, Y, Z))),
    "lists in cells": ("a.csv", lambda f: f.write_text(
        text(["id", "label", "logits"], IDS, Y, [f'"{z}"' for z in Z.tolist()]))),
    "arrays in cells": ("a.csv", lambda f: f.write_text(
        text(["id", "label", "probs"], IDS, Y,
             [f'"{np.array2string(p, precision=17)}"' for p in P]))),
    "floats as labels": ("a.csv", lambda f: f.write_text(
        text(["id", "label", *scores("logit")], IDS, Y.astype(float), Z))),
    "per cent": ("a.csv", lambda f: f.write_text(
        text(["id", "label", *scores("prob")], IDS, Y, 100 * P))),
    "one-hot columns": ("a.csv", lambda f: f.write_text(
        text(["id", *scores("label"), *scores("logit")], IDS, np.eye(K, dtype=int)[Y], Z))),
    "list of objects": ("a.json", lambda f: f.write_text(json.dumps(ROWS))),
    "object of lists": ("a.json", lambda f: f.write_text(
        json.dumps({"ids": IDS, "labels": Y.tolist(), "logits": Z.tolist()}))),
    "lines": ("a.jsonl", lambda f: f.write_text("\n".join(map(json.dumps, ROWS)))),
    "lines called json": ("a.json", lambda f: f.write_text("\n".join(map(json.dumps, ROWS)))),
    "json.gz": ("a.json.gz", lambda f: f.write_bytes(gzip.compress(json.dumps(ROWS).encode()))),
    "split of pandas": ("a.json", lambda f: f.write_text(json.dumps({
        "columns": ["id", "label", "logits"], "index": list(range(N)),
        "data": [list(row.values()) for row in ROWS]}))),
    "pandas by column": ("a.json", lambda f: f.write_text(json.dumps({
        key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}))),
    "npz": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS), labels=Y, logits=Z)),
    "bytes as ids": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS, "S"), labels=Y, logits=Z)),
    "uint8 labels": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS), label=Y.astype(np.uint8),
                                                 probs=P)),
    "column of labels": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS), y_true=Y[:, None],
                                                     y_score=P)),
    "one-hot labels": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS), labels=np.eye(K)[Y],
                                                   test_logits=Z)),
    "split": ("a.npz", lambda f: np.savez(f, test_ids=np.array(IDS), test_labels=Y,
                                          test_logits=Z)),
    "texts of digits": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS), labels=Y.astype(str),
                                                    logits=Z)),
    "names and their list": ("a.npz", lambda f: np.savez(
        f, ids=np.array(IDS), labels=np.array(NAMES)[Y], logits=Z, classes=np.array(NAMES))),
    "log-probabilities": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS), labels=Y,
                                                      log_probs=np.log(P))),
    "big-endian": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS), labels=Y.astype(">i2"),
                                               logits=Z.astype(">f8"))),
    "heads of convolutions": ("a.npz", lambda f: np.savez(f, ids=np.array(IDS), labels=Y,
                                                          logits=Z[:, :, None, None])),
    "npy": ("test_logits.npy", lambda f: (
        np.save(f, Z), np.save(f.with_name("test_labels.npy"), Y),
        np.save(f.with_name("test_ids.npy"), np.array(IDS)))),
    "record array": ("a.npy", lambda f: np.save(f, np.array(
        list(zip(IDS, Y, Z.tolist(), strict=True)),
        dtype=[("id", "U8"), ("label", "i4"), ("logits", "f8", (K,))]))),
    "pt": ("a.pt", lambda f: torch.save(
        {"ids": IDS, "labels": torch.tensor(Y), "logits": torch.tensor(Z), "epoch": 3}, f)),
    "parquet": ("a.parquet", lambda f: parquet(f, id=IDS, label=Y, logits=Z.tolist())),
    "large lists": ("a.parquet", lambda f: parquet(f, id=pa.array(IDS, pa.large_string()),
                                                   label=Y, logits=LISTS)),
    "fixed lists": ("a.parquet", lambda f: parquet(
        f, id=IDS, label=Y, logits=pa.array(Z.tolist(), pa.list_(pa.float64(), K)))),
    "list views": ("a.parquet", lambda f: parquet(
        f, id=IDS, label=Y, logits=pa.array(Z.tolist(), pa.list_view(pa.float64())))),
    "dictionaries": ("a.parquet", lambda f: parquet(
        f, id=pa.array(IDS).dictionary_encode(), label=pa.array(Y).dictionary_encode(),
        logits=Z.tolist())),
    "binary ids": ("a.parquet", lambda f: parquet(
        f, id=pa.array([i.encode() for i in IDS], pa.binary()), label=Y, logits=Z.tolist())),
    "feather": ("a.feather", lambda f: pyarrow.feather.write_feather(
        pa.table({"id": IDS, "label": Y, "logits": Z.tolist()}), f)),
    "pixels beside": ("a.npz", lambda f: np.savez(f, id=np.array(IDS), image=np.zeros((N, 3, 2, 2)),
                                                  labels=Y, logits=Z)),
}  # fmt: skip

try:  # older Arrow cannot write list views, so that nobody has such a file
    parquet(Path(os.devnull), logits=pa.array(Z.tolist(), pa.list_view(pa.float64())))
except pa.ArrowNotImplementedError:
    del SAME["list views"]
