"""Files of logits from elsewhere: what is understood, and what is refused."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flatcal_dist import cli
from flatcal_dist.calibration.records.imported import read_file
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.summary import summarize
from tests.calibration.test_records import assert_same
from tests.support.foreign_tables import IDS, PLAIN, SAME, K, N, P, Y, Z
from tests.support.synthetic import make_logits


def test_probabilities_are_the_softmax_of_their_logarithm(tmp_path):
    ids, labels, logits = make_logits(50)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    np.savez(tmp_path / "p.npz", ids=ids, labels=labels, probabilities=p)
    direct, read = Records.from_logits(ids, labels, logits), read_file(tmp_path / "p.npz")
    assert read.before.nll == pytest.approx(direct.before.nll, abs=1e-12)
    assert read.after.nll == pytest.approx(direct.after.nll, abs=1e-8)
    assert read.temperature == pytest.approx(direct.temperature, rel=1e-8)


def test_a_probability_of_zero_is_no_answer_for_the_label_only(tmp_path):
    p = np.tile([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]], (5, 1))
    np.savez(tmp_path / "p.npz", labels=np.tile([0, 0], 5), probs=p)
    records = read_file(tmp_path / "p.npz")
    assert records.before.nll[:2] == pytest.approx(-np.log([0.5, 0.2]), abs=1e-12)
    assert records.before.brier[:2] == pytest.approx([0.5, 2 * 0.8**2], abs=1e-12)
    assert records.id[0] == "row_0000000"
    np.savez(tmp_path / "q.npz", labels=np.tile([0, 2], 5), probs=p)
    with pytest.raises(ValueError, match="the label of 5 images has the probability 0"):
        read_file(tmp_path / "q.npz")


def test_scores_that_a_softmax_has_lost_are_left_out(tmp_path):
    """The logarithm of the sum of probabilities is 0 for all: what it ranks by is rounding."""
    ids, labels, logits = make_logits(120)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    np.savez(tmp_path / "p.npz", ids=ids, labels=labels, probabilities=p)
    np.savez(tmp_path / "z.npz", ids=ids, labels=labels, logits=logits)
    of_p, of_z = (read_file(tmp_path / name) for name in ("p.npz", "z.npz"))
    of_p.save(tmp_path / "records.parquet")
    m, n = (summarize(r, resamples=2) for r in (Records.load(tmp_path / "records.parquet"), of_z))
    names = [[row.name for row in found.scores.rows] for found in (m, n)]
    assert set(names[1]) - set(names[0]) == {"energy", "max_logit"}
    assert "not known" in m.conventions["logits"]
    for row in m.scores.rows:
        same = next(r for r in n.scores.rows if r.name == row.name)
        assert row.values["aurc"].value == pytest.approx(same.values["aurc"].value)


@pytest.mark.filterwarnings("ignore:no finite temperature")
def test_csv_ids_stay_text_and_columns_may_come_in_any_order(tmp_path):
    lines = ["p_1,id,label,p_0", *(f"0.{i},00{i},{i % 2},{1 - i / 10:.1f}" for i in range(1, 9))]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    records = read_file(tmp_path / "x.csv")
    assert records.id[:2].tolist() == ["001", "002"]
    assert records.before.nll[0] == pytest.approx(-np.log(0.1))
    assert records.before.nll[1] == pytest.approx(-np.log(0.8))


def test_records_of_a_report_are_read_as_they_are(tmp_path, records):
    records.save(tmp_path / "records.parquet")
    assert_same(read_file(tmp_path / "records.parquet"), records)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("logit_0,logit_1\n1,2", "expected one of label, .* to hold the labels"),
        ("label,logit_0,logit_2\n0,1,2", "no column for class 1"),
        ("label,a,b\n0,1,2", "expected the scores"),
        ("label,logit_0,logit_1,p_0,p_1\n0,1,2,0.5,0.5", "expected the scores"),
        ("label,logit_0,logit_1\n0,inf,2\n1,1,2", "NaN or infinite, first row_0000000"),
        ("label,logit_0,logit_1\n0,,2\n1,1,2", "column logit_0 has 1 empty or NaN cells"),
        ("label,logit_0,logit_1\n2,1,2\n1,1,2", r"labels must lie in 0\.\.1"),
        ("label,logit_0,logit_1\n0.5,1,2\n1,1,2", "labels must be integers"),
        ("label,logit_0,logit_1\ncat,1,2\ndog,1,2", "labels must be integers"),
        ("id,label,logit_0,logit_1\na,0,1,2\na,1,1,2", "1 ids occur more than once, first 'a'"),
        ("label,p_0,p_1\n0,3,-2", "must lie in 0..1"),
        ("label,p_0,p_1\n0,0.7,0.7", "must sum to 1"),
        ("label,logit_0,prob_0,logit_00\n0,1,2,3", "two columns hold class 0"),
        ("label,logit_0,logit_1\n0,nan,2\n1,1,2", "column logit_0 has 1 empty or NaN cells"),
        ("id,label,logit_0,logit_1\na,0,1,2\n,1,1,2", "1 of 2 images have no id"),
        ("label,logit_0,logit_1", r"x\.csv: it has a header line and no rows"),
    ],
)
def test_refused(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / "x.csv")


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", labels=np.array([{}], dtype=object), logits=[[1.0, 2.0]])
    with pytest.raises(ValueError, match="without unpickling"):
        read_file(tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"y\.npz cannot be read"):
        read_file(tmp_path / "y.npz")
    np.savez(tmp_path / "w.npz", labels=np.arange(500), logits=np.zeros((500, 2)))
    whole = (tmp_path / "w.npz").read_bytes()
    for share in (0.3, 0.9):
        (tmp_path / "w.npz").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"w\.npz cannot be read"):
            read_file(tmp_path / "w.npz")
    without = pa.table({"id": ["a", None], "label": [0, 1], "logits": [[1.0, 2.0], [1.0, 0.0]]})
    pq.write_table(without, tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="1 of 2 images have no id"):
        read_file(tmp_path / "v.parquet")
    with pytest.raises(ValueError, match=r"none of \.npz"):
        read_file(tmp_path / "x.mat")
    with pytest.raises(ValueError, match="No such file"):
        read_file(tmp_path / "x.pt")
    ragged = pa.table({"label": [0, 1], "logits": [[1.0, 2.0], [1.0]]})
    pq.write_table(ragged, tmp_path / "z.parquet")
    with pytest.raises(ValueError, match="different lengths"):
        read_file(tmp_path / "z.parquet")


def test_the_command_reports_on_a_file(tmp_path):
    ids, labels, logits = make_logits(40, classes=3)
    np.savez(tmp_path / "mine.npz", ids=ids, labels=labels, logits=logits)
    cli.main(["report", str(tmp_path / "mine.npz")])
    assert (tmp_path / "mine_report/index.html").stat().st_size > 0
    own = Records.load(tmp_path / "mine_report/records.parquet")
    assert np.array_equal(own.before.nll, Records.from_logits(ids, labels, logits).before.nll)


@pytest.mark.filterwarnings("ignore:no finite temperature")
@pytest.mark.parametrize("form", SAME)
def test_what_programs_write_is_read(tmp_path, form):
    name, write = SAME[form]
    write(tmp_path / name)
    records = read_file(tmp_path / name)
    assert records.id.tolist() == IDS
    assert records.label.tolist() == Y.tolist()
    assert records.before.nll == pytest.approx(-np.log(P[np.arange(N), Y]), abs=1e-9)


@pytest.mark.filterwarnings("ignore:no finite temperature")
def test_ids_are_the_same_from_every_format(tmp_path):
    """Or compare would lose the pairs, and folds would be others."""
    seen = []
    for name in ("Id", "ID", "ids"):
        (tmp_path / "a.csv").write_text(PLAIN.replace("id,", f"{name},", 1))
        seen.append(read_file(tmp_path / "a.csv"))
    np.savez(tmp_path / "b.npz", ids=np.array(IDS, "S"), labels=Y, logits=Z)
    seen.append(read_file(tmp_path / "b.npz"))
    for records in seen:
        assert records.id.tolist() == IDS
        assert records.after.nll == pytest.approx(seen[0].after.nll, abs=1e-12)


@pytest.mark.filterwarnings("ignore:no finite temperature")
def test_unsigned_labels_do_not_pass_a_probability_of_zero(tmp_path):
    p = P.copy()
    p[0] = np.eye(K)[(Y[0] + 1) % K]
    for kind in (np.uint8, np.uint16, np.int32, np.float64):
        np.savez(tmp_path / "a.npz", probabilities=p, labels=Y.astype(kind))
        with pytest.raises(ValueError, match="the label of 1 image has the probability 0"):
            read_file(tmp_path / "a.npz")


def test_a_report_on_a_file_needs_no_torch(tmp_path):
    """Its import takes seconds, once most of the time of a small report."""
    np.savez(tmp_path / "a.npz", logits=Z, labels=Y)
    code = (
        "import sys; from flatcal_dist import cli; from flatcal_dist.calibration import report; "
        "report.write_report = lambda *_: None; "
        f"cli.main(['report', {str(tmp_path / 'a.npz')!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0
