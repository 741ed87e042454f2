"""How far a network's confidence can be trusted on images under shift: `shift.json`.

If data under shift were evaluated, a report folder also holds

    shift.json
    shift/NAME/records.parquet                              one file per data set,
    shift/NAME/CORRUPTION/SEVERITY/records.parquet          one file per subset of ImageNet-C

and shift.json is

    {"schema_version": 2,
     "clean": ROW,                  the clean images, `after` cross-fitted on themselves
     "sets": [ROW, ...],            in the order of evaluation; each subset of ImageNet-C is one
     "corruptions": [GROUP, ...]}   one per ImageNet-C set

    ROW = {"name", "kind",                          of the data set
           "corruption", "severity", "generated",   null, null, false except for ImageNet-C
           "images", "classes",                     numbers of images, and of classes to choose from
           "data",                                  identity of the images (a hash)
           "records",                               path of the parquet file in the folder
           "temperature", "temperature_from",       the one in `after`; from which data set
           "own_temperature",                       fitted on these images, for comparison only
           "own_temperature_interval",
           "before": FIGURES, "after": FIGURES,     as trained, after temperature scaling
           "effect": EFFECT,                        what that temperature does
           "real": FIGURES or null}                 ImageNet validation: as trained; an answer is
                                                    correct if it is a ReaL label; without nll,
                                                    brier

    FIGURES = {"images", "accuracy", "mean_confidence", "signed_gap", "ece", "nll", "brier",
               "aurc", "eaurc", "augrc", "auroc", "mean_entropy",
               "intervals": {"accuracy": {"low", "high"}, ...}}     for all but images

    EFFECT = {"distance": DIFFERENCE,   |signed gap| after minus before; below 0 is nearer to 0
              "ece": DIFFERENCE}
    DIFFERENCE = {"value", "low", "high"}   on the same resampled images

    GROUP = {"name", "generated", "corruptions": [...], "severities": [...],
             "before": MEANS, "after": MEANS, "effect": {"all": EFFECT, "by_severity": ..., ...},
             "mean_corruption_error",           published files, all corruptions and severities:
             "mean_corruption_error_interval"}  error relative to AlexNet's; else null
    MEANS = {"all": FIGURES, "by_severity": {"1": FIGURES, ...},
             "by_corruption": {"fog": FIGURES, ...}}    plain means over the subsets

Rates are fractions. NLL and entropy are in nats. A figure is null if it is undefined, and a mean is
null if one of its figures is. Nothing is rounded. Intervals are 95 % bootstrap intervals over
images. For a mean over subsets, each resample draws the same photographs in all subsets. If subsets
hold different photographs, the interval is null. In a `generated` set, this package applied the
corruptions. Published figures are measured on the files of ImageNet-C, so that the two do not
belong in one table.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.shift.groups import group
from flatcal_dist.calibration.shift.rows import Measured, measure
from flatcal_dist.files import write_json

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Shifted:
    """The records of one data set under shift, and the identity of its images."""

    records: Records
    data: str

    @property
    def folder(self) -> Path:
        """Where the records lie in the report folder."""
        source = self.records.source
        folder = Path("shift") / str(source.name)
        if source.corruption is None:
            return folder
        return folder / source.corruption / str(source.severity)


def save_shifted(shifted: Shifted, output: Path) -> Measured:
    """Write the records into the report folder `output`, and return what is measured on them."""
    path = shifted.folder / "records.parquet"
    shifted.records.save(output / path)
    return measure(shifted.records, shifted.data, path)


def write_shift(clean: Measured, sets: Sequence[Measured], output: Path) -> None:
    """Write `shift.json`.

    Args:
        clean: What was measured on the clean images.
        sets: What `save_shifted` returned for the other images.
        output: The report folder.
    """
    subsets = [s for s in sets if s.row["corruption"]]
    named = dict.fromkeys(s.row["name"] for s in subsets)
    table = {
        "schema_version": SCHEMA_VERSION,
        "clean": clean.row,
        "sets": [s.row for s in sets],
        "corruptions": [group([s for s in subsets if s.row["name"] == name]) for name in named],
    }
    write_json(output / "shift.json", table)


def read_shift(output: Path) -> dict[str, Any] | None:
    """Read the shift.json of a report folder. None if only clean images were evaluated.

    ValueError if the file is damaged or has another schema version.
    """
    path = output / "shift.json"
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it holds no keys and values")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate again") from None
    if table.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {table.get('schema_version')}, expected {SCHEMA_VERSION}; "
            "evaluate again"
        )
    return table
