"""The main table of a report as files: `table.csv`, and `table.tex` for a paper."""

from typing import Any

from flatcal_dist.calibration.metrics.entries import GROUPS
from flatcal_dist.calibration.metrics.entry import Metric
from flatcal_dist.calibration.pages.display import (
    MINUS,
    UNDEFINED,
    between,
    counted,
    show,
    show_difference,
)
from flatcal_dist.calibration.report.model import Report
from flatcal_dist.calibration.statistics.intervals import Interval
from flatcal_dist.files import csv_text

# What LaTeX reads as a command, and signs that a plain document cannot print.
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}",
    MINUS: "$-$", "×": r"$\times$", "…": r"\ldots{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "→": r"$\to$", "ρ": r"$\rho$", "γ": r"$\gamma$", "\u00a0": "~", "±": r"$\pm$",
}  # fmt: skip


def table_csv(m: Report) -> str:
    """Return a table with a row per metric: both sides and their difference, with intervals.

    As in metrics.json, rates are fractions and nothing is rounded.
    """
    columns = ("as_trained", "after_temperature", "change")
    ends = [f"{column}{end}" for column in columns for end in ("", "_low", "_high")]
    rows: list[list[Any]] = [["metric", "name", "better", *ends]]
    for metric in (metric for group in GROUPS for metric in group.listed):
        cells: list[float | None] = []
        for interval in (
            m.interval(metric.key),
            m.after_temperature.interval(metric.key),
            m.difference(metric.key) or Interval(None, None, None),
        ):
            cells += [interval.value, interval.low, interval.high]
        rows.append([metric.key, metric.name, metric.better, *cells])
    return csv_text(rows)


def table_tex(m: Report) -> str:
    """Return the table in LaTeX, for a document that loads booktabs."""
    rows = []
    for group in GROUPS:
        rows.append(rf"\multicolumn{{4}}{{l}}{{\textit{{{latex(group.name)}}}}} \\")
        rows += [_row(m, metric) for metric in group.listed]
        rows.append(r"\midrule")
    about = m.about
    subject = about.title or about.model or "This network"
    caption = latex(
        f"{subject}, {counted(m.images, 'image')}, {m.classes:,} classes. Brackets hold 95 % "
        "intervals over images. For errors of calibration, they are intervals of the error "
        "without what chance adds."
    )
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            r"\small",
            r"\begin{tabular}{lrrr}",
            r"\toprule",
            r"Metric & As trained & After temperature & Change \\",
            r"\midrule",
            *rows[:-1],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _row(m: Report, metric: Metric) -> str:
    cells = []
    for side in (m, m.after_temperature):
        i = side.interval(metric.key)
        cells.append(_cell(show(i.value, metric.unit), between(i.low, i.high, metric.unit)))
    moved = m.difference(metric.key)
    if moved is None or moved.value is None:
        cells.append("")
    else:
        cells.append(_cell(*show_difference(moved.value, moved.low, moved.high, metric.unit)))
    name = latex(f"{metric.name} {metric.arrow}".strip())
    return " & ".join([name, *cells]) + r" \\"


def _cell(value: str, ends: str | None) -> str:
    if value == UNDEFINED:
        return "--"
    if ends is None:
        return latex(value)
    low, high = ends.split(" to ")
    return rf"{latex(value)} {{\footnotesize [{latex(low)}, {latex(high)}]}}"


def latex(text: str) -> str:
    """Return a text so that LaTeX prints it as it is."""
    return "".join(LATEX.get(c, c) for c in text)
