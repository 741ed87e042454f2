"""metrics.csv: one row that stands below those of timm's results files."""

from typing import Any

from flatcal_dist.files import csv_text


def metrics_csv(m: dict[str, Any]) -> str:
    """One row; leading columns as in timm's results files (per cent, millions), then ours."""
    about, count, top5 = m["about"], m["about"]["parameters"], m["top5_accuracy"]
    row: dict[str, Any] = {
        "model": about["model"],
        "top1": _per_cent(m["accuracy"]),
        "top1_err": _per_cent(1 - m["accuracy"]),
        "top5": _per_cent(top5),
        "top5_err": _per_cent(None if top5 is None else 1 - top5),
        "param_count": None if count is None else f"{count / 1e6:.2f}",
        "img_size": about["image_size"],
        "crop_pct": about["crop_pct"],
        "interpolation": about["interpolation"],
        **{k: about[k] for k in ("method", "rho", "gamma", "seed", "data", "training_seconds")},
        "images": m["images"],
        "temperature": m["temperature"],
    }
    after = m["after_temperature"]
    row |= {key: value for key, value in m.items() if _is_score(m, key)}
    row |= {f"{key}_after_temperature": after[key] for key in after if _is_score(m, key)}
    return csv_text([list(row), list(row.values())])


def _per_cent(rate: float | None) -> str | None:
    return None if rate is None else f"{100 * rate:.3f}"


def _is_score(m: dict[str, Any], key: str) -> bool:
    """Whether a key holds one number of a side: a float, or undefined."""
    return key in m and key in m["after_temperature"] and isinstance(m[key], float | None)
