"""The page of one report, rendered from its metrics.json, shift.json and pictures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flatcal_dist.calibration.calibrators.of_logits import is_fitted
from flatcal_dist.calibration.pages import frame as page
from flatcal_dist.calibration.pages.display import counted, duration, number, percent, temperature
from flatcal_dist.calibration.pages.drawing import Curve
from flatcal_dist.calibration.report.about import SYMBOLS, About
from flatcal_dist.calibration.report.confident_errors import read_thumbnails
from flatcal_dist.calibration.report.model import Report
from flatcal_dist.calibration.report_page import describe, figures
from flatcal_dist.calibration.report_page.sharpness import (
    describe_sharpness,
    draw_sharpness,
    in_a_sentence,
    sharpness_rows,
)
from flatcal_dist.calibration.report_page.verdict import (
    FEW_OF_A_CLASS,
    class_name,
    usable_temperature,
    verdict,
)
from flatcal_dist.calibration.shift import figures as shift_figures

SIDES = ("before", "after")
FEW_OUTCOMES = 100  # images of the rarer outcome, see "How often intervals hold" in the README
UNKNOWN = "unknown"
TEMPERATURES = {
    "as_trained": ("None", "as trained"),
    "ts_valid": ("TS-valid", "on training images that were never trained on"),
    "test_optimum": ("Test optimum", "on these very images with their labels: no result"),
}
CALIBRATORS = {
    "identity": ("None", "as trained"),
    "temperature": ("Temperature", "one number divides all logits; Guo et al. (ICML 2017)"),
    "vector": (
        "Vector scaling",
        "a factor and a bias for each class, held near the temperature; Guo et al. (ICML 2017)",
    ),
    "matrix": (
        "Matrix scaling",
        "each class corrects each other one, held near the temperature by ODIR; Guo et al. (ICML "
        "2017)",
    ),
    "dirichlet": (
        "Dirichlet, ODIR",
        "a matrix on the logarithms of probabilities; Kull et al. (NeurIPS 2019)",
    ),
    "one_vs_rest_isotonic": (
        "Isotonic, one against the rest",
        "a rising curve for each class, then a sum of 1; Zadrozny and Elkan (KDD 2002)",
    ),
    "one_vs_rest_histogram": (
        "Histogram, one against the rest",
        "15 bins for each class, then a sum of 1; Zadrozny and Elkan (ICML 2001)",
    ),
}
SETS = {
    "lac": (
        "LAC",
        "classes of enough probability, the smallest sets; Sadinle et al. (JASA 2019)",
    ),
    "aps": (
        "APS",
        "the most probable classes up to a sum, fairer to hard images; Romano et al. (NeurIPS "
        "2020)",
    ),
    "raps": (
        "RAPS",
        "APS with a penalty on improbable classes; Angelopoulos et al. (ICLR 2021)",
    ),
}
KNOWN_BY = {
    "images": "names, labels and sizes",
    "ids": "ids and labels",
    "rows": "labels in the order of rows: there were no ids",
}


def report_html(m: Report, shift: dict[str, Any] | None, folder: Path) -> str:
    """Return the page, and write its figures into folder/figures.

    Args:
        m: The metrics of the report.
        shift: What shift.json holds, or None.
        folder: The folder of the report.
    """
    about = m.about
    stale = shift is not None and shift["clean"]["before"]["accuracy"] != m.accuracy
    if stale:
        shift = None
    pictures = read_thumbnails(folder, len(m.confident_errors))
    return page.render(
        "report.html.j2",
        m=m,
        after=m.after_temperature,
        title=run_title(about),
        verdict=verdict(m, shift),
        tiles=_tiles(m),
        identity=_identity(m),
        facts=_facts(m),
        figures=_figures(m, folder / "figures"),
        classes=_class_rows(m),
        few=FEW_OF_A_CLASS,
        errors=list(zip(m.confident_errors, pictures, strict=True)),
        pictured=any(pictures),
        shift=shift,
        temperature=temperature,
        temperature_names=TEMPERATURES,
        calibrator_names=CALIBRATORS,
        set_names=SETS,
        usable_temperature=is_fitted(m.temperature),
        usable_after=usable_temperature(m),
        stale_shift=stale,
        shift_figures=_shift_figures(shift, folder / "figures") if shift else [],
        sharpness_sentence=in_a_sentence(m.sharpness) if m.sharpness else "",
        sharpness_rows=sharpness_rows(m.sharpness) if m.sharpness else [],
        few_outcomes=_few_outcomes(m),
        difference_of=m.difference,
        class_name=lambda number: class_name(m, number),
        configuration=json.dumps(about.configuration, indent=2, ensure_ascii=False),
    )


def _few_outcomes(m: Report) -> str | None:
    """The images of the rarer outcome in words, if they are too few for exact intervals."""
    right = round(m.accuracy * m.images)
    wrong = m.images - right
    if min(right, wrong) >= FEW_OUTCOMES:
        return None
    outcome, number_of = ("wrong", wrong) if wrong <= right else ("right", right)
    return f"{counted(number_of, 'image')} {'is' if number_of == 1 else 'are'} {outcome}"


def run_title(about: About) -> str:
    """Return the title of a report. Default: model and method."""
    if about.title:
        return about.title
    parts = [about.model, about.method and about.method.upper()]
    return ", ".join(p for p in parts if p) or "Calibration report"


def _figures(m: Report, folder: Path) -> dict[str, Markup]:
    sides = {
        "before": (m, "As trained"),
        "after": (m.after_temperature, "After temperature scaling"),
    }
    drawn = {}
    for key, (side, name) in sides.items():
        drawn[f"reliability_{key}"] = page.figure(
            figures.draw_reliability(side, name), folder, f"reliability_{key}",
            f"Reliability diagram, {name.lower()}", describe.reliability(side),
        )  # fmt: skip
        drawn[f"confidence_{key}"] = page.figure(
            figures.draw_confidence(side, name), folder, f"confidence_{key}",
            f"Confidence histogram, {name.lower()}", describe.confidence(side),
        )  # fmt: skip
    curves = [
        Curve(f"{name.lower()}, AURC {1000 * side.aurc:.1f}", side, series)
        for series, (side, name) in enumerate(sides.values())
    ]
    drawn["risk_coverage"] = page.figure(
        figures.draw_risk_coverage(curves, "Risk against coverage", reference=True), folder,
        "risk_coverage", "Risk-coverage curve", describe.risk_coverage(m),
    )  # fmt: skip
    if m.confusions.matrix is not None:
        classes = m.confusions.classes or []
        names = [class_name(m, k).removeprefix("class ") for k in classes]
        drawn["confusions"] = page.figure(
            figures.draw_confusions(m.confusions.matrix, names), folder,
            "confusions", "Confusion matrix", describe.confusions(m),
        )  # fmt: skip
    if m.training is not None and len(m.training["epoch"]) > 1:
        drawn["training"] = page.figure(
            figures.draw_training(m.training), folder,
            "training", "Validation by epoch", describe.training(m.training),
        )  # fmt: skip
    if m.sharpness is not None:
        drawn["sharpness"] = page.figure(
            draw_sharpness(m.sharpness), folder,
            "sharpness", "Loss around the weights", describe_sharpness(m.sharpness),
        )  # fmt: skip
    return drawn


def _shift_figures(shift: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The figures of each set of corruptions, and its rows by corruption and severity."""
    drawn = []
    for i, group in enumerate(shift["corruptions"]):
        rows = [r for r in shift["sets"] if r["name"] == group["name"] and r["corruption"]]
        maps = [
            page.figure(
                shift_figures.draw_heat_map(group, rows, key, side, title), folder,
                f"shift_{i}_{key}_{side}", f"{title} by corruption and severity",
                describe.heat_map(group, rows, key, side),
            )
            for key, side, title in (
                ("accuracy", "before", "Accuracy"),
                ("signed_gap", "before", "Signed gap, as trained"),
                ("signed_gap", "after", "Signed gap, clean temperature"),
            )
        ]  # fmt: skip
        curves = page.figure(
            shift_figures.draw_severity(group, rows, shift["clean"]), folder,
            f"shift_{i}_severity", f"{group['name']}: means over corruptions by severity",
            describe.severity(group, shift["clean"]),
        )  # fmt: skip
        by_place = {(r["corruption"], r["severity"]): r for r in rows}
        drawn.append({"group": group, "curves": curves, "maps": maps, "rows": by_place})
    return drawn


def _class_rows(m: Report) -> list[dict[str, Any]]:
    """One dictionary per class, the most over-confident first, and classes of `few` images last."""
    table = m.per_class.model_dump()
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    rows = [row | {"few": row["images"] < FEW_OF_A_CLASS} for row in rows]
    return sorted(
        rows, key=lambda row: (row["few"], 0 if row["few"] else -row["signed_gap"], row["class"])
    )


@dataclass(frozen=True)
class Tile:
    """A key number: its name, its value, and a line below."""

    name: str
    value: str
    note: str


def _tiles(m: Report) -> list[Tile]:
    def between(name: str, factor: float, decimals: int, sign: bool = False) -> str:
        ends = m.interval(name).ends
        if ends is None:
            return "no interval"
        low, high = (number(factor * v, decimals, sign) for v in ends)
        return f"{low} to {high}"

    chance = m.ece_null.mean
    return [
        Tile("Accuracy", percent(m.accuracy, 1), between("accuracy", 100, 1)),
        Tile(
            "Signed gap",
            f"{number(100 * m.signed_gap, 1, sign=True)}",
            f"points, {between('signed_gap', 100, 1, True)}",
        ),
        Tile("ECE", f"{number(100 * m.ece, 1)} %", f"{number(100 * chance, 1)} % if calibrated"),
        Tile("AUROC", percent(m.auroc, 1), between("auroc", 100, 1)),
        Tile("AURC × 1000", number(1000 * m.aurc, 1), between("aurc", 1000, 1)),
        Tile("Temperature", _temperature(m), _temperature_note(m)),
    ]


def _temperature(m: Report) -> str:
    return temperature(m.temperature) if is_fitted(m.temperature) else "none"


def _temperature_note(m: Report) -> str:
    if not is_fitted(m.temperature):
        return "no temperature can be fitted"
    if m.source.temperature_from is not None:
        return f"of {m.source.temperature_from}"
    if m.source.fitted_apart:
        return f"on {m.temperatures[1].images:,} images kept apart"
    if m.temperature_interval is None:
        return "no interval"
    low, high = (temperature(v) for v in m.temperature_interval)
    return f"{low} to {high}"


def _identity(m: Report) -> str:
    """The line above the title, which holds what a reader must know to quote the numbers."""
    about = m.about
    parts = [
        about.model,
        about.method.upper() if about.method else "method unknown",
        about.checkpoint and f"weights {about.checkpoint[:12]}",
        about.data,
        counted(m.images, "image"),
        f"{m.classes:,} classes",
    ]
    return " · ".join(p for p in parts if p)


def _facts(m: Report) -> list[tuple[str, str]]:
    """What was evaluated, as names and values.

    What is not known is left out. Method and seed are always named, so that nobody takes silence
    for a default.
    """
    about = m.about
    size, count = about.image_size, about.parameters
    source = m.source
    shift = [source.kind, source.corruption, source.severity and f"{source.severity}"]
    facts = [
        ("Model", about.model),
        ("Method", about.method or UNKNOWN),
        *((SYMBOLS.get(key, key), value) for key, value in about.settings.items()),
        ("Training seed", UNKNOWN if about.seed is None else about.seed),
        ("Origin", about.origin),
        ("Data", about.data),
        ("Identity of the data", _identity_of_data(about)),
        ("Kind of data", ", ".join(part for part in shift if part)),
        ("Images", f"{m.images:,}"),
        ("Classes", f"{m.classes:,}"),
        ("Image size", size and f"{size} × {size}"),
        ("Crop", about.crop_pct),
        ("Interpolation", about.interpolation),
        ("Parameters", count and f"{count:,}"),
        ("Weights, SHA-256", about.checkpoint),
        ("Precision", about.precision),
        ("Engine", about.engine),
        ("World size", about.world_size),
        ("Sharpness", None if m.sharpness else "not measured (flatcal evaluate --sharpness)"),
        ("Training time", duration(about.training_seconds)),
        *sorted(about.versions.items()),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _identity_of_data(about: About) -> str:
    known_by = UNKNOWN if about.known_by is None else KNOWN_BY[about.known_by]
    return f"{about.data_identity} ({known_by})"
