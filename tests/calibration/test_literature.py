"""Published figures that stand beside those of a report."""

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.literature import FIGURES, _literature, references
from flatcal_dist.calibration.report.summary import About, summarize
from tests.support.synthetic import make_logits


def test_literature() -> None:
    rows = references("resnet50.tv_in1k", "anything", 1000, 50_000)
    tan = [r for r in rows if r["method"] == "CSAM"]
    assert [(r["accuracy"], r["ece"], r["ece_after_temperature"]) for r in tan] == [
        (0.7795, 0.0118, 0.0109)
    ]
    assert all(r["source"] for r in rows)
    assert references("resnet50", None, 1000, 49_999) == []
    assert references("resnet18", "digits", 10, 10_000) == []
    assert len(references("resnet18", "data/cifar10", 10, 10_000)) == 3
    for row in _literature():
        assert all(row[k] is None or 0 < row[k] < (8 if "nll" in k else 1) for k in FIGURES), row


def test_literature_stands_in_the_report() -> None:
    ids, labels, logits = make_logits(10_000, scale=1.0)
    records = Records.from_logits(ids, labels, logits)
    about = About(model="resnet18", data="cifar-10 test")
    assert len(summarize(records, about, resamples=1).references) == 3
