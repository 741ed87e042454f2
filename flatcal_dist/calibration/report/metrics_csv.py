"""metrics.csv: one row that stands below those of timm's results files."""

from typing import Any

from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.report.model import Report
from flatcal_dist.files import csv_text

ABOUT = ("method", "rho", "gamma", "seed", "data", "training_seconds")


def metrics_csv(m: Report) -> str:
    """One row; leading columns as in timm's results files (per cent, millions), then ours."""
    about, count, top5 = m.about, m.about.parameters, m.top5_accuracy
    row: dict[str, Any] = {
        "model": about.model,
        "top1": _per_cent(m.accuracy),
        "top1_err": _per_cent(1 - m.accuracy),
        "top5": _per_cent(top5),
        "top5_err": _per_cent(None if top5 is None else 1 - top5),
        "param_count": None if count is None else f"{count / 1e6:.2f}",
        "img_size": about.image_size,
        "crop_pct": about.crop_pct,
        "interpolation": about.interpolation,
        **{key: getattr(about, key) for key in ABOUT},
        "images": m.images,
        "temperature": m.temperature,
    }
    for ending, side in (("", m), ("_after_temperature", m.after_temperature)):
        row |= {key + ending: side.value(key) for key in METRICS}
    return csv_text([list(row), list(row.values())])


def _per_cent(rate: float | None) -> str | None:
    return None if rate is None else f"{100 * rate:.3f}"
