"""One record per image: all that the report needs, without the logits."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from flatcal_dist.files import write_atomically

from .calibrators import FoldTemperatures, TemperatureScaling, fit_fold_temperatures, fold_of
from .checks import BoolArray, FloatArray, IntArray, logits_and_labels
from .softmax import ImageScores, score_images

METADATA_KEY = b"flatcal_dist.records"
SCORES = ("log_confidence", "nll", "brier", "entropy")


@dataclass(frozen=True)
class Scores:
    """What the network says of each image, before or after temperature scaling; all [N].

    log_confidence ranks images (it does not saturate); `confidence` is its exponential. nll and
    entropy in nats; brier over all classes, in [0, 2].
    """

    correct: BoolArray
    log_confidence: FloatArray
    nll: FloatArray
    brier: FloatArray
    entropy: FloatArray

    @property
    def confidence(self) -> FloatArray:
        return np.exp(self.log_confidence)


@dataclass(frozen=True)
class Source:
    """Which images these are, and what was done to them.

    name: of the data set. kind: as in `data.variants`. classes: the network's classes among which
    it had to choose (ImageNet-A and -R: 200 of them, all other logits left out before the softmax);
    labels and predictions of the records number this list. None: all classes. corruption, severity:
    of ImageNet-C. generated: the corruption was applied by us, not published as files.
    temperature_from: name of the data whose temperature scales these records; None: their own,
    cross-fitted. own_temperature: fitted on all of these images, with their labels; where
    temperature_from is set it is there to compare with, and scales nothing.
    """

    name: str | None = None
    kind: str | None = None
    classes: tuple[int, ...] | None = None
    corruption: str | None = None
    severity: int | None = None
    generated: bool = False
    temperature_from: str | None = None
    own_temperature: float | None = None


@dataclass(frozen=True)
class Records:
    """One record per image, sorted by id.

    id: unique strings [N]. label, prediction, rank: int [N]; rank counts the classes placed
    before the label, so rank 0 is correct. fold [N]: cross-fitting fold. before, after: scores
    before and after temperature scaling, the latter with temperatures fitted on the other folds.
    temperature: fitted on all images. fold_temperatures: the one that scores each fold. Of images
    under shift (`source.temperature_from`) both are those of the clean images. real [N], or None
    where there are no ReaL labels: 1 if the prediction is one of the image's ReaL labels, 0 if
    not, -1 if the image has none and stays out of figures on ReaL.
    """

    id: np.ndarray
    label: IntArray
    prediction: IntArray
    rank: IntArray
    fold: IntArray
    before: Scores
    after: Scores
    classes: int
    temperature: float
    fold_temperatures: tuple[float | None, ...]
    fold_seed: int
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

    @classmethod
    def from_logits(
        cls,
        ids: Sequence[str],
        labels: ArrayLike,
        logits: ArrayLike,
        *,
        expected: int | None = None,
        folds: int = 5,
        seed: int = 0,
        clean: "Records | None" = None,
        source: Source = Source(),
        real_labels: Sequence[Sequence[int]] | None = None,
    ) -> "Records":
        """Build the records of logits [N, K] (floats), labels int [N] and ids [N].

        expected: the number of images that the data set holds. ValueError if the number differs,
        an id occurs twice (padding of a distributed loader was not removed), logits are not
        finite or labels out of range. Seed and folds decide the cross-fitting folds.

        clean: of images under shift, the same network's records of the clean ones, whose
        temperatures are used (and whose folds): that of its fold for an image that is among the
        clean ones (ImageNet-C), the overall one for any other. real_labels: per image the ReaL
        labels, possibly none, in the same order as ids.
        """
        names, z = np.array([str(i) for i in ids]), np.asarray(logits)
        if len(names) != len(z):
            raise ValueError(f"ids and logits must have equal lengths, got {len(names)}, {len(z)}")
        z, y = logits_and_labels(z, labels, names)
        _refuse_duplicates(names)
        if expected is not None and len(names) != expected:
            raise ValueError(
                f"expected {expected} images, got {len(names)}: "
                "every image must be evaluated exactly once, on whatever number of ranks"
            )
        order = np.argsort(names, kind="stable")  # so that no result depends on ranks or workers
        names, z, y = names[order], z[order], y[order]
        if clean is None:
            fit = fit_fold_temperatures(names.tolist(), z, y, folds, seed)
            per_image = fit.per_image
        else:
            folds, seed = len(clean.fold_temperatures), clean.fold_seed
            fold = fold_of(names.tolist(), folds, seed)
            fit = FoldTemperatures(fold, clean.fold_temperatures, clean.temperature)
            per_image = np.where(np.isin(names, clean.id), fit.per_image, clean.temperature)
            own = TemperatureScaling().fit(z, y).temperature
            source = replace(
                source, temperature_from=clean.source.name or "clean images", own_temperature=own
            )
        before = score_images(z, y)
        # Dividing by T > 0 keeps the order of the classes; before rounding, so rank stays.
        after = score_images(z, y, per_image)
        return cls(
            id=names,
            label=y,
            prediction=before.prediction,
            rank=before.rank,
            fold=fit.fold,
            before=_scores(before, before.correct),
            after=_scores(after, before.correct),
            classes=z.shape[1],
            temperature=fit.temperature,
            fold_temperatures=fit.per_fold,
            fold_seed=seed,
            source=source,
            real=_real(real_labels, order, before.prediction),
        )

    def save(self, path: Path) -> None:
        """Write parquet: one row per image, scalars only; appears whole or not at all."""
        columns = {
            "id": pa.array(self.id.tolist(), pa.string()),
            "label": self.label.astype(np.int32),
            "prediction": self.prediction.astype(np.int32),
            "rank": self.rank.astype(np.int32),
            "correct": self.correct,
            "fold": self.fold.astype(np.int16),
        }
        if self.real is not None:
            columns["real"] = self.real.astype(np.int8)
        for suffix, scores in (("", self.before), ("_after_temperature", self.after)):
            columns["confidence" + suffix] = scores.confidence
            columns |= {name + suffix: getattr(scores, name) for name in SCORES}
        settings = {
            "classes": self.classes,
            "temperature": self.temperature,
            "fold_temperatures": self.fold_temperatures,
            "fold_seed": self.fold_seed,
            "source": asdict(self.source),
        }
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
        return cls(
            id=np.array(table["id"].to_pylist()),
            label=column("label", np.int64),
            prediction=column("prediction", np.int64),
            rank=rank,
            fold=column("fold", np.int64),
            before=before,
            after=after,
            classes=settings["classes"],
            temperature=settings["temperature"],
            fold_temperatures=tuple(settings["fold_temperatures"]),
            fold_seed=settings["fold_seed"],
            source=_source(settings.get("source", {})),
            real=column("real", np.int64) if "real" in table.column_names else None,
        )


def _scores(images: ImageScores, correct: BoolArray) -> Scores:
    return Scores(correct, *(getattr(images, f.name) for f in fields(Scores)[1:]))


def _source(stored: dict) -> Source:
    classes = stored.get("classes")
    return Source(**stored | {"classes": None if classes is None else tuple(classes)})


def _real(
    labels: Sequence[Sequence[int]] | None, order: IntArray, prediction: IntArray
) -> IntArray | None:
    """Whether each prediction is among its image's ReaL labels; -1 where there are none."""
    if labels is None:
        return None
    if len(labels) != len(order):
        raise ValueError(f"there are ReaL labels of {len(labels)} images, but {len(order)} images")
    found = (
        int(guess in labels[image]) if len(labels[image]) else -1
        for image, guess in zip(order.tolist(), prediction.tolist(), strict=True)
    )
    return np.array(list(found), dtype=np.int64)


def _refuse_duplicates(names: np.ndarray) -> None:
    if len(np.unique(names)) == len(names):
        return
    repeated = [name for name, count in Counter(names.tolist()).items() if count > 1]
    raise ValueError(
        f"{len(repeated)} ids occur more than once, first {sorted(repeated)[0]!r}: "
        "drop the padding of the distributed loader before building records"
    )
