"""One record per image, with all that the report needs, and without the logits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.crossfit import (
    CrossFit,
    HoldOut,
    OutOfSample,
    fold_of,
)
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.checks import (
    BoolArray,
    FloatArray,
    IntArray,
    StringArray,
    image_ids,
    logits_and_labels,
)
from flatcal_dist.calibration.confidence.of_logits import Tuning, confidence_scores
from flatcal_dist.calibration.confidence.sources import BY_KEY, SCORES
from flatcal_dist.calibration.metrics.classwise import ClasswiseSums
from flatcal_dist.calibration.records.record_files import (
    METADATA_KEY,
    OF_SOFTMAX,
    OPTIMUM,
    RANKING,
    SETTINGS,
    known_fields,
    read_columns,
)
from flatcal_dist.calibration.records.source import UNTOLD, Source
from flatcal_dist.calibration.records.temperatures import (
    Apart,
    fitted,
    of_images_apart,
    with_own_temperature,
)
from flatcal_dist.calibration.softmax import Scores, score_images
from flatcal_dist.files import write_atomically

if TYPE_CHECKING:
    from flatcal_dist.calibration.after_training.parts import PostHoc
    from flatcal_dist.calibration.after_training.people import AgainstPeople


@dataclass(frozen=True)
class Records:
    """One record per image, sorted by id.

    Images under shift (`source.temperature_from`) have the temperatures and folds of the clean
    images. A version of a clean image is scored by the temperature of its fold, and any other image
    by the overall temperature.

    Args:
        id: The ids, unique strings [N].
        label: The labels int [N].
        prediction: The predicted classes int [N].
        rank: The number of classes before the label int [N]. Rank 0 is correct.
        fold: The fold of each image int [N].
        before: The scores before temperature scaling.
        after: The scores after it, with temperatures that are fitted without the image.
        ranking: The confidence scores [N] by key, in the order of `confidence.sources.SCORES`. They
            hold all scores of logits, and scores of other kinds that were computed.
        compared: The images [N] that `tuning` did not use. Confidence scores are compared on them.
        tuning: What was tuned for confidence scores.
        classes: The number of classes.
        temperature: The temperature that is fitted on all images that may be fitted on.
        temperature_interval: Its 95 % interval over images.
        fold_temperatures: The temperature that scores each fold. It is empty after a hold-out.
        fold_seed: The seed of the folds.
        held_out: The number of images that were fitted on and have no record.
        optimum: The scores at `source.own_temperature`, which has seen their labels. They are there
            only where `source.fitted_apart` is true.
        classwise: Classwise and thresholded classwise ECE, before and after.
        logits_dtype: The dtype in which the logits came.
        source: Which images were evaluated.
        real: 1 if the prediction is a ReaL label of the image, 0 if not, -1 if it has none [N];
            None if there are no ReaL labels.
        post_hoc, people, apart: For the report, and not in the file of records: calibrators and
            conformal sets, the network against people's answers, scores of images kept apart.
    """

    id: StringArray
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
    source: Source = UNTOLD
    real: IntArray | None = None
    optimum: Scores | None = None
    post_hoc: "PostHoc | None" = None
    people: "AgainstPeople | None" = None
    apart: Scores | None = None

    def __len__(self) -> int:
        return len(self.id)

    @property
    def correct(self) -> BoolArray:
        """Which images are right [N]."""
        return self.rank == 0

    @property
    def confidence(self) -> FloatArray:
        """The confidence before temperature scaling [N]."""
        return self.before.confidence

    @property
    def missing(self) -> tuple[str, ...]:
        """The keys of scores of logits that these records lack because they are older."""
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
        apart: Apart | None = None,
        clean: "Records | None" = None,
        source: Source = UNTOLD,
        real_labels: Sequence[Sequence[int]] | None = None,
        scores: Mapping[str, ArrayLike] | None = None,
    ) -> "Records":
        """Build the records of logits.

        Args:
            ids: The ids of the images [N], each of them once.
            labels: The labels int [N].
            logits: The logits [N, K].
            expected: The number of images in the data set.
            folds: The number of folds for cross-fitting.
            hold_out: The share of the images that is fitted on and gets no record, if any.
            seed: The seed of the folds, or of the hold-out.
            apart: Images kept apart from training. The temperature is then fitted on them alone.
            clean: For images under shift, the same network's records of the clean images.
            source: Which images these are.
            real_labels: The ReaL labels of each image, which may be none, in the order of the ids.
            scores: The values [N], by key, of scores that need more than logits.

        Raises:
            ValueError: The number of images is not the expected one, an id occurs twice, logits are
                not finite, or labels are out of range.
        """
        names = image_ids(ids, len(np.asarray(logits)))
        z, y = logits_and_labels(logits, labels, names)
        _refuse_other_numbers(len(names), expected, real_labels)
        computed = _computed(scores or {}, len(z))
        order, names, z, y = _sorted(names, z, y)
        source = _named(source, z, y, clean, apart)
        if clean is not None:
            folds, seed = len(clean.fold_temperatures) or folds, clean.fold_seed
        how = apart or (CrossFit(folds, seed) if hold_out is None else HoldOut(hold_out, seed))
        fit, tuning = clean.used() if clean is not None else fitted(names.tolist(), z, y, how)
        kept = fit.may_score(names.tolist())
        order, names, z, y = order[kept], names[kept], z[kept], y[kept]
        found = cls._scored(names, z, y, fit, tuning)
        return replace(
            found,
            fold=fold_of(names.tolist(), folds, seed), fold_seed=seed,
            ranking=found.ranking | {key: values[order] for key, values in computed.items()},
            temperature_interval=fit.scaling.interval() if clean is None else None,
            held_out=int((~kept).sum()) if apart is None else len(apart),
            optimum=_at_optimum(z, y, found, source),
            logits_dtype=str(np.asarray(logits).dtype),
            source=source,
            real=_real(real_labels, order, found.prediction),
        )  # fmt: skip

    @classmethod
    def _scored(
        cls, names: StringArray, z: np.ndarray, y: IntArray, fit: OutOfSample, tuning: Tuning
    ) -> "Records":
        """The records of images that `fit` may score, as far as they follow from the logits."""
        if not len(names):
            raise ValueError("the hold-out takes all images: none is left to score")
        ids = names.tolist()
        sums = ClasswiseSums(z.shape[1]), ClasswiseSums(z.shape[1])
        before = score_images(z, y, classwise=sums[0])
        # Dividing by T > 0 keeps the order of the classes, up to rounding. So the rank stays.
        after = score_images(z, y, fit.temperatures(ids), classwise=sums[1])
        return cls(
            id=names,
            label=y,
            prediction=before.prediction,
            rank=before.rank,
            fold=np.zeros(len(ids), np.int64),
            before=before.scores(),
            after=after.scores(before.correct),
            ranking=confidence_scores(z, before, tuning),
            compared=~tuning.split.chosen(ids),
            tuning=tuning,
            classes=z.shape[1],
            temperature=fit.scaling.temperature,
            temperature_interval=None,
            fold_temperatures=fit.fold_temperatures,
            fold_seed=fit.split.seed,
            held_out=0,
            classwise={
                "classwise_ece": sums[0].error,
                "thresholded_classwise_ece": sums[0].thresholded_error,
                "classwise_ece_after_temperature": sums[1].error,
                "thresholded_classwise_ece_after_temperature": sums[1].thresholded_error,
            },
            logits_dtype=str(z.dtype),
        )

    def used(self) -> tuple[OutOfSample, Tuning]:
        """Return what other images are scored with: `temperature_fit` and the tuned settings."""
        return self.temperature_fit(), self.tuning

    def temperature_fit(self) -> OutOfSample:
        """Return the temperatures, to score other images, such as shifted versions of these.

        ValueError unless the temperatures are cross-fitted on these images, or fitted on images
        that were kept apart.
        """
        if self.source.fitted_apart:
            return of_images_apart(TemperatureScaling.at(self.temperature))
        if not self.fold_temperatures or self.source.temperature_from is not None:
            raise ValueError(
                "only records that are cross-fitted can calibrate other images; "
                "evaluate the clean images without hold_out and clean"
            )
        per_fold = tuple(
            None if t is None else TemperatureScaling.at(t) for t in self.fold_temperatures
        )
        split = CrossFit(len(per_fold), self.fold_seed)
        overall = TemperatureScaling.at(self.temperature)
        return OutOfSample("temperature", split, overall, per_fold, frozenset(self.id.tolist()))

    def save(self, path: Path) -> None:
        """Write a parquet file with one row per image, which appears whole or not at all."""
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
        sides = {"": self.before, "_after_temperature": self.after, OPTIMUM: self.optimum}
        for suffix, scores in sides.items():
            if scores is None:
                continue
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
        """Read exactly what `save` wrote.

        Scores that an older version did not know are missing. What a newer version added is left
        out, with a RuntimeWarning that names it. ValueError if the file is something else, or if it
        lacks more than scores.
        """
        columns, settings = read_columns(Path(path))
        tuning, source = settings.pop("tuning"), settings.pop("source")
        correct = columns["rank"] == 0
        before, after, optimum = (
            Scores(correct, *(columns[name + suffix] for name in OF_SOFTMAX))
            if OF_SOFTMAX[0] + suffix in columns
            else None
            for suffix in ("", "_after_temperature", OPTIMUM)
        )
        assert before is not None  # `read_columns` refuses a file without these
        assert after is not None
        columns.setdefault(f"{RANKING}msp", before.log_confidence)  # others are compared to it
        settings["fold_temperatures"] = tuple(settings["fold_temperatures"])
        if settings["temperature_interval"] is not None:
            settings["temperature_interval"] = tuple(settings["temperature_interval"])
        tuning = known_fields(path, Tuning, tuning)
        split = tuning["split"]
        stored = known_fields(path, Source, source)
        lists = {name: stored.get(name) for name in ("classes", "own_temperature_interval")}
        source = Source(**stored | {n: None if v is None else tuple(v) for n, v in lists.items()})
        return cls(
            id=columns["id"],
            label=columns["label"],
            prediction=columns["prediction"],
            rank=columns["rank"],
            fold=columns["fold"],
            before=before,
            after=after,
            ranking={s.key: columns[RANKING + s.key] for s in SCORES if RANKING + s.key in columns},
            compared=columns["compared"],
            tuning=Tuning(**tuning | {"split": HoldOut(**known_fields(path, HoldOut, split))}),
            source=source,
            real=columns.get("real"),
            optimum=optimum,
            **settings,
        )


def _refuse_other_numbers(
    images: int, expected: int | None, real_labels: Sequence[Sequence[int]] | None
) -> None:
    if expected is not None and images != expected:
        raise ValueError(
            f"expected {expected} images, got {images}: "
            "every image must be evaluated exactly once, on any number of ranks"
        )
    if real_labels is not None and len(real_labels) != images:
        raise ValueError(f"there are ReaL labels of {len(real_labels)} images, but {images} images")


def _sorted(
    names: StringArray, z: np.ndarray, y: IntArray
) -> tuple[IntArray, StringArray, np.ndarray, IntArray]:
    """The images sorted by id, so that no result depends on ranks or workers; and their places."""
    order = np.argsort(names, kind="stable")
    if (np.diff(order) != 1).any():  # a copy of 50,000 x 1,000 logits takes 200 MB
        z = z[order]
    return order, names[order], z, y[order]


def _at_optimum(z: np.ndarray, y: IntArray, found: Records, source: Source) -> Scores | None:
    """The scores at the images' own temperature, if theirs was fitted on images kept apart."""
    if not source.fitted_apart or source.own_temperature is None:
        return None
    return score_images(z, y, source.own_temperature).scores(found.correct)


def _named(
    source: Source, z: np.ndarray, y: np.ndarray, clean: Records | None, apart: Apart | None
) -> Source:
    """Return a source that says on which other images the temperature was fitted, if on any."""
    if clean is None and apart is None:
        return source
    source = with_own_temperature(source, z, y)
    if clean is not None:
        return replace(source, temperature_from=clean.source.name or "clean images")
    return replace(source, fitted_apart=True)


def _computed(scores: Mapping[str, ArrayLike], images: int) -> dict[str, FloatArray]:
    """The scores that need more than logits, after checks and in the order of the list."""
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
    """Whether each prediction is a ReaL label of its image; -1 if the image has none."""
    if labels is None:
        return None
    found = (
        int(guess in labels[image]) if len(labels[image]) else -1
        for image, guess in zip(order.tolist(), prediction.tolist(), strict=True)
    )
    return np.array(list(found), dtype=np.int64)
