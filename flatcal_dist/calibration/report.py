"""The report of one run: a page, metrics, records and figures, rendered from two files."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcal_dist.files import write_json, write_text

from . import figures, page
from .display import duration, number
from .records import Records
from .statistics import RESAMPLES, Interval
from .summary import SCHEMA_VERSION, About, interval_of, summarize
from .verdict import verdict


def write_report(
    records: Records,
    output: Path,
    about: About | None = None,
    *,
    bins: int = 15,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate `records` and write the report into the folder `output`; return its metrics.

    Writes index.html (one file, needs no network), metrics.json, metrics.csv, records.parquet and
    figures/*.png, *.svg; each appears whole or not at all.
    """
    output = Path(output)
    m = summarize(records, about, bins=bins, resamples=resamples, seed=seed)
    records.save(output / "records.parquet")
    write_text(output / "metrics.csv", _csv(m))
    write_json(output / "metrics.json", m)
    _write_page(m, records, output)
    return m


def render_report(output: Path) -> None:
    """Write index.html and the figures again, from metrics.json and records.parquet alone."""
    m, records = read_report(Path(output))
    _write_page(m, records, Path(output))


def read_report(folder: Path) -> tuple[dict[str, Any], Records]:
    """The metrics and records of a report. ValueError if it is not whole or of another version."""
    for name in ("metrics.json", "records.parquet"):
        if not (folder / name).is_file():
            raise ValueError(f"no report in {folder}: {name} is missing; run `flatcal evaluate`")
    m = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if m.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder / 'metrics.json'} has schema version {m.get('schema_version')}, expected "
            f"{SCHEMA_VERSION}; evaluate the run again"
        )
    records = Records.load(folder / "records.parquet")
    if len(records) != m["images"]:
        raise ValueError(
            f"metrics.json and records.parquet of {folder} belong to different evaluations: "
            f"{m['images']} and {len(records)} images; evaluate the run again"
        )
    return m, records


def _write_page(m: dict[str, Any], records: Records, output: Path) -> None:
    about = m["about"]
    html = page.render(
        "report.html.j2",
        m=m,
        after=m["after_temperature"],
        title=run_title(about),
        verdict=verdict(m),
        tiles=_tiles(m),
        facts=_facts(m),
        figures=_figures(m, records, output / "figures"),
        interval_of=interval_of,
        difference_of=lambda name: _difference(m, name),
        configuration=json.dumps(about["configuration"], indent=2, ensure_ascii=False),
    )
    write_text(output / "index.html", html)


def run_title(about: dict[str, Any]) -> str:
    """The title given, or the model and method."""
    if about["title"]:
        return about["title"]
    parts = [about["model"], about["method"] and about["method"].upper()]
    return ", ".join(p for p in parts if p) or "Calibration report"


def _difference(m: dict[str, Any], name: str) -> Interval | None:
    value = m["after_temperature"]["difference"].get(name)
    return None if value is None else Interval(**value)


def _figures(m: dict[str, Any], records: Records, folder: Path) -> dict[str, Any]:
    after = m["after_temperature"]
    sides = {
        "before": (m, records.before, "As trained"),
        "after": (after, records.after, "After temperature scaling"),
    }
    pages = {}
    for key, (side, scores, name) in sides.items():
        drawn = figures.draw_reliability(side, scores, name)
        pages[f"reliability_{key}"] = _inline(
            drawn, folder, f"reliability_{key}", f"Reliability diagram, {name.lower()}",
            f"ECE {side['ece']:.2%}, signed gap {100 * side['signed_gap']:+.2f} points. "
            "The table of reliability bins holds the same numbers.",
        )  # fmt: skip
        drawn = figures.draw_confidence(scores, name)
        pages[f"confidence_{key}"] = _inline(
            drawn, folder, f"confidence_{key}", f"Confidence histogram, {name.lower()}",
            f"Confidence of {int(scores.correct.sum())} correct and "
            f"{int((~scores.correct).sum())} wrong predictions.",
        )  # fmt: skip
    curves = [
        figures.Curve(f"{name}, AURC {1000 * side['aurc']:.1f}", side, series)
        for series, (name, side) in enumerate((("as trained", m), ("after temperature", after)))
    ]
    drawn = figures.draw_risk_coverage(curves, "Risk against coverage", reference=True)
    pages["risk_coverage"] = _inline(
        drawn, folder, "risk_coverage", "Risk-coverage curve",
        f"AURC times 1000: {1000 * m['aurc']:.1f} as trained, {1000 * after['aurc']:.1f} after "
        f"temperature scaling; risk at full coverage {1 - m['accuracy']:.1%}.",
    )  # fmt: skip
    return pages


def _inline(drawn: Any, folder: Path, name: str, title: str, description: str) -> Any:
    svg = figures.save_figure(drawn, folder, name)
    return page.figure(figures.inline_svg(svg, name.replace("_", "-"), title, description))


@dataclass(frozen=True)
class Tile:
    """A key number: name, value, and a line beneath."""

    name: str
    value: str
    note: str


def _tiles(m: dict[str, Any]) -> list[Tile]:
    def between(name: str, factor: float, decimals: int, sign: bool = False) -> str:
        interval = interval_of(m, name)
        if interval.low is None:
            return "no interval"
        low, high = (number(factor * v, decimals, sign) for v in (interval.low, interval.high))
        return f"{low} to {high}"

    auroc = "not defined" if m["auroc"] is None else f"{number(100 * m['auroc'], 1)} %"
    chance = m["ece_null"]["mean"]
    folds = [t for t in m["temperature_folds"] if t is not None]
    spread = f"{number(min(folds), 2)} to {number(max(folds), 2)} over folds"
    return [
        Tile("Accuracy", f"{number(100 * m['accuracy'], 1)} %", between("accuracy", 100, 1)),
        Tile(
            "Signed gap",
            f"{number(100 * m['signed_gap'], 1, sign=True)}",
            f"points, {between('signed_gap', 100, 1, True)}",
        ),
        Tile("ECE", f"{number(100 * m['ece'], 1)} %", f"{number(100 * chance, 1)} % if calibrated"),
        Tile("AUROC", auroc, between("auroc", 100, 1)),
        Tile("AURC × 1000", number(1000 * m["aurc"], 1), between("aurc", 1000, 1)),
        Tile("Temperature", number(m["temperature"], 2), spread),
    ]


def _facts(m: dict[str, Any]) -> list[tuple[str, str]]:
    """What was evaluated, as name and value; what is not known is left out."""
    about = m["about"]
    size, count = about["image_size"], about["parameters"]
    facts = [
        ("Model", about["model"]),
        ("Method", about["method"]),
        ("ρ", about["rho"]),
        ("γ", about["gamma"]),
        ("Training seed", about["seed"]),
        ("Data", about["data"]),
        ("Images", f"{m['images']:,}"),
        ("Classes", f"{m['classes']:,}"),
        ("Image size", size and f"{size} × {size}"),
        ("Crop", about["crop_pct"]),
        ("Interpolation", about["interpolation"]),
        ("Parameters", count and f"{count:,}"),
        ("Checkpoint", about["checkpoint"]),
        ("Precision", about["precision"]),
        ("Engine", about["engine"]),
        ("World size", about["world_size"]),
        ("Training time", duration(about["training_seconds"])),
        *sorted(about["versions"].items()),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _csv(m: dict[str, Any]) -> str:
    """One row; leading columns as in timm's results files (per cent, millions), then ours."""
    about, count = m["about"], m["about"]["parameters"]

    def per_cent(rate: float | None) -> str | None:
        return None if rate is None else f"{100 * rate:.3f}"

    top5 = m["top5_accuracy"]
    row: dict[str, Any] = {
        "model": about["model"],
        "img_size": about["image_size"],
        "top1": per_cent(m["accuracy"]),
        "top1_err": per_cent(1 - m["accuracy"]),
        "top5": per_cent(top5),
        "top5_err": per_cent(None if top5 is None else 1 - top5),
        "param_count": None if count is None else f"{count / 1e6:.2f}",
        "crop_pct": about["crop_pct"],
        "interpolation": about["interpolation"],
        **{k: about[k] for k in ("method", "rho", "gamma", "seed", "data", "training_seconds")},
        "images": m["images"],
        "temperature": m["temperature"],
    }
    after = m["after_temperature"]
    row |= {key: value for key, value in m.items() if _is_score(m, key)}
    row |= {f"{key}_after_temperature": after[key] for key in after if _is_score(m, key)}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    return text.getvalue()


def _is_score(m: dict[str, Any], key: str) -> bool:
    """Whether a key holds one number of a side: a float, or undefined."""
    return key in m and key in m["after_temperature"] and isinstance(m[key], float | None)
