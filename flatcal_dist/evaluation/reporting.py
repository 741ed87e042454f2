"""Evaluation on all ranks. Each image is counted once, and one rank writes the report."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from flatcal_dist.calibration.after_training.people import against_people
from flatcal_dist.calibration.after_training.post_hoc import post_hoc
from flatcal_dist.calibration.checks import logits_and_labels
from flatcal_dist.calibration.confidence.score import Score
from flatcal_dist.calibration.pages.display import counted
from flatcal_dist.calibration.records.records import Records, Source
from flatcal_dist.calibration.records.temperatures import Apart
from flatcal_dist.calibration.report.model import Report
from flatcal_dist.calibration.shift.report import Shifted, save_shifted, write_shift
from flatcal_dist.calibration.shift.rows import Measured, measure
from flatcal_dist.calibration.softmax import score_images
from flatcal_dist.config import Config
from flatcal_dist.data import DataError, Index
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.sets.variants import DataSet, Variant, local_shards, open_variant
from flatcal_dist.evaluation.evaluated_images import refuse_seen
from flatcal_dist.evaluation.passes import Ensemble
from flatcal_dist.evaluation.predicting import (
    as_cropped,
    check_sources,
    gathered,
    known_images,
    of_features,
    predict,
    wanted_scores,
)
from flatcal_dist.evaluation.provenance import UNKNOWN, Provenance, describe
from flatcal_dist.evaluation.sharpness import refuse_ensemble, wanted_sharpness
from flatcal_dist.files import write_atomically
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.sharpness.measures import Options

ALL_CLASSES = "_all_classes"  # added to the name of a data set in which few classes compete


def evaluate(
    config: Config,
    module: nn.Module,
    data: DataSet,
    accelerator: Accelerator,
    *,
    clean: Records | None = None,
    apart: Index | None = None,
    logits_file: Path | None = None,
    scores: Sequence[Score] = (),
) -> tuple[Records, Records | None] | None:
    """Evaluate a network and return one record for each image.

    All ranks call this function. Where only a part of the classes compete (ImageNet-A and -R),
    there are second records, in which all classes of the network do.

    Args:
        config: The configuration of the network.
        module: The network, or an `Ensemble`.
        data: The images.
        accelerator: All its ranks take part.
        clean: For images under shift, the records of the clean images, whose temperature is used.
        apart: Training images that were never trained on, to fit the temperature on.
        logits_file: Where rank 0 writes the logits (npz: ids, labels, logits); None writes none.
        scores: Scores of confidence that need more than logits. Second records have none.

    Returns:
        The records and the second records (or None) on rank 0, and None on the other ranks.

    Raises:
        ConfigError: The network lacks what a score needs.
        FailedTogether: The ranks see different images, an image was not counted exactly once, or a
            logit is not finite. All ranks raise it.
    """
    check_sources(config, module, scores)
    _refuse_different_images(data)
    config = as_cropped(config, data)
    known = known_images(config, module, accelerator, scores, apart)
    if data.variant.corruption is None:  # corrupted images are never those of training
        look = partial(refuse_seen, config, data, scores, apart)
        on_all_ranks(look if accelerator.is_main_process else _nothing)
    own = predict(config, module, data.index, accelerator, scores, classes=data.classes)
    found = gathered(own)
    fitted_on = None if apart is None else gathered(predict(config, module, apart, accelerator))

    def merged() -> tuple[Records, Records | None] | None:
        if not accelerator.is_main_process:
            return None
        check_whole(data.index, found.samples, str(data.variant))
        _check_finite(data, found.logits)
        computed = found.scores | of_features(found, known, scores, data.classes)
        fit_on: Records | Apart | None = clean
        if apart is not None and fitted_on is not None:
            check_whole(apart, fitted_on.samples, "data.holdout")
            fit_on = Apart(apart.label.astype(np.int64), fitted_on.logits)
        probabilities = isinstance(module, Ensemble)
        return _records(config, data, found.logits, fit_on, logits_file, computed, probabilities)

    return on_all_ranks(merged)


def _nothing() -> None:
    """What ranks do while rank 0 looks at images."""


def _refuse_different_images(data: DataSet) -> None:
    """Raise DataError on all ranks if they see different images."""
    if len(set(gather_object([data.index.identity]))) > 1:
        raise DataError(
            f"{data.variant} holds other images on one rank than on another (names, sizes or "
            "labels differ): all machines must see the same files"
        )


def check_whole(index: ImageIndex, samples: np.ndarray, name: str) -> None:
    """Raise DataError if the images `name` were not evaluated once each."""
    if not np.array_equal(samples, np.arange(len(index))):
        raise DataError(
            f"{len(np.unique(samples))} different images were evaluated, {len(samples)} in all, "
            f"but {name} holds {len(index)}: the ranks do not see the same images"
        )


def _check_finite(data: DataSet, logits: np.ndarray) -> None:
    """Raise DataError with the name of an image if a logit is not finite, before scores fail."""
    try:
        logits_and_labels(logits, data.label, data.index.keys())
    except ValueError as error:
        raise DataError(f"{data.variant}: {error}") from None


def _records(
    config: Config,
    data: DataSet,
    logits: np.ndarray,
    fit_on: Records | Apart | None,
    logits_file: Path | None,
    scores: Mapping[str, np.ndarray],
    probabilities: bool,
) -> tuple[Records, Records | None]:
    ids, variant = data.index.keys(), data.variant
    apart = fit_on if isinstance(fit_on, Apart) else None
    competing = logits if data.classes is None else logits[:, list(data.classes)]
    if logits_file is not None:
        with write_atomically(logits_file) as temporary:
            np.savez(temporary, ids=np.array(ids), labels=data.label, logits=competing)

    def records(
        label: np.ndarray, logits: np.ndarray, source: Source, scores: Mapping[str, np.ndarray]
    ) -> Records:
        return Records.from_logits(
            ids=ids,
            labels=label,
            logits=logits,
            folds=config.evaluate.folds,
            clean=fit_on if isinstance(fit_on, Records) else None,
            apart=apart and _among(apart, source),
            source=source,
            real_labels=data.real,
            scores=scores,
        )

    source = Source(
        name=variant.name,
        kind=variant.kind,
        classes=data.classes,
        corruption=variant.corruption,
        severity=variant.severity,
        generated=variant.generated,
        probabilities=probabilities,
    )
    try:
        chosen = records(data.label, competing, source, scores)
        if not isinstance(fit_on, Records):
            others = apart and _among(apart, source)
            found = post_hoc(ids, data.label, competing, folds=config.evaluate.folds, apart=others)
            people = None if data.people is None else against_people(competing, data.people)
            chosen = replace(
                chosen, post_hoc=found, people=people,
                apart=score_images(others.logits, others.labels).scores() if others else None,
            )  # fmt: skip
        if data.classes is None:
            return chosen, None
        label = np.array(data.classes)[data.label]
        source = replace(source, name=f"{variant.name}{ALL_CLASSES}", classes=None)
        return chosen, records(label, logits, source, {})
    except ValueError as error:
        raise DataError(f"{variant}: {error}") from None


def _among(apart: Apart, source: Source) -> Apart:
    """Return the images of the classes that compete, with the logits of these classes."""
    if source.classes is None:
        return apart
    chosen = np.isin(apart.labels, source.classes)
    labels = np.searchsorted(source.classes, apart.labels[chosen])
    return Apart(labels, apart.logits[chosen][:, list(source.classes)])


def report(
    config: Config,
    module: nn.Module,
    data: DataSet,
    accelerator: Accelerator,
    output: Path,
    *,
    title: str | None = None,
    weights_file: Path | None = None,
    trained: Provenance = UNKNOWN,
    training: Sequence[Mapping[str, Any]] = (),
    logits_file: Path | None = None,
    class_names: Sequence[str] | None = None,
    apart: Index | None = None,
    sharpness: Options | None = None,
) -> tuple[Records, Report] | None:
    """Evaluate on all ranks, and write the report on rank 0.

    What `output` holds of data under shift is deleted: it belongs to an older evaluation.

    Args:
        config: The configuration of the network.
        module: The network, or an `Ensemble`.
        data: The images.
        accelerator: All its ranks take part.
        output: The directory of the report.
        title: The title of the report; by default the name of the directory above `output`.
        weights_file: The file of the weights, whose hash the report names.
        trained, training: How the network was trained, and the records of its metrics.jsonl.
        class_names: The names of the classes, if the data do not tell them.
        logits_file, apart: See `evaluate`.
        sharpness: How to measure sharpness; None does not measure it.

    Returns:
        The records and the metrics on rank 0, and None on the other ranks.

    Raises:
        ConfigError, FailedTogether, MeasureError: See `evaluate` and `evaluation.sharpness`.
    """
    refuse_ensemble(module, sharpness)
    found = evaluate(
        config, module, data, accelerator,
        apart=apart, logits_file=logits_file, scores=wanted_scores(config, module),
    )  # fmt: skip
    measured = wanted_sharpness(config, module, data, accelerator, sharpness)

    def written() -> tuple[Records, Report] | None:
        if found is None:
            return None
        _forget_shift(output)
        named = title or output.parent.name
        about = describe(config, module, data, accelerator, named, weights_file, trained)
        about = about if class_names is None else replace(about, class_names=list(class_names))
        records, all_classes = found
        return records, _write(
            records, output, about, all_classes=all_classes, image_of=_image_of(data),
            training=training, sharpness=measured,
        )  # fmt: skip

    return on_all_ranks(written)


def _forget_shift(output: Path) -> None:
    """Delete what an older evaluation measured under shift."""
    (output / "shift.json").unlink(missing_ok=True)
    shutil.rmtree(output / "shift", ignore_errors=True)


def _image_of(data: DataSet) -> Callable[[str], bytes | None]:
    """Return a function from a key to its encoded image, or None if it cannot be read."""
    number = {key: sample for sample, key in enumerate(data.index.keys())}

    def image(key: str) -> bytes | None:
        try:
            return bytes(data.index.read(number[key]))
        except DataError:
            return None

    return image


def report_shift(
    config: Config,
    module: nn.Module,
    variants: Sequence[Variant],
    accelerator: Accelerator,
    output: Path,
    clean: Records | None,
    clean_identity: str,
    open_shards: Callable[[str, int], Index] = local_shards,
) -> None:
    """Evaluate on data under shift with the temperature of the clean images, after `report`.

    All ranks call this function. Where only a part of the classes compete, there is a second row,
    NAME_all_classes, in which all classes do. Records and `shift.json` are written after each data
    set, and the page is written again at the end.

    Args:
        config: The configuration of the network.
        module: The network.
        variants: The data sets under shift.
        accelerator: All its ranks take part.
        output: The directory of the report.
        clean: The records of the clean images, on rank 0.
        clean_identity: The identity of the clean images.
        open_shards: It opens shards.

    Raises:
        FailedTogether: `evaluate` raises it, or the subsets of an ImageNet-C do not hold the same
            images.
    """
    rows: list[Measured] = []
    clean_row: list[Measured] = []  # measured once, on rank 0
    first: dict[str, DataSet] = {}
    for variant in variants:

        def opened(variant: Variant = variant) -> DataSet:
            data = open_variant(variant, config.model.num_classes, None, open_shards)
            other = first.setdefault(variant.name, data)
            if len(data.index) != len(other.index):
                raise DataError(
                    f"{data.variant} holds {len(data.index)} images, {other.variant} "
                    f"{len(other.index)}: they are corruptions of the same ones. Unpack it again"
                )
            if variant.kind == "cifar_c" and clean is not None:
                _refuse_other_labels(data, clean)
            return data

        data = on_all_ranks(opened)
        found = evaluate(config, module, data, accelerator, clean=clean)

        def written(found: Any = found, data: DataSet = data) -> None:
            for records in found or ():
                if records is None or clean is None:
                    continue
                rows.append(save_shifted(Shifted(records, data.identity), output))
                if not clean_row:
                    clean_row.append(measure(clean, clean_identity, Path("records.parquet")))
                write_shift(clean_row[0], rows, output)
                print(_line(data.variant, rows[-1].row))

        on_all_ranks(written)
    on_all_ranks(lambda: _render(output) if clean is not None else None)


def _refuse_other_labels(data: DataSet, clean: Records) -> None:
    """Raise DataError if images of the same names have other labels than the clean ones."""
    known = dict(zip(clean.id, clean.label.tolist(), strict=True))
    names = zip(data.index.keys(), data.label.tolist(), strict=True)
    pairs = [(known[name], label) for name, label in names if name in known]
    if wrong := sum(one != other for one, other in pairs):
        raise DataError(
            f"{data.variant}: labels.npy has other labels than the clean test images for {wrong} "
            f"of {len(pairs)} of them: it is of other images, or in another order. Unpack it again"
        )


def _write(*arguments: Any, **options: Any) -> Report:
    """As `write_report`, which imports matplotlib: rank 0 alone does so."""
    from flatcal_dist.calibration.report.writing import write_report

    return write_report(*arguments, **options)


def _render(output: Path) -> None:
    from flatcal_dist.calibration.report.writing import render_report

    render_report(output)


def _line(variant: Variant, figures: dict[str, Any]) -> str:
    before, after = figures["before"], figures["after"]
    generated = " (generated)" if variant.generated else ""
    generated += " among all classes" * figures["name"].endswith(ALL_CLASSES)
    return (
        f"{variant}{generated}: {counted(figures['images'], 'image')}, accuracy "
        f"{before['accuracy']:.4f}, ECE {before['ece']:.4f}, with the clean temperature "
        f"{after['ece']:.4f}"
    )
