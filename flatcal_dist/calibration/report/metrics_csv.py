"""metrics.csv: one row whose first columns are those of timm's results files."""

from typing import Any

from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.report.model import Report
from flatcal_dist.files import csv_text

ABOUT = ("seed", "data", "training_seconds")


def metrics_csv(m: Report) -> str:
    """Return one row below the names of its columns.

    The first columns are those of timm's results files, in per cent and millions; ours follow. The
    column `settings` holds all numbers of the method (`rho 0.05, gamma 1.0`). Files of earlier
    versions have columns `rho` and `gamma` instead.
    """
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
        "method": about.method,
        "settings": ", ".join(f"{key} {value}" for key, value in about.settings.items()),
        **{key: getattr(about, key) for key in ABOUT},
        "images": m.images,
        "temperature": m.temperature,
    }
    for ending, side in (("", m), ("_after_temperature", m.after_temperature)):
        row |= {key + ending: side.value(key) for key in METRICS}
    return csv_text([list(row), list(row.values())])


def _per_cent(rate: float | None) -> str | None:
    return None if rate is None else f"{100 * rate:.3f}"
