"""One record per image: all that the report needs, without the logits."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from flatcal_dist.files import write_atomically

from .calibrators import fit_fold_temperatures
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
class Records:
    """One record per image, sorted by id.

    id: unique strings [N]. label, prediction, rank: int [N]; rank counts the classes placed
    before the label, so rank 0 is correct. fold [N]: cross-fitting fold. before, after: scores
    before and after temperature scaling, the latter with temperatures fitted on the other folds.
    temperature: fitted on all images. fold_temperatures: the one that scores each fold.
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
    ) -> "Records":
        """Build the records of logits [N, K] (floats), labels int [N] and ids [N].

        expected: the number of images that the data set holds. ValueError if the number differs,
        an id occurs twice (padding of a distributed loader was not removed), logits are not
        finite or labels out of range. Seed and folds decide the cross-fitting folds.
        """
        z, y = logits_and_labels(logits, labels)
        names = np.array([str(i) for i in ids])
        if len(names) != len(z):
            raise ValueError(f"ids and logits must have equal lengths, got {len(names)}, {len(z)}")
        _refuse_duplicates(names)
        if expected is not None and len(names) != expected:
            raise ValueError(
                f"expected {expected} images, got {len(names)}: "
                "every image must be evaluated exactly once, on whatever number of ranks"
            )
        order = np.argsort(names, kind="stable")  # so that no result depends on ranks or workers
        names, z, y = names[order], z[order], y[order]
        fit = fit_fold_temperatures(names.tolist(), z, y, folds, seed)
        before = score_images(z, y)
        # Dividing by T > 0 keeps the order of the classes; before rounding, so rank stays.
        after = score_images(z, y, fit.per_image)
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
        for suffix, scores in (("", self.before), ("_after_temperature", self.after)):
            columns["confidence" + suffix] = scores.confidence
            columns |= {name + suffix: getattr(scores, name) for name in SCORES}
        settings = {
            "classes": self.classes,
            "temperature": self.temperature,
            "fold_temperatures": self.fold_temperatures,
            "fold_seed": self.fold_seed,
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
        )


def _scores(images: ImageScores, correct: BoolArray) -> Scores:
    return Scores(correct, *(getattr(images, f.name) for f in fields(Scores)[1:]))


def _refuse_duplicates(names: np.ndarray) -> None:
    if len(np.unique(names)) == len(names):
        return
    repeated = [name for name, count in Counter(names.tolist()).items() if count > 1]
    raise ValueError(
        f"{len(repeated)} ids occur more than once, first {sorted(repeated)[0]!r}: "
        "drop the padding of the distributed loader before building records"
    )
