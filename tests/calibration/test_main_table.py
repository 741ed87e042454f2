"""The main table as files: every number with its interval, and LaTeX for a plain document."""

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.model import Report
from flatcal_dist.calibration.report.summary import About, summarize
from flatcal_dist.calibration.report_page.main_table import latex, table_csv, table_tex
from tests.support.synthetic import make_logits

LISTED = [key for key, metric in METRICS.items() if metric.listed]


@pytest.fixture(scope="module")
def m(records: Records) -> Report:
    return summarize(records, About(title="50 % of a_b & <c> {d} \\e #1 $x^2$ ~ ρ"), resamples=50)


def test_csv_has_every_metric_with_its_intervals(m: Report) -> None:
    rows = {row["metric"]: row for row in csv.DictReader(table_csv(m).splitlines())}
    assert list(rows) == LISTED
    sides = (("as_trained", m), ("after_temperature", m.after_temperature))
    for key, row in rows.items():
        for column, side in sides:
            assert float(row[column]) == side.value(key)
            limits = side.intervals.get(key)
            for end in ("low", "high"):
                limit = limits and getattr(limits, end)
                expected = "" if limit is None else str(limit)
                assert row[f"{column}_{end}"] == expected
    nll = m.difference("nll")
    assert [rows["nll"][k] for k in ("change", "change_low", "change_high")] == [
        str(getattr(nll, k)) for k in ("value", "low", "high")
    ]
    assert rows["mce"]["change"] == ""
    assert rows["accuracy"]["better"] == "higher"


def test_undefined_numbers_stand_empty_in_both() -> None:
    ids, _, logits = make_logits(60, 3)
    right = summarize(Records.from_logits(ids, logits.argmax(1), logits), resamples=5)
    rows = {row["metric"]: row for row in csv.DictReader(table_csv(right).splitlines())}
    assert rows["auroc"]["as_trained"] == ""
    assert re.search(r"^AUROC .*& -- & --", table_tex(right), re.M)


def test_latex_is_plain(m: Report) -> None:
    text = table_tex(m)
    assert text.isascii(), "no package is needed to read it"
    for line in text.splitlines():
        bare = line.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
        assert bare.count("{") == bare.count("}"), line
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = [
        line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line
    ]
    assert len(rows) == len(LISTED)
    assert all(len(re.findall(r"(?<!\\)&", row)) == 3 for row in rows)
    assert latex("50 % of a_b & <c>") == r"50 \% of a\_b \& \textless{}c\textgreater{}"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_latex_compiles(m: Report, tmp_path: Path) -> None:
    """booktabs may be missing here: its three lines are stood for by plain ones."""
    rules = "".join(rf"\newcommand{{\{n}rule}}{{\hline}}" for n in ("top", "mid", "bottom"))
    (tmp_path / "table.tex").write_text(table_tex(m))
    (tmp_path / "paper.tex").write_text(
        rf"\documentclass{{article}}{rules}\begin{{document}}\input{{table.tex}}\end{{document}}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")
