"""Comparison of runs on the same images: paired differences, groups of seeds, one page."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatcal_dist.files import write_json, write_text

from . import figures, page
from .display import METRICS, Metric, duration, show
from .records import Records
from .report import read_report, run_title
from .statistics import LEVEL, RESAMPLES, Bootstrap, bootstrap

COMPARED = ("accuracy", "nll", "ece", "signed_gap", "aurc", "auroc")
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Run:
    """One run: its name, where its report is, and what the report holds."""

    name: str
    folder: Path
    metrics: dict[str, Any]
    records: Records

    @property
    def about(self) -> dict[str, Any]:
        return self.metrics["about"]


def write_comparison(
    runs: Sequence[Path], output: Path, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Compare the reports of `runs` (run directories or report directories) into `output`.

    The first run is the baseline of the paired differences. Writes index.html (one file, needs no
    network), comparison.json, comparison.csv and figures; returns what comparison.json holds.
    ValueError if a run has no report, or if the runs were not evaluated on the same images.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs, got {len(runs)}")
    loaded = _load(runs)
    for other in loaded[1:]:
        _refuse_other_images(loaded[0], other)
    samples = bootstrap([run.records.before for run in loaded], resamples, seed)
    comparison = {
        "schema_version": SCHEMA_VERSION,
        "images": len(loaded[0].records),
        "baseline": loaded[0].name,
        "runs": [_row(run) for run in loaded],
        "differences": _differences(loaded, samples),
        "best": {key: _best(METRICS[key], loaded, samples) for key in COMPARED},
        "groups": _groups(loaded),
        "conventions": {
            "differences": "run minus baseline on the same images, as trained, paired bootstrap "
            f"over images, {100 * LEVEL:.0f} % intervals; other training seeds are not covered",
            "ece_differences": "spread around the observed difference, because resampling biases "
            "ECE upwards",
            "best": "better than each other run by an interval that excludes zero",
            "resamples": resamples,
            "seed": seed,
        },
    }
    comparison["verdict"] = _verdict(comparison)
    output = Path(output)
    write_json(output / "comparison.json", comparison)
    write_text(output / "comparison.csv", _csv(comparison))
    _write_page(comparison, loaded, output)
    return comparison


def _load(paths: Sequence[Path]) -> list[Run]:
    folders = [Path(path) for path in paths]
    names = _names(folders)
    runs = []
    for name, path in zip(names, folders, strict=True):
        here = (path / "metrics.json").is_file() and (path / "records.parquet").is_file()
        folder = path if here else path / "report"
        missing = [f for f in ("metrics.json", "records.parquet") if not (folder / f).is_file()]
        if missing:
            raise ValueError(
                f"run {path} has no report ({folder / missing[0]} is missing); "
                f"make it with: flatcal evaluate {path}"
            )
        runs.append(Run(name, folder, *read_report(folder)))
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; as many parts as it takes to tell them apart."""
    parts = [p.resolve().parts for p in folders]
    parts = [p[:-1] if p[-1] == "report" and len(p) > 2 else p for p in parts]
    if len(set(parts)) < len(parts):
        raise ValueError("a run is given twice; each run can be compared only once")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def _refuse_other_images(baseline: Run, other: Run) -> None:
    mine, theirs = baseline.records, other.records
    if np.array_equal(mine.id, theirs.id) and np.array_equal(mine.label, theirs.label):
        return
    only = (np.setdiff1d(mine.id, theirs.id), np.setdiff1d(theirs.id, mine.id))
    if len(only[0]) or len(only[1]):
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
    raise ValueError(
        f"runs {baseline.name} and {other.name} have different labels for {len(differ)} of "
        f"{len(mine)} images (first {str(mine.id[differ[0]])!r}); evaluate both on the same data"
    )


def _row(run: Run) -> dict[str, Any]:
    about, m = run.about, run.metrics
    after = m["after_temperature"]
    return {
        "run": run.name,
        "title": run_title(about),
        **{key: about[key] for key in ("model", "method", "rho", "gamma", "seed")},
        **{key: m[key] for key in COMPARED},
        "temperature": m["temperature"],
        "ece_after_temperature": after["ece"],
        "nll_after_temperature": after["nll"],
        "training_seconds": about["training_seconds"],
        "intervals": {key: m["intervals"][key] for key in COMPARED if key != "ece"},
        "ece_null": m["ece_null"],
    }


def _differences(runs: Sequence[Run], samples: Bootstrap) -> list[dict[str, Any]]:
    return [
        {"run": run.name}
        | {
            key: asdict(d := samples.difference(i, 0, key)) | {"shown": d.excludes_zero}
            for key in COMPARED
        }
        for i, run in enumerate(runs)
        if i
    ]


def _best(metric: Metric, runs: Sequence[Run], samples: Bootstrap) -> str | None:
    """The run that is better than every other one beyond its interval; None if there is none."""
    if metric.better not in ("higher", "lower"):
        return None
    sign = 1 if metric.better == "higher" else -1
    for i, run in enumerate(runs):
        others = (samples.difference(i, j, metric.key) for j in range(len(runs)) if j != i)
        if all(d.excludes_zero and sign * d.value > 0 for d in others):
            return run.name
    return None


def _setting(run: Run) -> str:
    """What tells runs apart beyond their seed, as text."""
    about = run.about
    keys = ("model", "method", "rho", "gamma", "data", "image_size")
    rest = {k: v for k, v in about["configuration"].items() if k not in ("run", "wandb")}
    return json.dumps([[about[k] for k in keys], rest], sort_keys=True, default=str)


def _groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds; empty unless some runs differ by seed alone."""
    gathered: dict[str, list[Run]] = {}
    for run in runs:
        gathered.setdefault(_setting(run), []).append(run)
    if all(len({r.about["seed"] for r in members}) < 2 for members in gathered.values()):
        return []
    groups = []
    for members in gathered.values():
        about = members[0].about
        values = {k: [r.metrics[k] for r in members] for k in (*COMPARED, "temperature")}
        groups.append(
            {
                "name": _group_name(about, with_model=len({r.about["model"] for r in runs}) > 1),
                "runs": [r.name for r in members],
                "seeds": [r.about["seed"] for r in members],
                **{key: _spread(v) for key, v in values.items()},
            }
        )
    names = [g["name"] for g in groups]
    for g in groups:  # alike in name but not in configuration: told apart by their first run
        if names.count(g["name"]) > 1:
            g["name"] += f" ({g['runs'][0]} ...)"
    return groups


def _group_name(about: dict[str, Any], with_model: bool) -> str:
    parts = [about["model"] if with_model else None, about["method"]]
    parts += [
        f"{s} = {about[k]}" for k, s in (("rho", "ρ"), ("gamma", "γ")) if about[k] is not None
    ]
    return ", ".join(p for p in parts if p) or "runs"


def _spread(values: list[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation; the latter None for a single run."""
    if any(v is None for v in values):
        return {"mean": None, "sd": None}
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def _verdict(comparison: dict[str, Any]) -> list[str]:
    """One sentence per metric; claims a difference only where the interval excludes zero."""
    sentences = []
    for key in COMPARED:
        metric = METRICS[key]
        claims: dict[str, list[str]] = {}
        silent = []
        for row in comparison["differences"]:
            d = row[key]
            if d["shown"]:
                size = show(abs(d["value"]), metric.unit, sign=True).removeprefix("+")
                claims.setdefault(_word(metric, d["value"]), []).append(f"{row['run']} by {size}")
            else:
                silent.append(row["run"])
        parts = [f"{word} for {_enumerate(runs)}" for word, runs in sorted(claims.items())]
        if silent:
            parts.append(f"no difference shown for {_enumerate(silent)}")
        sentences.append(f"{metric.name}: {'; '.join(parts)}.")
    return sentences


def _word(metric: Metric, difference: float) -> str:
    direction = "higher" if difference > 0 else "lower"
    if metric.better not in ("higher", "lower"):
        return direction
    return f"{direction} ({'better' if direction == metric.better else 'worse'})"


def _enumerate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _csv(comparison: dict[str, Any]) -> str:
    """One row per run, with its differences from the baseline."""
    differences = {row["run"]: row for row in comparison["differences"]}
    rows = []
    for run in comparison["runs"]:
        row = {k: v for k, v in run.items() if not isinstance(v, dict)}
        for key in COMPARED:
            d = differences.get(run["run"], {}).get(key, {})
            row |= {f"{key}_difference{e}": d.get(k) for e, k in _CSV_ENDINGS}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_CSV_ENDINGS = (("", "value"), ("_low", "low"), ("_high", "high"))


def _curves(comparison: dict[str, Any], runs: Sequence[Run]) -> list[figures.Curve]:
    """One line per run; the seeds of a group share colour and name."""
    groups = comparison["groups"] or [{"name": run.name, "runs": [run.name]} for run in runs]
    place = {name: (i, group) for i, group in enumerate(groups) for name in group["runs"]}
    return [
        figures.Curve(
            place[run.name][1]["name"],
            run.metrics,
            series=place[run.name][0],
            named=place[run.name][1]["runs"][0] == run.name,
        )
        for run in runs
    ]


def _write_page(comparison: dict[str, Any], runs: Sequence[Run], output: Path) -> None:
    curves = _curves(comparison, runs)
    listed = _enumerate([run.name for run in runs])
    drawings = {
        "reliability": figures.draw_reliability_overlay(curves, "Reliability"),
        "risk_coverage": figures.draw_risk_coverage(
            curves, "Risk against coverage", reference=False
        ),
        "accuracy_ece": figures.draw_accuracy_ece(curves, "Accuracy and calibration"),
    }
    drawn = {
        name: page.figure(
            figures.inline_svg(
                figures.save_figure(drawing, output / "figures", name),
                name.replace("_", "-"),
                drawing.axes[0].get_title(loc="left"),
                f"Runs {listed}; the tables hold the numbers.",
            )
        )
        for name, drawing in drawings.items()
    }
    html = page.render(
        "comparison.html.j2",
        title=f"{len(runs)} runs compared",
        c=comparison,
        metrics=[METRICS[key] for key in COMPARED],
        figures=drawn,
        seconds={run["run"]: duration(run["training_seconds"]) for run in comparison["runs"]},
    )
    write_text(output / "index.html", html)
