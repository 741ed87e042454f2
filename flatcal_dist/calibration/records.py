"""One record per image: all that the report needs, without the logits."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from flatcal_dist.files import write_atomically

from .calibrators import TemperatureScaling
from .checks import BoolArray, FloatArray, IntArray, image_ids, logits_and_labels
from .classwise import ClasswiseSums
from .crossfit import FIVE_FOLDS, CrossFit, HoldOut, OutOfSample, fit_out_of_sample
from .scores import NAMES, Tuning, confidence_scores, tune
from .softmax import Scores, score_images

METADATA_KEY = b"flatcal_dist.records"
SCORES = ("log_confidence", "nll", "brier", "entropy")
RANKING = "score_"  # before the names of the confidence scores
SETTINGS = (
    "classes",
    "temperature",
    "temperature_interval",
    "fold_temperatures",
    "fold_seed",
    "calibration",
    "fitted_images",
    "own_temperature",
    "classwise",
    "logits_dtype",
)


@dataclass(frozen=True)
class Records:
    """One record per image, sorted by id.

    id: unique strings [N]. label, prediction, rank: int [N]; rank counts the classes placed
    before the label, so rank 0 is correct. fold [N]: cross-fitting fold, -1 where the image was
    scored by a fit that saw other images altogether. before, after: scores before and after
    temperature scaling, the latter with temperatures fitted without the image.
    temperature: fitted on all images that may be fitted on; temperature_interval: its 95 %
    interval over images. fold_temperatures: the one that scores each fold.
    calibration: "cross-fit", "hold-out" (`fitted_images` others were fitted on and have no
    record), or "elsewhere" (fitted on another data set, as for shifted images; own_temperature is
    then what these images themselves would have asked for, a diagnostic alone).
    ranking: the confidence scores of `scores.NAMES` [N] by name; compared [N]: the images that
    `tuning` did not use, on which they are to be compared.
    classwise: classwise and thresholded classwise ECE, before and after.
    """

    id: np.ndarray
    label: IntArray
    prediction: IntArray
    rank: IntArray
    fold: IntArray
    before: Scores
    after: Scores
    ranking: dict[str, FloatArray]
    compared: BoolArray
    classes: int
    temperature: float
    temperature_interval: tuple[float, float] | None
    fold_temperatures: tuple[float | None, ...]
    fold_seed: int
    calibration: str
    fitted_images: int
    own_temperature: float | None
    tuning: Tuning
    classwise: dict[str, float | None]
    logits_dtype: str

    def __len__(self) -> int:
        return len(self.id)

    @property
    def correct(self) -> BoolArray:
        return self.rank == 0

    @property
    def confidence(self) -> FloatArray:
        return self.before.confidence

    @classmethod
    def from_logits(
        cls,
        ids: Sequence[str],
        labels: ArrayLike,
        logits: ArrayLike,
        *,
        expected: int | None = None,
        split: CrossFit | HoldOut = FIVE_FOLDS,
        clean: "Records | None" = None,
        sources: Sequence[str] | None = None,
    ) -> "Records":
        """Build the records of logits [N, K] (floats), labels int [N] and ids [N].

        expected: the number of images that the data set holds. split: how temperatures are kept
        from the images that they score; after a hold-out the images fitted on have no record.
        clean: records whose temperatures and tuning are used instead of those of these images;
        sources [N]: ids of the images that these were made from, where they are called otherwise.
        ValueError if the number differs, an id occurs twice (padding of a distributed loader was
        not removed), logits are not finite or labels out of range.
        """
        z, y = logits_and_labels(logits, labels)
        names = image_ids(ids, len(z))
        if expected is not None and len(names) != expected:
            raise ValueError(
                f"expected {expected} images, got {len(names)}: "
                "every image must be evaluated exactly once, on whatever number of ranks"
            )
        origin = names if sources is None else np.array([str(i) for i in sources])
        if len(origin) != len(names):
            raise ValueError(f"sources must have length {len(names)}, got {len(origin)}")
        order = np.argsort(names, kind="stable")  # so that no result depends on ranks or workers
        if (order[1:] < order[:-1]).any():
            names, origin, z, y = names[order], origin[order], z[order], y[order]
        return _build(names, origin, z, y, split, clean)

    def temperature_fit(self) -> OutOfSample:
        """The temperatures, as what can score other images, such as shifted versions of these."""
        if self.calibration != "cross-fit":
            raise ValueError(
                f"these records were calibrated by {self.calibration}; only cross-fitted ones can "
                "calibrate other images"
            )
        per_fold = tuple(
            None if t is None else TemperatureScaling.at(t) for t in self.fold_temperatures
        )
        split = CrossFit(len(per_fold), self.fold_seed)
        overall = TemperatureScaling.at(self.temperature)
        return OutOfSample("temperature", split, overall, per_fold, frozenset(self.id.tolist()))

    def save(self, path: Path) -> None:
        """Write parquet: one row per image, scalars only; appears whole or not at all."""
        columns = {
            "id": pa.array(self.id.tolist(), pa.string()),
            "label": self.label.astype(np.int32),
            "prediction": self.prediction.astype(np.int32),
            "rank": self.rank.astype(np.int32),
            "correct": self.correct,
            "fold": self.fold.astype(np.int16),
            "compared": self.compared,
        }
        for suffix, scores in (("", self.before), ("_after_temperature", self.after)):
            columns["confidence" + suffix] = scores.confidence
            columns |= {name + suffix: getattr(scores, name) for name in SCORES}
        columns |= {RANKING + name: score for name, score in self.ranking.items()}
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings["tuning"] = asdict(self.tuning)
        table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(settings)})
        with write_atomically(Path(path)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> "Records":
        """Read what `save` wrote, exactly. ValueError if the file is something else."""
        table = pq.read_table(path)
        metadata = (table.schema.metadata or {}).get(METADATA_KEY)
        if metadata is None:
            raise ValueError(f"{path} holds no records of this package; run `flatcal evaluate`")
        settings = json.loads(metadata)

        def column(name: str, dtype: type) -> np.ndarray:
            return table[name].to_numpy().astype(dtype)

        rank = column("rank", np.int64)
        before, after = (
            Scores(rank == 0, *(column(name + suffix, np.float64) for name in SCORES))
            for suffix in ("", "_after_temperature")
        )
        settings["fold_temperatures"] = tuple(settings["fold_temperatures"])
        if settings["temperature_interval"] is not None:
            settings["temperature_interval"] = tuple(settings["temperature_interval"])
        tuning = settings.pop("tuning")
        return cls(
            id=np.array(table["id"].to_pylist(), dtype=np.str_),
            label=column("label", np.int64),
            prediction=column("prediction", np.int64),
            rank=rank,
            fold=column("fold", np.int64),
            before=before,
            after=after,
            ranking={name: column(RANKING + name, np.float64) for name in NAMES},
            compared=column("compared", np.bool_),
            tuning=Tuning(**(tuning | {"split": HoldOut(**tuning["split"])})),
            **settings,
        )


def _build(
    names: np.ndarray,
    source: np.ndarray,
    z: np.ndarray,
    y: IntArray,
    split: CrossFit | HoldOut,
    clean: Records | None,
) -> Records:
    calibration = "elsewhere" if clean else "cross-fit"
    if clean:
        fit, tuning, split = clean.temperature_fit(), clean.tuning, CrossFit(2, clean.fold_seed)
    else:
        fit = fit_out_of_sample("temperature", names.tolist(), z, y, split)
        held_out = isinstance(split, HoldOut)
        tuning = tune(names.tolist(), z, y, split if held_out else HoldOut(seed=split.seed))
    if isinstance(split, HoldOut):
        calibration = "hold-out"
        kept = np.flatnonzero(fit.may_score(names.tolist()))
        if not len(kept):
            raise ValueError("the hold-out takes all images: none is left to score")
        names, source, z, y = names[kept], source[kept], z[kept], y[kept]
    sums = ClasswiseSums(z.shape[1]), ClasswiseSums(z.shape[1])
    before = score_images(z, y, classwise=sums[0])
    # Dividing by T > 0 keeps the order of the classes; before rounding, so rank stays.
    after = score_images(z, y, fit.temperatures(source.tolist()), classwise=sums[1])
    return Records(
        id=names,
        label=y,
        prediction=before.prediction,
        rank=before.rank,
        fold=fit.fit_of(source.tolist()),
        before=before.scores(),
        after=after.scores(before.correct),
        ranking=confidence_scores(z, before, tuning),
        compared=~tuning.split.chosen(source.tolist()),
        classes=z.shape[1],
        temperature=fit.overall.temperature,
        temperature_interval=None if clean else fit.overall.interval(),
        fold_temperatures=tuple(None if f is None else f.temperature for f in fit.per_fold),
        fold_seed=split.seed,
        calibration=calibration,
        fitted_images=0 if clean else len(fit.seen),
        own_temperature=TemperatureScaling().fit(z, y).temperature if clean else None,
        tuning=tuning,
        classwise={
            "classwise_ece": sums[0].error,
            "thresholded_classwise_ece": sums[0].thresholded_error,
            "classwise_ece_after_temperature": sums[1].error,
            "thresholded_classwise_ece_after_temperature": sums[1].thresholded_error,
        },
        logits_dtype=str(z.dtype),
    )
