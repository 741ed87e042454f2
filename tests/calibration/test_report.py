import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.metrics.entries import METRICS, STATISTICS
from flatcal_dist.calibration.pages.drawing import save_figure
from flatcal_dist.calibration.pages.palette import PALETTE
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.model import read_metrics
from flatcal_dist.calibration.report.summary import About, summarize
from flatcal_dist.calibration.report.writing import render_report, write_report
from flatcal_dist.calibration.report_page.figures import draw_confidence
from flatcal_dist.calibration.report_page.verdict import verdict
from tests.support.synthetic import make_logits, make_records

ABOUT = About(
    model="resnet<18>",
    method="csam",
    settings={"rho": 0.05, "gamma": 0.5, "swa.start": 0.75},
    seed=3,
    data="digits & more",
    image_size=32,
    parameters=11_000_000,
    crop_pct=0.875,
    interpolation="bicubic",
    training_seconds=754.0,
    versions={"torch": "2.11.0"},
    configuration={"run": {"seed": 3}, "data": {"train": "<shards>"}},
)
HEADLINE = [
    "accuracy",
    "nll",
    "brier",
    "ece",
    "adaptive_ece",
    "mce",
    "rmsce",
    "ks",
    "smooth_ece",
    "signed_gap",
    "aurc",
    "eaurc",
    "augrc",
    "auroc",
    "fpr_at_95_tpr",
    "aupr_success",
    "aupr_error",
    "mean_entropy",
    "mean_entropy_correct",
    "mean_entropy_wrong",
]


class Page(HTMLParser):
    """Collects what the tests ask of a page."""

    VOID = frozenset(["meta", "link", "br", "hr", "img", "input"])

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.labelled: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name == "aria-labelledby":
                self.labelled += value.split()
            elif name in ("href", "xlink:href", "src"):
                self.targets.append(value)
            self.targets += [f"#{m}" for m in re.findall(r"url\(#([^)]*)\)", value or "")]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def assert_sound_page(path: Path, beside: set[str] = frozenset()) -> Page:
    """One file: whole, with unique ids, resolvable references and nothing from the network.

    `beside` holds the files to which it may lead.
    """
    html = path.read_text()
    page = Page(html)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.labelled) <= set(page.ids)
    targets = [t for t in page.targets if not t.startswith("data:image/jpeg;base64,")]
    targets = [t for t in targets if t not in beside]
    assert all(t.startswith("#") for t in targets), targets
    assert {t[1:] for t in targets} <= set(page.ids)
    assert not re.search(r"https?:|//[a-z]+\.|@import|@font-face", html)
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())
    assert not {c.light for c in PALETTE.values()} & set(re.findall(r"#\w{6}\b", _svgs(html)))
    for tag in ("main", "header", "nav", "footer", "h1", "caption", "svg"):
        assert tag in page.tags
    assert page.tags.count("h1") == 1
    assert page.tags.count("table") == page.tags.count("caption")
    assert all("<title" in svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    return page


def _svgs(html: str) -> str:
    return " ".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))


def strict_json(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def report(records: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "report"
    write_report(records, folder, ABOUT, resamples=100)
    return folder


def test_files(report: Path) -> None:
    names = {"reliability_before", "reliability_after", "confidence_before", "confidence_after"}
    names |= {"risk_coverage", "confusions"}
    figures = {f"figures/{n}.{s}" for n in names for s in ("png", "svg", "pdf")}
    tables = {"metrics.csv", "table.csv", "table.tex"}
    expected = {"index.html", "metrics.json", "records.parquet"} | tables | figures
    assert set(files(report)) == expected


def test_page(report: Path) -> None:
    page = assert_sound_page(report / "index.html")
    assert "resnet<18>, CSAM" in page.text
    assert "digits & more" in page.text
    for metric in METRICS.values():
        assert not metric.listed or metric.name in page.text
    for finding in verdict(read_metrics(report / "metrics.json")):
        assert finding.text in page.text


def test_metrics_json(report: Path, records: Records) -> None:
    m = strict_json(report / "metrics.json")
    assert m["schema_version"] == 3
    assert m["images"] == 400
    assert set(HEADLINE) <= set(m)
    assert set(HEADLINE) | {"intervals", "ece_null", "bins", "risk_coverage"} <= set(
        m["after_temperature"]
    )
    assert m["temperature"] == records.temperature
    assert m["temperature_folds"] == list(records.fold_temperatures)
    assert m["about"]["method"] == "csam"
    for side, scores in ((m, records.before), (m["after_temperature"], records.after)):
        pair = scores.confidence, scores.correct
        assert side["ece"] == metrics.expected_calibration_error(*pair)
        assert side["signed_gap"] == pytest.approx(metrics.signed_gap(*pair))
        assert side["nll"] == pytest.approx(scores.nll.mean())
        assert side["aurc"] == pytest.approx(selective.aurc(*pair), abs=1e-9)
        assert side["mean_entropy_wrong"] == scores.entropy[~scores.correct].mean()
        assert sum(b["count"] for b in side["bins"]) == 400
        curve = side["risk_coverage"]
        assert len(curve["coverage"]) == len(curve["risk"]) <= 1000
        assert curve["coverage"][-1] == 1
        for name in side["intervals"]:
            if STATISTICS[name].centred:
                continue  # without chance, it may lie below the value
            limits = side["intervals"][name]
            if limits["low"] is None and name.startswith("coverage_at"):
                continue  # too few errors are allowed there
            assert limits["low"] - 1e-9 <= side[name] <= limits["high"] + 1e-9, name


def test_csv(report: Path) -> None:
    text = (report / "metrics.csv").read_text()
    leading = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation,"
    assert text.startswith(leading)
    (row,) = csv.DictReader(text.splitlines())
    m = strict_json(report / "metrics.json")
    assert float(row["top1"]) == pytest.approx(100 * m["accuracy"], abs=1e-3)
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    assert float(row["top5"]) >= float(row["top1"])
    assert (row["param_count"], row["crop_pct"], row["img_size"]) == ("11.00", "0.875", "32")
    assert float(row["ece"]) == m["ece"]
    assert float(row["ece_after_temperature"]) == m["after_temperature"]["ece"]
    assert float(row["temperature"]) == m["temperature"]


def test_rendering_again_gives_the_same_files(report: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("metrics.json", "records.parquet"):
        shutil.copy(report / name, copy / name)
    render_report(copy)
    expected = files(report)
    for name in ("metrics.csv", "table.csv", "table.tex"):
        del expected[name]
    assert files(copy) == expected


def test_evaluating_again_gives_the_same_files(report: Path, tmp_path: Path) -> None:
    ids, labels, logits = make_logits(400)
    turned = Records.from_logits(ids[::-1], labels[::-1], logits[::-1])
    write_report(turned, tmp_path, ABOUT, resamples=100)
    assert files(tmp_path) == files(report)


def test_reports_that_do_not_belong_together(report: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics.json is missing; run `flatcal evaluate`"):
        render_report(tmp_path)
    shutil.copy(report / "metrics.json", tmp_path)
    make_records(20).save(tmp_path / "records.parquet")
    with pytest.raises(ValueError, match="400 and 20 images"):
        render_report(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99"):
        render_report(tmp_path)


def test_matplotlib_is_left_as_it_was(report: Path, tmp_path: Path) -> None:
    side = read_metrics(report / "metrics.json")
    with mpl.rc_context({"font.size": 31.0, "axes.grid": False, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        drawn = save_figure(draw_confidence(side, "As trained"), tmp_path, "confidence_before")
        assert dict(mpl.rcParams) == before
    assert drawn == (report / "figures" / "confidence_before.svg").read_text()


def test_torch_is_not_needed() -> None:
    code = (
        "import sys; from flatcal_dist.calibration.comparison import writing; "
        "from flatcal_dist.calibration.report import writing as report; "
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_known_about_the_run(tmp_path: Path) -> None:
    write_report(make_records(60, classes=3), tmp_path, resamples=20)
    page = assert_sound_page(tmp_path / "index.html")
    assert "Calibration report" in page.text
    (row,) = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    assert row["top5"] == row["model"] == ""
    assert strict_json(tmp_path / "metrics.json")["top5_accuracy"] is None


@pytest.mark.filterwarnings("ignore:no finite temperature", "ignore:too few images")
@pytest.mark.parametrize(
    ("images", "kind"),
    [(1, "right"), (80, "right"), (80, "wrong"), (2, "sure"), (80, "unsure")],
)
def test_degenerate_runs(images: int, kind: str, tmp_path: Path) -> None:
    ids = [str(i) for i in range(images)]
    logits = np.tile([3.0, 0.0, -1.0], (images, 1))
    labels = np.full(images, int(kind == "wrong"))
    if kind == "sure":
        logits, labels = 1000 * logits, np.arange(images) % 2
    elif kind == "unsure":
        logits, labels = 0 * logits, np.arange(images) % 3
    m = write_report(Records.from_logits(ids, labels, logits), tmp_path, resamples=20)
    assert strict_json(tmp_path / "metrics.json") == m.as_json()
    page = assert_sound_page(tmp_path / "index.html")
    if kind in ("right", "wrong"):
        assert m.auroc is None
        assert m.intervals["accuracy"].high - m.intervals["accuracy"].low > 0.04
        assert m.intervals["signed_gap"].low is None
        assert "not defined" in page.text
        assert "divide the logits" not in page.text
        assert "<small>without chance" not in (tmp_path / "index.html").read_text()
    if images < 50:
        assert "too few for a verdict" in page.text


def test_tied_images() -> None:
    ids, labels, logits = make_logits(200)
    assert summarize(Records.from_logits(ids, labels, logits), resamples=5).tied_images == 0
    logits[:50] = logits[0]
    m = summarize(Records.from_logits(ids, labels, logits), resamples=5)
    assert m.tied_images == 0.25
