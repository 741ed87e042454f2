"""Tables as strangers write them: read with the right meaning, or refused with a reason."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flatcal_dist import cli
from flatcal_dist.calibration.records.class_list import read_class_names
from flatcal_dist.calibration.records.imported import Scores, import_file, read_scores
from flatcal_dist.calibration.report import writing as report
from tests.support.foreign_tables import (
    BINARY,
    IDS,
    MEAN,
    MEMBERS,
    NAMES,
    OF_P,
    PLAIN,
    SAME,
    TWO,
    TWO_LABELS,
    K,
    N,
    P,
    Y,
    Z,
    scores,
    text,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def check(found: Scores, p: np.ndarray = P, y: np.ndarray = Y, ids: list[str] = IDS) -> None:
    assert found.ids == ids
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == y.tolist()
    assert softmax(found.logits) == pytest.approx(p, abs=1e-9)


@pytest.mark.parametrize("form", SAME)
def test_one_table_in_all_its_forms(tmp_path, form):
    name, write = SAME[form]
    write(tmp_path / name)
    found = read_scores(tmp_path / name)
    check(found)
    assert name in found.understood
    assert not found.warnings


ROWS = [f"row_{i:07d}" for i in range(N)]


@pytest.mark.parametrize(
    ("arrays", "p", "y"),
    [
        ({"logits": MEMBERS, "labels": Y}, MEAN, Y),
        ({"logits": np.log(MEAN)[None], "labels": Y}, MEAN, Y),
        ({"probs": np.exp(MEMBERS) / np.exp(MEMBERS).sum(2, keepdims=True), "y": Y}, MEAN, Y),
        ({"probs": np.moveaxis(np.exp(MEMBERS) / np.exp(MEMBERS).sum(2, keepdims=True), 0, 1),
          "y": Y}, MEAN, Y),
        ({"prob": BINARY, "label": TWO_LABELS}, TWO, TWO_LABELS),
        ({"prob": BINARY[:, None], "label": TWO_LABELS > 0}, TWO, TWO_LABELS),
        ({"y_score": BINARY, "y_true": TWO_LABELS}, TWO, TWO_LABELS),
        ({"logit": np.log(BINARY / (1 - BINARY)), "target": TWO_LABELS}, TWO, TWO_LABELS),
        ({"arr_0": Z, "arr_1": Y}, P, Y),
        ({"arr_0": P, "arr_1": Y}, P, Y),
        ({"scores": P.astype(np.float32), "gt": Y[None]}, P, Y),
    ],
)  # fmt: skip
def test_shapes_and_kinds(tmp_path, arrays, p, y):
    np.savez(tmp_path / "a.npz", **arrays)
    found = read_scores(tmp_path / "a.npz")
    assert found.ids == ROWS
    assert found.labels.tolist() == y.tolist()
    assert softmax(found.logits) == pytest.approx(p, abs=1e-7)


def test_probabilities_called_logits_earn_a_warning(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", logits=P, labels=Y)
    found = import_file(tmp_path / "a.npz")
    assert "are called logits" in found.warnings[0]
    assert found.records.before.nll.mean() == pytest.approx(
        -np.log(softmax(P)[np.arange(N), Y]).mean()
    )
    right = import_file(tmp_path / "a.npz", scores="probabilities")
    assert not right.warnings
    assert right.records.before.nll.mean() == pytest.approx(-np.log(P[np.arange(N), Y]).mean())
    np.savez(tmp_path / "b.npz", logits=BINARY, labels=TWO_LABELS)
    assert "as probabilities do" in read_scores(tmp_path / "b.npz").warnings[0]
    np.savez(tmp_path / "c.npz", logits=np.log(P), labels=Y)
    assert read_scores(tmp_path / "c.npz").kind == "log-probabilities"


def test_predictions_that_differ_from_the_scores_earn_a_warning(tmp_path):
    np.savez(tmp_path / "a.npz", logits=Z, labels=Y, pred=(Z.argmax(1) + 1) % K)
    assert "in the order of the labels?" in read_scores(tmp_path / "a.npz").warnings[0]
    np.savez(tmp_path / "a.npz", logits=Z, labels=Y, pred=Z.argmax(1))
    assert not read_scores(tmp_path / "a.npz").warnings


def test_labels_and_names_from_other_files(tmp_path):
    (tmp_path / "z.csv").write_text(text(scores("logit"), Z))
    (tmp_path / "y.txt").write_text("\n".join(["label", *map(str, Y)]))
    found = read_scores(tmp_path / "z.csv", labels=tmp_path / "y.txt")
    check(found, ids=ROWS)
    (tmp_path / "y.csv").write_text(text(["id", "label"], IDS, np.array(NAMES)[Y]))
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    names = read_class_names(tmp_path / "names.txt")
    found = read_scores(tmp_path / "z.csv", labels=tmp_path / "y.csv", classes=names)
    check(found)
    assert found.class_names == NAMES
    (tmp_path / "bare.csv").write_text(text([*NAMES, "label", "loss"], Z, Y, np.zeros(N)))
    check(read_scores(tmp_path / "bare.csv", classes=names), ids=ROWS)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("cat\ndog\nox\n", ["cat", "dog", "ox"]),
        ("0 cat\n1 big dog\n2 ox", ["cat", "big dog", "ox"]),
        ('["cat", "dog"]', ["cat", "dog"]),
        ('{"0": ["n01", "cat"], "1": ["n02", "dog"]}', ["cat", "dog"]),
        ('{"1": "dog", "0": "cat"}', ["cat", "dog"]),
        ('{"0": "cat", "2": "dog"}', None),
        ("cat\n\ndog", None),
        ("cat", None),
        ("[1, 2]", None),
        ("[", None),
        ("\0\1", None),
    ],
)
def test_names_of_classes(tmp_path, content, names):
    (tmp_path / "names").write_text(content)
    if names is None:
        with pytest.raises(ValueError, match="holds no names of classes"):
            read_class_names(tmp_path / "names")
    else:
        assert read_class_names(tmp_path / "names") == names


REFUSED = {
    "segmentation": ({"logits": np.zeros((3, K, 8, 8)), "labels": np.zeros(3, int)},
                     "more than one answer per image, as in segmentation"),
    "labels of pixels": ({"logits": Z, "labels": np.zeros((N, 8, 8), int)}, "as in segmentation"),
    "several labels": ({"logits": Z, "labels": np.ones((N, K), int)}, "several labels, or none"),
    "soft labels": ({"logits": Z, "labels": P}, "soft labels"),
    "transposed": ({"logits": Z.T, "labels": Y}, "transposed"),
    "ignored": ({"logits": Z, "labels": np.where(Y == 1, -100, Y)}, "leave out rows without"),
    "from 1": ({"logits": Z, "labels": Y + 1}, "if they count from 1, subtract 1"),
    "correctness": ({"logits": Z, "labels": Y > 1}, "Whether an answer is right is no label"),
    "two sets": ({"val_logits": Z, "val_labels": Y, "test_logits": Z, "test_labels": Y},
                 "a file for each set"),
    "two kinds": ({"logits": Z, "probs": P, "labels": Y}, "expected the scores"),
    "answers": ({"y_pred": Y, "labels": Y}, "whole numbers, which are answers"),
    "one-hot answers": ({"outputs": np.eye(K)[Y], "labels": Y}, "answers and no scores"),
    "sigmoids": ({"scores": np.full((N, K), 0.4), "labels": Y}, "may be logits or probabilities"),
    "names without order": ({"logits": Z, "labels": np.array(NAMES)[Y]}, "give --classes FILE"),
    "other names": ({"logits": Z, "labels": np.array(NAMES)[Y], "classes": np.array(list("abcd"))},
                    "are no names of classes, first 'cat'"),
    "huge labels": ({"logits": Z, "labels": np.full(N, 2**64 - 1, np.uint64)}, "class numbers"),
    "NaN labels": ({"logits": Z, "labels": np.full(N, np.nan)}, "NaN or infinite"),
    "complex": ({"logits": Z + 1j, "labels": Y}, "must hold numbers"),
    "rows of pixels": ({"logits": Z, "labels": Y, "image_id": np.arange(N) // 6},
                       "names 4 images in 24 rows: a row must be one image"),
    "ambiguous ensemble": ({"logits": np.ones((N, 3, K)) * Z[:, None], "labels": Y},
                           "save it as"),
    "no labels": ({"logits": Z}, "expected one of label"),
    "other number of ids": ({"logits": Z, "labels": Y, "ids": np.array(IDS[1:])}, "ids has shape"),
    "not log": ({"log_probs": Z, "labels": Y}, "do not sum to 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_arrays_that_are_refused(tmp_path, kind):
    arrays, message = REFUSED[kind]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        read_scores(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "0.1,0.9,1\n0.2,0.8,0\n", "its first line holds numbers .*header line"),
        ("a.csv", "", "is empty"),
        ("a.csv", PLAIN.replace("logit_1", "logit_0"), "two columns hold class 0"),
        ("a.csv", PLAIN.replace("id,", "label,", 1), "label, label all are"),
        ("a.csv", OF_P[:-30], "cannot be read"),
        ("a.csv", "label,prob\n1,0.5\n3,0.7\n", r"labels must lie in 0\.\.1"),
        ("a.csv", "label,logit_0\n1,0.5\n0,0.7\n", "the only column of scores"),
        ("a.csv", 'label;p_0;p_1\n1;"0,5";0.5\n', "decimal commas and with decimal points"),
        ("a.csv", 'label,probs\n1,"[0.1 ... 0.9]"\n', "was shortened when it was printed"),
        ("a.csv", "label,prob_max,prob_true\n1,0.5,0.5\n", "expected the scores"),
        ("a.csv", b"label,\xfflogit_0\n", "neither UTF-8 nor UTF-16"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\0\0", "no text|neither UTF-8"),
        ("a.csv", "x" * 5_000_000, "first line has no end"),
        ("a.csv", "label,logit_0,logit_1\n", "a header line and no rows"),
        ("a.csv", "label,p_0,p_1\n1,1%,2%\n", "column p_0 holds '1%', which is no number"),
        ("a.csv", 'y,logit_0,logit_1\n1,"1,607","-892"\n', "column logit_0 .* thousands"),
        ("a.csv", "y;logit_0;logit_1\n1;1.607;892\n", "column logit_0 .* thousands"),
        ("a.csv", 'y,logit\n1,"1,607"\n0,"892"\n', "column logit .* thousands"),
        ("a.csv", 'y,logit_0,logit_1\n2,1.5,2\n"1,000",1,2\n', "of labels .* thousands"),
        ("a.csv", "y,p_1,p_2\n1,0.5,0.5\n1,0.4,0.6\n", "all labels are 1, and .* is open"),
        ("a.csv", "sample,y,p\n0,1,0.5\n0,0,0.4\n0,1,0.5\n", "sample names 1 image in 3 rows"),
        ("a.json", "{", "no JSON"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.json", "[1, 2]", "expected a list of objects"),
        ("a.json", '{"label": [0, 1], "label": [1, 0], "logits": [[1, 2], [3, 4]]}', "of one name"),
        ("a.json", '{"label": [0, 1], "logits": [[1, 2], [3]]}', "different lengths"),
        ("a.json", '[{"label": 0, "logits": [1, 2]}, {"label": 1}]', "empty entries"),
        ("a.json", '{"label": [0, "1"], "logits": [[1, 2], [3, 4]]}', "holds int, str"),
        ("a.jsonl", '{"label": 0}\n{"label"', "line 2 is no JSON"),
        ("a.pkl", "x", "pickled objects can run code"),
        ("a.npz", "nothing", "no npz archive"),
        ("a.pt", "nothing", "more than tensors"),
        ("a.parquet", "nothing", "cannot be read"),
        ("a.csv.gz", "nothing", "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_scores(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_decimals_of_three_digits_are_no_thousands(tmp_path):
    table = "y;logit_0;logit_1\n1;1,607;892\n0;0,125;-2\n"
    (tmp_path / "a.csv").write_text(table)
    assert read_scores(tmp_path / "a.csv").logits.tolist() == [[1.607, 892], [0.125, -2]]


def test_a_column_of_predictions_beside_columns_called_by_the_classes(tmp_path):
    rows = "dog,0.2,0.8,cat\ncat,0.7,0.3,cat\n"
    (tmp_path / "a.csv").write_text(f"label,cat,dog,prediction\n{rows}")
    found = read_scores(tmp_path / "a.csv")
    assert softmax(found.logits) == pytest.approx(np.array([[0.2, 0.8], [0.7, 0.3]]))
    assert found.understood.startswith("a.csv: 2 images, 2 classes")


def test_utf_32_is_read_and_ids_of_another_type_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("label,logit_0,logit_1\n1,2,3\n".encode("utf-32"))
    found = read_scores(tmp_path / "a.csv")
    assert found.logits.tolist() == [[2, 3]]
    assert found.understood.startswith("a.csv: 1 image, 2 classes")
    np.savez(tmp_path / "a.npz", logits=Z, labels=Y, ids=np.arange(N).astype("datetime64[s]"))
    with pytest.raises(ValueError, match=r"ids holds datetime64\[s\]: expected texts or numbers"):
        read_scores(tmp_path / "a.npz")


class Attack:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.mkdir, (self.witness,)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"logits": torch.zeros(3, 2), "x": Attack(tmp_path / "pt")}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", logits=np.array([Attack(tmp_path / "npz")]), labels=[0])
    np.save(tmp_path / "logits.npy", np.array([Attack(tmp_path / "npy")]))
    for name in ("a.pt", "a.npz", "logits.npy"):
        with pytest.raises(ValueError, match="unpickling"):
            read_scores(tmp_path / name)
    assert not any((tmp_path / name).exists() for name in ("pt", "npz", "npy"))


def test_structs_and_ragged_lists_of_parquet_are_refused(tmp_path):
    for column, message in (
        ([{"a": 1.0}] * 2, "neither numbers nor lists"),
        ([[1.0, 2.0], [1.0]], "different lengths"),
        ([[1.0, 2.0], None], "different lengths"),
        ([[1.0, None], [1.0, 2.0]], "empty or NaN cells"),
    ):
        table = pa.table({"label": [0, 1], "logits": column})
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=message):
            read_scores(tmp_path / "a.parquet")


def test_the_command_says_what_it_understood(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "_write_page", lambda m, output: None)
    (tmp_path / "a.csv").write_text(
        text(["image_path", "label", "loss", *scores("logit")], IDS, np.array(NAMES)[Y], Y, P)
    )
    (tmp_path / "names").write_text("\n".join(NAMES))
    arguments = ["report", str(tmp_path / "a.csv"), "--classes", str(tmp_path / "names")]
    cli.main([*arguments, "--method", "sam", "--seed", "7", "--output", str(tmp_path / "r")])
    out, errors = capsys.readouterr()
    assert re.search(
        "a.csv: 24 images, 4 classes; logits from logit_0 to logit_3; labels from label; .*"
        "ids from image_path; not used: loss", out,
    )  # fmt: skip
    assert "warning: the scores are called logits" in errors
    m = json.loads((tmp_path / "r/metrics.json").read_text())
    assert (m["about"]["method"], m["about"]["seed"]) == ("sam", 7)
    assert "are called logits" in m["about"]["origin"]
    assert m["per_class"]["name"] == NAMES
    with pytest.raises(SystemExit, match="--seed is for a file of scores"):
        cli.main(["report", str(tmp_path), "--seed", "3"])
