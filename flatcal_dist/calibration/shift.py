"""What a network's confidence is worth on other images than the clean ones: `shift.json`.

A report folder with data under shift holds, beside the report on the clean images,

    shift.json
    shift/NAME/records.parquet                              one file per data set,
    shift/NAME/CORRUPTION/SEVERITY/records.parquet          of ImageNet-C one per subset

and shift.json is

    {"schema_version": 1,
     "clean": ROW,                  the clean images, `after` cross-fitted on themselves
     "sets": [ROW, ...],            in the order of evaluation; each subset of ImageNet-C is one
     "corruptions": [GROUP, ...]}   one per ImageNet-C set

    ROW = {"name", "kind",                          of the data set
           "corruption", "severity", "generated",   null, null, false but for ImageNet-C
           "images", "classes",                     how many; classes: that it had to choose among
           "data",                                  identity of the images (a hash)
           "records",                               path of the parquet file in the folder
           "temperature", "temperature_from",       the one in `after`; from which data set
           "own_temperature",                       fitted on these images; only to compare with
           "before": FIGURES, "after": FIGURES,     as trained, after temperature scaling
           "real": FIGURES or null}                 ImageNet validation: as trained, correct if
                                                    among the ReaL labels; without nll and brier

    FIGURES = {"images", "accuracy", "mean_confidence", "signed_gap", "ece", "nll", "brier",
               "aurc", "eaurc", "augrc", "auroc", "mean_entropy"}

    GROUP = {"name", "generated", "corruptions": [...], "severities": [...],
             "before": MEANS, "after": MEANS,
             "mean_corruption_error"}   published files, all 15 corruptions and 5 severities: error
                                        relative to AlexNet's; else null
    MEANS = {"all": FIGURES, "by_severity": {"1": FIGURES, ...},
             "by_corruption": {"fog": FIGURES, ...}}    plain means over the subsets

Rates are fractions, NLL and entropy nats; a figure that is undefined, or a mean over one that is,
is null. Nothing here is rounded. A `generated` set holds corruptions that we applied: published
figures are measured on the files of ImageNet-C, so the two do not belong into one table.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatcal_dist.files import write_json

from . import metrics, selective
from .records import Records, Scores

SCHEMA_VERSION = 1

# Top-1 error of AlexNet, averaged over the five severities of each corruption, by which ImageNet-C
# is normalised: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
# Corruptions and Perturbations (ICLR 2019); values as used by AugMix (Hendrycks et al., ICLR 2020).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Shifted:
    """The records of one data set under shift, and the identity of its images."""

    records: Records
    data: str

    @property
    def folder(self) -> Path:
        """Where its records lie in the report folder."""
        source = self.records.source
        folder = Path("shift") / str(source.name)
        if source.corruption is None:
            return folder
        return folder / source.corruption / str(source.severity)


def save_shifted(shifted: Shifted, output: Path) -> dict[str, Any]:
    """Write the records into the report folder `output`; return their ROW."""
    path = shifted.folder / "records.parquet"
    shifted.records.save(output / path)
    return row(shifted.records, shifted.data, path)


def write_shift(clean: dict[str, Any], sets: Sequence[dict[str, Any]], output: Path) -> None:
    """Write `shift.json` from the ROW of the clean images and those of `save_shifted`."""
    named = dict.fromkeys(r["name"] for r in sets if r["corruption"])
    groups = [group([r for r in sets if r["name"] == name and r["corruption"]]) for name in named]
    table = {
        "schema_version": SCHEMA_VERSION, "clean": clean, "sets": list(sets), "corruptions": groups,
    }  # fmt: skip
    write_json(output / "shift.json", table)


def read_shift(output: Path) -> dict[str, Any] | None:
    """The table of a report folder, or None where only clean images were evaluated.

    ValueError if another version of this program wrote it.
    """
    path = output / "shift.json"
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate again") from None
    if table.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {table.get('schema_version')}, expected {SCHEMA_VERSION}; "
            "evaluate again"
        )
    return table


def row(records: Records, data: str, path: Path) -> dict[str, Any]:
    """The ROW of one data set. path: of its records, relative to the report folder."""
    source = records.source
    clean = source.temperature_from is None
    return {
        "name": source.name,
        "kind": source.kind,
        "corruption": source.corruption,
        "severity": source.severity,
        "generated": source.generated,
        "images": len(records),
        "classes": records.classes,
        "data": data,
        "records": path.as_posix(),
        "temperature": records.temperature,
        "temperature_from": source.name if clean else source.temperature_from,
        "own_temperature": records.temperature if clean else source.own_temperature,
        "before": figures(records.before),
        "after": figures(records.after),
        "real": real_figures(records),
    }


def figures(scores: Scores) -> dict[str, float | int | None]:
    """FIGURES of the scores of some images."""
    return {
        **_of_correctness(scores.confidence, scores.log_confidence, scores.correct),
        "nll": float(scores.nll.mean()),
        "brier": float(scores.brier.mean()),
        "mean_entropy": float(scores.entropy.mean()),
    }


def real_figures(records: Records) -> dict[str, float | int | None] | None:
    """What of FIGURES ReaL labels define: any of an image's labels counts as correct.

    Images without a ReaL label are left out. None where there are no ReaL labels at all.
    Source: Beyer et al., Are we done with ImageNet? (arXiv 2006.07159), section 3.
    """
    if records.real is None or not (records.real >= 0).any():
        return None
    counts = records.real >= 0
    before = records.before
    return _of_correctness(
        before.confidence[counts], before.log_confidence[counts], records.real[counts] == 1
    )


def _of_correctness(
    confidence: np.ndarray, rank_by: np.ndarray, correct: np.ndarray
) -> dict[str, float | int | None]:
    return {
        "images": len(correct),
        "accuracy": float(correct.mean()),
        "mean_confidence": float(confidence.mean()),
        "signed_gap": metrics.signed_gap(confidence, correct),
        "ece": metrics.expected_calibration_error(confidence, correct),
        "aurc": selective.aurc(rank_by, correct),
        "eaurc": selective.eaurc(rank_by, correct),
        "augrc": selective.augrc(rank_by, correct),
        "auroc": selective.auroc(rank_by, correct),
    }


def group(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The GROUP of the subsets of one ImageNet-C set."""
    corruptions = list(dict.fromkeys(r["corruption"] for r in rows))
    severities = sorted({r["severity"] for r in rows})
    return {
        "name": rows[0]["name"],
        "generated": rows[0]["generated"],
        "corruptions": corruptions,
        "severities": severities,
        **{side: _means(rows, side, corruptions, severities) for side in ("before", "after")},
        "mean_corruption_error": mean_corruption_error(rows),
    }


def _means(
    rows: Sequence[dict[str, Any]], side: str, corruptions: list[str], severities: list[int]
) -> dict[str, Any]:
    def mean(key: str | None, value: Any) -> dict[str, float | None]:
        chosen = [r[side] for r in rows if key is None or r[key] == value]
        columns = {name: [figures[name] for figures in chosen] for name in chosen[0]}
        return {n: None if None in c else float(np.mean(c)) for n, c in columns.items()}

    return {
        "all": mean(None, None),
        "by_severity": {str(s): mean("severity", s) for s in severities},
        "by_corruption": {c: mean("corruption", c) for c in corruptions},
    }


def mean_corruption_error(rows: Sequence[dict[str, Any]]) -> float | None:
    """mCE of the published ImageNet-C, 1 for AlexNet; None for anything less or else.

    Source: Hendrycks and Dietterich (ICLR 2019), section 4.
    """
    error = {(r["corruption"], r["severity"]): 1 - r["before"]["accuracy"] for r in rows}
    wanted = {(c, s) for c in ALEXNET_ERROR for s in SEVERITIES}
    if any(r["generated"] for r in rows) or not wanted <= error.keys():
        return None
    relative = [
        np.mean([error[c, s] for s in SEVERITIES]) / known for c, known in ALEXNET_ERROR.items()
    ]
    return float(np.mean(relative))
