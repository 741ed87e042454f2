"""Comparison of runs on the same images: paired differences, methods and seeds, one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from flatcal_dist.calibration.calibrators.of_logits import is_fitted
from flatcal_dist.calibration.comparison import figures as comparison_figures
from flatcal_dist.calibration.comparison import pairing
from flatcal_dist.calibration.comparison import table as comparison_table
from flatcal_dist.calibration.comparison.groups import (
    SIDES,
    Method,
    Run,
    differences,
    gather,
    gather_by,
    summary,
)
from flatcal_dist.calibration.comparison.verdict import verdict
from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS
from flatcal_dist.calibration.pages import frame as page
from flatcal_dist.calibration.pages.display import duration, enumerate_names, number, percent
from flatcal_dist.calibration.pages.drawing import Curve
from flatcal_dist.calibration.report.about import settings_text
from flatcal_dist.calibration.report.writing import read_report
from flatcal_dist.calibration.report_page import figures
from flatcal_dist.calibration.report_page.page import run_title
from flatcal_dist.calibration.statistics import decisions
from flatcal_dist.calibration.statistics.bootstrap import RESAMPLES, Bootstrap, bootstrap, mcnemar
from flatcal_dist.calibration.statistics.intervals import LEVEL
from flatcal_dist.files import csv_text, write_json, write_text

SCHEMA_VERSION = 3


def write_comparison(
    runs: Sequence[Path],
    output: Path,
    *,
    methods_of: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the reports of several runs.

    Runs that differ by their seed alone are one method. The method of the first run is the
    baseline. This writes index.html (one file that needs no network), comparison.json,
    comparison.csv, table.tex and figures.

    Args:
        runs: The run directories or report directories.
        output: The folder of the comparison.
        methods_of: The name of each run's method. By default the configurations tell which runs
            are seeds of one method. A run can be given for several of these methods.
        resamples: The number of resamples.
        seed: The seed of the resamples.

    Returns:
        What comparison.json holds.

    Raises:
        ValueError: There are fewer than two runs, a run is given twice or has no report, or the
            runs were not evaluated on the same images.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs, got {len(runs)}")
    loaded = _load(runs, methods_of)
    for other in loaded[1:]:
        _refuse_other_images(loaded[0], other)
    paired = _pairing(loaded)
    methods = gather(loaded) if methods_of is None else gather_by(loaded, methods_of)
    samples = {
        side: bootstrap([getattr(run.records, side) for run in loaded], resamples, seed)
        for side in SIDES
    }
    comparison = {
        "schema_version": SCHEMA_VERSION,
        "images": len(loaded[0].records),
        "pairing": paired,
        "baseline": methods[0].name,
        "runs": _rows(loaded, methods, samples["before"]),
        "methods": [summary(method) for method in methods],
        **differences(methods, samples),
        "conventions": _conventions(resamples, seed),
    }
    comparison["verdict"] = verdict(comparison)
    output = Path(output)
    write_json(output / "comparison.json", comparison)
    write_text(output / "comparison.csv", _csv(comparison))
    first = [method.runs[0].metrics for method in methods]
    write_text(output / "table.tex", comparison_table.table_tex(comparison, first))
    _write_page(comparison, loaded, methods, output)
    return comparison


def _conventions(resamples: int, seed: int) -> dict[str, Any]:
    return {
        "methods": "runs whose configuration differs by the seed alone; figures of a method are "
        "means over its runs",
        "difference": "method minus baseline on the same images, over the seeds that both have, or "
        "else over all runs of each",
        "intervals": f"{100 * LEVEL:.0f} % by paired bootstrap over images, of each difference by "
        "itself; they hold for these networks",
        "over_seeds": "where both methods share three seeds or more: Student's interval of the "
        "differences by seed",
        "p_value": "twice the share of resamples beyond zero, or their normal tail where those are "
        "too few to count; accuracy of two networks by McNemar's mid-p; seeds by Student's t. The "
        "largest of those that apply",
        "adjusted_p_value": "Holm (1979), over all methods, metrics and both sides of temperature "
        f"scaling; accuracy, which scaling leaves alone, counts once. Shown: {decisions.LEVEL} or "
        "less, and the interval over images leaves out zero",
        "ece_differences": "spread around the observed difference, because resampling biases "
        "ECE upwards",
        "best": "shown to be better than every other method, by Holm's procedure over all pairs",
        "run_difference": "each run minus the baseline's run of the same seed, else its first",
        "resamples": resamples,
        "seed": seed,
    }


def _load(paths: Sequence[Path], methods_of: Sequence[str] | None) -> list[Run]:
    folders = [Path(path) for path in paths]
    names = _names(folders, methods_of or [""] * len(folders))
    runs: list[Run] = []
    for name, path in zip(names, folders, strict=True):
        here = (path / "metrics.json").is_file() and (path / "records.parquet").is_file()
        folder = path if here else path / "report"
        missing = [f for f in ("metrics.json", "records.parquet") if not (folder / f).is_file()]
        if missing:
            raise ValueError(
                f"run {path} has no report ({folder / missing[0]} is missing); "
                f"make it with: flatcal evaluate {path}"
            )
        metrics, records = read_report(folder)
        runs.append(Run(name, len(runs), metrics, records))
    return runs


def _names(folders: Sequence[Path], methods: Sequence[str]) -> list[str]:
    """The last part of each path, or as many parts as it takes to tell the paths apart.

    The method follows where a run is there for several.
    """
    parts = [p.resolve().parts for p in folders]
    parts = [p[:-1] if p[-1] == "report" and len(p) > 2 else p for p in parts]
    if len(set(zip(parts, methods, strict=True))) < len(parts):
        raise ValueError("a run is given twice; each run can be compared only once")
    for depth in range(1, max(map(len, parts)) + 1):
        names = {p: "/".join(p[-depth:]) for p in parts}
        if len(set(names.values())) == len(names):
            break
    shared = {p for p in parts if parts.count(p) > 1}
    return [
        f"{names[p]} ({method})" if p in shared else names[p]
        for p, method in zip(parts, methods, strict=True)
    ]


def _refuse_other_images(baseline: Run, other: Run) -> None:
    mine, theirs = baseline.records, other.records
    if not np.array_equal(mine.id, theirs.id):
        only = (np.setdiff1d(mine.id, theirs.id), np.setdiff1d(theirs.id, mine.id))
        found = [
            f"{len(ids)} only in {run.name} (first {str(ids[0])!r})"
            for ids, run in zip(only, (baseline, other), strict=True)
            if len(ids)
        ]
        raise ValueError(
            f"runs {baseline.name} and {other.name} were evaluated on different images: "
            f"{' and '.join(found)}, {len(np.intersect1d(mine.id, theirs.id))} shared; "
            "evaluate both on the same data"
        )
    differ = np.flatnonzero(mine.label != theirs.label)
    if len(differ):
        raise ValueError(
            f"runs {baseline.name} and {other.name} have different labels for {len(differ)} of "
            f"{len(mine)} images (first {str(mine.id[differ[0]])!r}); evaluate both on the same "
            "data"
        )
    identities = [str(run.about.data_identity) for run in (baseline, other)]
    known = {run.about.known_by for run in (baseline, other)}
    if known == {"images"} and identities[0] != identities[1]:
        raise ValueError(
            f"runs {baseline.name} and {other.name} were evaluated on other data under the same "
            f"image ids ({identities[0][:16]} and {identities[1][:16]}), such as corrupted or "
            "smaller copies: sizes of the files differ. Evaluate both on the same images: flatcal "
            "evaluate RUN --data DATA --output DIR"
        )


def _pairing(runs: Sequence[Run]) -> dict[str, Any]:
    """How the images of these runs were found to be the same, and how sure that is."""
    known = {run.about.known_by for run in runs}
    by = next(kind for kind in ("rows", "ids", "images") if kind in known)
    texts = {
        "images": "All runs saw the same images, by name, label and size in bytes.",
        "ids": "Images are paired by their ids and have the same labels. Files of logits tell "
        "nothing else about the images, such as whether one network saw corrupted copies.",
        "rows": "Images are paired by their rows alone, because a file had no ids: if the rows of "
        "two files are in different orders, every difference and interval below is wrong, and "
        "equal labels in every row do not exclude that. Give each image an id.",
    }
    text, low = texts[by], {}
    if by == "rows":
        found = {r.name: pairing.agreement(runs[0].records, r.records) for r in runs[1:]}
        images = len(runs[0].records)
        low = {name: v for name, v in found.items() if pairing.is_chance(v, images)}
    if low:
        text += (
            f" Within the classes, the images that are hard for {runs[0].name} are not those that "
            f"are hard for {enumerate_names(list(low))}: the rows seem to be in different orders."
        )
    return {"by": by, "text": text, "disagreeing": sorted(low)}


def _rows(
    runs: Sequence[Run], methods: Sequence[Method], samples: Bootstrap
) -> list[dict[str, Any]]:
    """One row per run, with its difference from the baseline's run of the same seed."""
    by_seed: dict[int | None, Run] = {
        run.seed: run for run in methods[0].runs if run.seed is not None
    }
    of = {run.name: method for method in methods for run in method.runs}
    rows = []
    for run in runs:
        against = by_seed.get(run.seed, methods[0].runs[0])
        rows.append(
            _row(run) | {"method_name": of[run.name].name} | _run_difference(run, against, samples)
        )
    return rows


def _row(run: Run) -> dict[str, Any]:
    about, m = run.about, run.metrics
    after = m.after_temperature
    return {
        "run": run.name,
        "title": run_title(about),
        **{
            key: getattr(about, key)
            for key in ("model", "method", "settings", "seed", "checkpoint")
        },
        **{key: m.value(key) for key in COMPARED},
        "temperature": m.temperature,
        "ece_after_temperature": after.ece,
        "nll_after_temperature": after.nll,
        "training_seconds": about.training_seconds,
        "intervals": {
            key: {"low": interval.low, "high": interval.high}
            for key, interval in ((key, m.interval(key)) for key in COMPARED)
        },
        "ece_null": m.ece_null.model_dump(),
    }


def _run_difference(run: Run, against: Run, samples: Bootstrap) -> dict[str, Any]:
    if run is against:
        return {"against": None, "difference": {}, "mcnemar": None}
    test = mcnemar(run.records.correct, against.records.correct)
    return {
        "against": against.name,
        "difference": {
            key: vars(samples.difference(run.place, against.place, key)) for key in COMPARED
        },
        "mcnemar": vars(test),
    }


def _csv(comparison: dict[str, Any]) -> str:
    """One row per run, with its differences from the run that it is compared with."""
    endings = (("", "value"), ("_low", "low"), ("_high", "high"))
    rows = []
    for run in comparison["runs"]:
        row = run | {"settings": settings_text(run["settings"])}
        row = {k: v for k, v in row.items() if not isinstance(v, dict) and k != "mcnemar"}
        for key in COMPARED:
            d = run["difference"].get(key, {})
            row |= {f"{key}_difference{ending}": d.get(name) for ending, name in endings}
        rows.append(row)
    return csv_text([list(rows[0]), *([row.get(name) for name in rows[0]] for row in rows)])


def _write_page(
    comparison: dict[str, Any], runs: Sequence[Run], methods: Sequence[Method], output: Path
) -> None:
    title = f"{len(runs)} runs compared"
    if len(methods) < len(runs):
        title = f"{len(methods)} methods, {len(runs)} runs"
    html = page.render(
        "comparison.html.j2",
        title=title,
        c=comparison,
        metrics=[METRICS[key] for key in COMPARED],
        figures=_figures(methods, output / "figures"),
        known=lambda value: "unknown" if value is None else value,
        usable=is_fitted,
        settings_text=settings_text,
        seconds={run["run"]: duration(run["training_seconds"]) for run in comparison["runs"]},
        grouped=len(methods) < len(runs),
        over_seeds=any(d["before"]["accuracy"]["over_seeds"] for d in comparison["differences"]),
    )
    write_text(output / "index.html", html)


def _figures(methods: Sequence[Method], folder: Path) -> dict[str, Markup]:
    curves = [
        Curve(method.name, run.metrics, series=i, named=run is method.runs[0])
        for i, method in enumerate(methods)
        for run in method.runs
    ]
    each = [
        f"{method.name}: accuracy {percent(_mean(method, 'accuracy'), 1)}, ECE "
        f"{percent(_mean(method, 'ece'), 1)}, AURC times 1000 "
        f"{number(1000 * _mean(method, 'aurc'), 1)}"
        for method in methods
    ]
    told = f"{'; '.join(each)}. The tables hold the numbers."
    listed = f"Methods {enumerate_names([m.name for m in methods])}; the tables hold the numbers."
    drawings = {
        "reliability": (comparison_figures.draw_reliability_overlay(curves, "Reliability"), listed),
        "accuracy_ece": (comparison_figures.draw_scatter(curves, "ece", "Accuracy and ECE"), told),
        "accuracy_aurc": (
            comparison_figures.draw_scatter(curves, "aurc", "Accuracy and AURC"), told,
        ),
        "risk_coverage": (
            figures.draw_risk_coverage(curves, "Risk against coverage", reference=False), listed,
        ),
    }  # fmt: skip
    return {
        name: page.figure(drawing, folder, name, drawing.axes[0].get_title(loc="left"), words)
        for name, (drawing, words) in drawings.items()
    }


def _mean(method: Method, key: str) -> float:
    values = [run.metrics.value(key) for run in method.runs]
    return float(np.mean([np.nan if v is None else v for v in values]))
