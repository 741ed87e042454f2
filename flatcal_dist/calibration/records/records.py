"""One record per image: all that the report needs, without the logits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.crossfit import (
    CrossFit,
    HoldOut,
    OutOfSample,
    fit_out_of_sample,
    fold_of,
)
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.checks import (
    BoolArray,
    FloatArray,
    IntArray,
    image_ids,
    logits_and_labels,
)
from flatcal_dist.calibration.confidence.of_logits import Tuning, confidence_scores, tune
from flatcal_dist.calibration.confidence.sources import BY_KEY, SCORES
from flatcal_dist.calibration.metrics.classwise import ClasswiseSums
from flatcal_dist.calibration.records.record_files import (
    METADATA_KEY,
    OF_SOFTMAX,
    RANKING,
    SETTINGS,
    known_fields,
    read_columns,
)
from flatcal_dist.calibration.softmax import Scores, score_images
from flatcal_dist.files import write_atomically


@dataclass(frozen=True)
class Source:
    """Which images these are, and what was done to them.

    name: of the data set. kind: as in `data.variants`. classes: the network's classes among which
    it had to choose (ImageNet-A and -R: 200 of them, all other logits left out before the softmax);
    labels and predictions of the records number this list. None: all classes. corruption, severity:
    of ImageNet-C. generated: the corruption was applied by us, not published as files.
    temperature_from: name of the data whose temperature scales these records; None: their own,
    cross-fitted. own_temperature, and its 95 % interval over images: fitted on all of these images,
    with their labels; where temperature_from is set it is there to compare with, and scales
    nothing. probabilities: only
    the softmax was known, and logits are its logarithms: scores that need the logits' own level
    say nothing.
    """

    name: str | None = None
    kind: str | None = None
    classes: tuple[int, ...] | None = None
    corruption: str | None = None
    severity: int | None = None
    generated: bool = False
    temperature_from: str | None = None
    own_temperature: float | None = None
    own_temperature_interval: tuple[float, float] | None = None
    probabilities: bool = False


@dataclass(frozen=True)
class Records:
    """One record per image, sorted by id.

    id: unique strings [N]. label, prediction, rank: int [N]; rank counts the classes placed
    before the label, so rank 0 is correct. fold [N]: cross-fitting fold. before, after: scores
    before and after temperature scaling, the latter with temperatures fitted without the image.
    temperature: fitted on all images that may be fitted on; temperature_interval: its 95 %
    interval over images. fold_temperatures: the one that scores each fold; empty where, instead,
    `held_out` images were fitted on, which have no record. Of images under shift
    (`source.temperature_from`) all of these are those of the clean images. real [N], or None
    where there are no ReaL labels: 1 if the prediction is one of the image's ReaL labels, 0 if
    not, -1 if the image has none and stays out of figures on ReaL.
    ranking: confidence scores [N] by key, in the order of `confidence.sources.SCORES`: all scores
    of logits, and those of other kinds that were computed. compared [N]: the images that `tuning`
    did not use, on which they are to be compared. classwise: classwise and thresholded classwise
    ECE, before and after. logits_dtype: of the logits as they came.
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
    tuning: Tuning
    classes: int
    temperature: float
    temperature_interval: tuple[float, float] | None
    fold_temperatures: tuple[float | None, ...]
    fold_seed: int
    held_out: int
    classwise: dict[str, float | None]
    logits_dtype: str
    source: Source = Source()
    real: IntArray | None = None

    def __len__(self) -> int:
        return len(self.id)

    @property
    def correct(self) -> BoolArray:
        return self.rank == 0

    @property
    def confidence(self) -> FloatArray:
        return self.before.confidence

    @property
    def missing(self) -> tuple[str, ...]:
        """Keys of scores of logits that these records, being older, lack and could have."""
        level = not self.source.probabilities
        of_these = (s.key for s in SCORES if s.of_logits and (level or s.needs != "logits"))
        return tuple(key for key in of_these if key not in self.ranking)

    @classmethod
    def from_logits(
        cls,
        ids: Sequence[str],
        labels: ArrayLike,
        logits: ArrayLike,
        *,
        expected: int | None = None,
        folds: int = 5,
        hold_out: float | None = None,
        seed: int = 0,
        clean: "Records | None" = None,
        source: Source = Source(),
        real_labels: Sequence[Sequence[int]] | None = None,
        scores: Mapping[str, ArrayLike] | None = None,
    ) -> "Records":
        """Build the records of logits [N, K] (floats), labels int [N] and ids [N].

        expected: the number of images that the data set holds. ValueError if the number differs,
        an id occurs twice (padding of a distributed loader was not removed), logits are not
        finite or labels out of range. Seed and folds decide the cross-fitting folds; hold_out:
        instead, the share of the images that is fitted on and left out of the records.

        clean: of images under shift, the same network's records of the clean ones, whose
        temperatures are used (and whose folds): that of its fold for an image that is among the
        clean ones (ImageNet-C), the overall one for any other. real_labels: per image the ReaL
        labels, possibly none, in the same order as ids. scores: values [N] in that order of scores
        that need more than logits, by their keys.
        """
        z = np.asarray(logits)
        names = image_ids(ids, len(z))
        z, y = logits_and_labels(z, labels, names)
        if expected is not None and len(names) != expected:
            raise ValueError(
                f"expected {expected} images, got {len(names)}: "
                "every image must be evaluated exactly once, on whatever number of ranks"
            )
        if real_labels is not None and len(real_labels) != len(z):
            raise ValueError(
                f"there are ReaL labels of {len(real_labels)} images, but {len(z)} images"
            )
        computed = _computed(scores or {}, len(z))
        order = np.argsort(names, kind="stable")  # so that no result depends on ranks or workers
        names, y = names[order], y[order]
        if (np.diff(order) != 1).any():  # a copy of 50,000 x 1,000 logits is 200 MB
            z = z[order]
        if clean is None:
            split = HoldOut(hold_out, seed) if hold_out is not None else CrossFit(folds, seed)
            fit = fit_out_of_sample("temperature", names.tolist(), z, y, split)
            judged_apart = split if hold_out is not None else HoldOut(seed=seed)
            tuning = tune(names.tolist(), z, y, judged_apart)
        else:
            fit, tuning = clean.temperature_fit(), clean.tuning
            folds, seed = len(clean.fold_temperatures), clean.fold_seed
            own = TemperatureScaling().fit(z, y)
            source = replace(
                source,
                temperature_from=clean.source.name or "clean images",
                own_temperature=own.temperature,
                own_temperature_interval=own.interval(),
            )
        kept = fit.may_score(names.tolist())
        if not kept.any():
            raise ValueError("the hold-out takes all images: none is left to score")
        if not kept.all():
            order, names, z, y = order[kept], names[kept], z[kept], y[kept]
        sums = ClasswiseSums(z.shape[1]), ClasswiseSums(z.shape[1])
        before = score_images(z, y, classwise=sums[0])
        # Dividing by T > 0 keeps the order of the classes; before rounding, so rank stays.
        after = score_images(z, y, fit.temperatures(names.tolist()), classwise=sums[1])
        return cls(
            id=names,
            label=y,
            prediction=before.prediction,
            rank=before.rank,
            fold=fold_of(names.tolist(), folds, seed),
            before=before.scores(),
            after=after.scores(before.correct),
            ranking=confidence_scores(z, before, tuning)
            | {key: values[order] for key, values in computed.items()},
            compared=~tuning.split.chosen(names.tolist()),
            tuning=tuning,
            classes=z.shape[1],
            temperature=fit.overall.temperature,
            temperature_interval=fit.overall.interval() if clean is None else None,
            fold_temperatures=tuple(None if f is None else f.temperature for f in fit.per_fold),
            fold_seed=seed,
            held_out=int((~kept).sum()),
            classwise={
                "classwise_ece": sums[0].error,
                "thresholded_classwise_ece": sums[0].thresholded_error,
                "classwise_ece_after_temperature": sums[1].error,
                "thresholded_classwise_ece_after_temperature": sums[1].thresholded_error,
            },
            logits_dtype=str(np.asarray(logits).dtype),
            source=source,
            real=_real(real_labels, order, before.prediction),
        )

    def temperature_fit(self) -> OutOfSample:
        """The temperatures, as what can score other images, such as shifted versions of these.

        ValueError unless they are cross-fitted on these images themselves.
        """
        if not self.fold_temperatures or self.source.temperature_from is not None:
            raise ValueError(
                "only records cross-fitted on their own images can calibrate others; "
                "evaluate the clean images without hold_out and clean"
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
        if self.real is not None:
            columns["real"] = self.real.astype(np.int8)
        for suffix, scores in (("", self.before), ("_after_temperature", self.after)):
            columns["confidence" + suffix] = scores.confidence
            columns |= {name + suffix: getattr(scores, name) for name in OF_SOFTMAX}
        columns |= {RANKING + name: score for name, score in self.ranking.items()}
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings |= {"tuning": asdict(self.tuning), "source": asdict(self.source)}
        table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(settings)})
        with write_atomically(Path(path)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> "Records":
        """Read what `save` wrote, exactly; scores that an older version did not know stay away.

        What a newer version added is left out, with a RuntimeWarning that names it. ValueError if
        the file is something else, or lacks more than scores.
        """
        columns, settings = read_columns(Path(path))
        tuning, source = settings.pop("tuning"), settings.pop("source")
        correct = columns["rank"] == 0
        before, after = (
            Scores(correct, *(columns[name + suffix] for name in OF_SOFTMAX))
            for suffix in ("", "_after_temperature")
        )
        columns.setdefault(f"{RANKING}msp", before.log_confidence)  # what others are compared to
        settings["fold_temperatures"] = tuple(settings["fold_temperatures"])
        if settings["temperature_interval"] is not None:
            settings["temperature_interval"] = tuple(settings["temperature_interval"])
        tuning = known_fields(path, Tuning, tuning)
        split = tuning["split"]
        stored = known_fields(path, Source, source)
        lists = {name: stored.get(name) for name in ("classes", "own_temperature_interval")}
        source = Source(**stored | {n: None if v is None else tuple(v) for n, v in lists.items()})
        return cls(
            **{name: columns[name] for name in ("id", "label", "prediction", "rank", "fold")},
            before=before,
            after=after,
            ranking={s.key: columns[RANKING + s.key] for s in SCORES if RANKING + s.key in columns},
            compared=columns["compared"],
            tuning=Tuning(**tuning | {"split": HoldOut(**known_fields(path, HoldOut, split))}),
            source=source,
            real=columns.get("real"),
            **settings,
        )


def _computed(scores: Mapping[str, ArrayLike], images: int) -> dict[str, FloatArray]:
    """The scores that need more than logits, checked and in the order of the list."""
    for key in scores:
        if key not in BY_KEY or BY_KEY[key].of_logits:
            known = ", ".join(score.key for score in SCORES if not score.of_logits)
            raise ValueError(f"{key!r} is no score that needs more than logits; those are {known}")
    found = {key: np.asarray(scores[key], dtype=np.float64) for key in BY_KEY if key in scores}
    for key, values in found.items():
        if values.shape != (images,):
            raise ValueError(f"score {key}: expected {images} values, got shape {values.shape}")
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"score {key} of {bad} images is NaN or infinite")
    return found


def _real(
    labels: Sequence[Sequence[int]] | None, order: IntArray, prediction: IntArray
) -> IntArray | None:
    """Whether each prediction is among its image's ReaL labels; -1 where there are none."""
    if labels is None:
        return None
    found = (
        int(guess in labels[image]) if len(labels[image]) else -1
        for image, guess in zip(order.tolist(), prediction.tolist(), strict=True)
    )
    return np.array(list(found), dtype=np.int64)
