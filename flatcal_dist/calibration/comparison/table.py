"""The main table of a comparison for a paper, `table.tex`."""

from collections.abc import Sequence
from typing import Any

from flatcal_dist.calibration.comparison.groups import SIDES
from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS
from flatcal_dist.calibration.pages.display import UNDEFINED, between, counted, show
from flatcal_dist.calibration.report.model import Report, Side
from flatcal_dist.calibration.report_page.main_table import latex

WORDS = {"before": "As trained", "after": "After temperature scaling"}


def table_tex(comparison: dict[str, Any], runs: Sequence[Report]) -> str:
    """Return a table of methods by metrics in LaTeX, for a document that loads booktabs.

    A method of several seeds has mean and sample standard deviation over seeds. A method of one
    seed has the value and the 95 % interval over images. What is shown to be best is bold.

    Args:
        comparison: What comparison.json holds.
        runs: The metrics of the first run of each method, for the intervals.
    """
    columns = [METRICS[key] for key in COMPARED]
    heads = " & ".join(latex(f"{c.name} {c.arrow}".strip()) for c in columns)
    rows = []
    for side in SIDES:
        rows.append(rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{\textit{{{WORDS[side]}}}}} \\")
        for method, m in zip(comparison["methods"], runs, strict=True):
            figures = m.side(side)
            best = {k for k, name in comparison["best"][side].items() if name == method["name"]}
            cells = [_cell(method[side][key], figures, key, key in best) for key in COMPARED]
            rows.append(" & ".join([latex(method["name"]), *cells]) + r" \\")
        rows.append(r"\midrule")
    caption = latex(
        f"{counted(comparison['images'], 'image')}. Means ± sample standard deviations over "
        "training seeds, or values with 95 % intervals over images where there is one seed. Bold: "
        "shown to be better than every other method (Holm's procedure, 5 %)."
    )
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            r"\footnotesize",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            rf"Method & {heads} \\",
            r"\midrule",
            *rows[:-1],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _cell(over_seeds: dict[str, Any], side: Side, key: str, best: bool) -> str:
    unit = METRICS[key].unit
    value = show(over_seeds["mean"], unit, suffix=False)
    if value == UNDEFINED:
        return "--"
    text = rf"\textbf{{{latex(value)}}}" if best else latex(value)
    if over_seeds["sd"] is not None:
        spread = show(over_seeds["sd"], unit, suffix=False).removeprefix("+")
        return rf"{text} {{\scriptsize $\pm$ {latex(spread)}}}"
    ends = side.interval(key)
    limits = between(ends.low, ends.high, unit)
    if over_seeds["seeds"] > 1 or limits is None:
        return text
    low, high = limits.split(" to ")
    return rf"{text} {{\scriptsize [{latex(low)}, {latex(high)}]}}"
