"""Evaluation on every rank: each image is counted once, and the report is written by one rank."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from flatcal_dist import inputs
from flatcal_dist.calibration.binned import BinnedEvaluation
from flatcal_dist.calibration.records import Records, Source
from flatcal_dist.calibration.report import render_report, write_report
from flatcal_dist.calibration.shift import Shifted, row, save_shifted, write_shift
from flatcal_dist.calibration.summary import About
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.data import DataError, Index
from flatcal_dist.data.variants import DataSet, Variant, local_shards, open_variant
from flatcal_dist.distributed import on_all_ranks
from flatcal_dist.environment import describe_environment
from flatcal_dist.files import write_atomically
from flatcal_dist.models import in_evaluation_mode, parameter_count
from flatcal_dist.sharpness.outputs import logits_of
from flatcal_dist.weights import sha256, weights_hash


@torch.inference_mode()
def predict(
    config: Config, module: nn.Module, index: Index, accelerator: Accelerator
) -> tuple[np.ndarray, np.ndarray]:
    """This rank's sample numbers [n] and logits [n, K] float32, padding left out."""
    normalize = inputs.normalization(config.data).to(accelerator.device)
    batches = inputs.evaluation_batches(
        config,
        index,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device.type == "cuda",
    )
    samples, logits = [], []
    with in_evaluation_mode(module), accelerator.autocast():
        for batch in batches:
            images = normalize(batch.images.to(accelerator.device, non_blocking=True))
            output = logits_of(module(images)).float()
            if output.shape[1] != config.model.num_classes:
                raise ConfigError(
                    f"the network gives {output.shape[1]} logits, but model.num_classes="
                    f"{config.model.num_classes}"
                )
            valid = batch.valid
            samples.append(batch.samples[valid].numpy())
            logits.append(output[valid.to(output.device)].cpu().numpy())
    return np.concatenate(samples), np.concatenate(logits)


def evaluate(
    config: Config,
    module: nn.Module,
    data: DataSet,
    accelerator: Accelerator,
    *,
    clean: Records | None = None,
    logits_file: Path | None = None,
) -> Records | None:
    """One record per image, merged on rank 0; None on the other ranks. Called by all of them.

    clean: of images under shift, the records of the clean ones, whose temperature is used.
    logits_file: also write the logits there (npz: ids, labels, logits), on rank 0.

    Raises FailedTogether on all ranks unless all of them see the same images and every one was
    counted exactly once, or if a logit is not finite.
    """
    identities = set(gather_object([data.index.identity]))
    if len(identities) > 1:
        raise DataError(
            f"{data.variant} holds other images on one rank than on another (names, sizes or "
            "labels differ): all machines must see the same files"
        )
    if data.cropped:  # at the network's size, but not zoomed into
        cut = config.data.model_copy(update={"crop_pct": 1.0})
        config = config.model_copy(update={"data": cut})
    samples, logits = predict(config, module, data.index, accelerator)
    if data.classes is not None:
        logits = logits[:, list(data.classes)]
    parts = gather_object([(samples, logits)])

    def merged() -> Records | None:
        if not accelerator.is_main_process:
            return None
        return _merge(config, data, parts, clean, logits_file)

    return on_all_ranks(merged)


def _merge(
    config: Config,
    data: DataSet,
    parts: list[tuple[np.ndarray, np.ndarray]],
    clean: Records | None,
    logits_file: Path | None,
) -> Records:
    samples = np.concatenate([part[0] for part in parts])
    logits = np.concatenate([part[1] for part in parts])
    order = np.argsort(samples, kind="stable")
    if not np.array_equal(samples[order], np.arange(len(data.index))):
        raise DataError(
            f"{len(np.unique(samples))} different images were evaluated, {len(samples)} in all, "
            f"but {data.variant} holds {len(data.index)}: the ranks do not see the same images"
        )
    logits, ids, variant = logits[order], data.index.keys(), data.variant
    if logits_file is not None:
        with write_atomically(logits_file) as temporary:
            np.savez(temporary, ids=np.array(ids), labels=data.label, logits=logits)
    try:
        return Records.from_logits(
            ids=ids,
            labels=data.label,
            logits=logits,
            folds=config.evaluate.folds,
            clean=clean,
            source=Source(
                name=variant.name,
                kind=variant.kind,
                classes=data.classes,
                corruption=variant.corruption,
                severity=variant.severity,
                generated=variant.generated,
            ),
            real_labels=data.real,
        )
    except ValueError as error:
        raise DataError(f"{variant}: {error}") from None


def report(
    config: Config,
    module: nn.Module,
    data: DataSet,
    accelerator: Accelerator,
    output: Path,
    *,
    title: str | None = None,
    weights_file: Path | None = None,
    training_seconds: float | None = None,
    training: Sequence[Mapping[str, Any]] = (),
    logits_file: Path | None = None,
) -> tuple[Records, dict[str, Any]] | None:
    """Evaluate on all ranks; on rank 0 write the report into `output`; its records and metrics.

    training: the records of the run's metrics.jsonl, for the curves over epochs. A table of data
    under shift that lies there is deleted: it belongs to an older evaluation.
    """
    records = evaluate(config, module, data, accelerator, logits_file=logits_file)

    def written() -> tuple[Records, dict[str, Any]] | None:
        if records is None:
            return None
        (output / "shift.json").unlink(missing_ok=True)
        shutil.rmtree(output / "shift", ignore_errors=True)
        about = _about(
            config, module, data, accelerator, title or output.parent.name, weights_file,
            training_seconds,
        )  # fmt: skip
        image_of = _image_of(data)
        return records, write_report(records, output, about, image_of=image_of, training=training)

    return on_all_ranks(written)


def _image_of(data: DataSet) -> Callable[[str], bytes | None]:
    """What gives the encoded image of a key, or None where it cannot be read."""
    number = {key: sample for sample, key in enumerate(data.index.keys())}

    def image(key: str) -> bytes | None:
        try:
            return bytes(data.index.read(number[key]))
        except DataError:
            return None

    return image


def _about(
    config: Config,
    module: nn.Module,
    data: DataSet,
    accelerator: Accelerator,
    title: str,
    weights_file: Path | None,
    training_seconds: float | None,
) -> About:
    sharpness = config.sharpness
    return About(
        title=title,
        model=config.model.name,
        method=config.optimizer.name if sharpness.rule == "none" else sharpness.rule,
        rho=None if sharpness.rule == "none" else sharpness.rho,
        gamma=sharpness.gamma if sharpness.rule == "csam" else None,
        seed=config.run.seed,
        data=f"{data.variant.path} ({data.index.identity[:16]})",
        data_identity=data.index.identity,
        class_names=data.class_names,
        image_size=config.data.image_size,
        crop_pct=config.data.crop_pct,
        interpolation=config.data.interpolation,
        parameters=parameter_count(module),
        checkpoint=sha256(weights_file) if weights_file else weights_hash(module),
        precision=config.train.precision,
        engine=config.train.engine,
        world_size=accelerator.num_processes,
        training_seconds=training_seconds,
        versions=describe_environment()["packages"],
        configuration=config.model_dump(),
    )


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

    Called by all ranks; clean: its records, on rank 0. Writes records and `shift.json` after each
    data set, and the page again at the end. Raises FailedTogether where `evaluate` does, and for
    an ImageNet-C whose subsets do not hold the same images.
    """
    rows: list[dict[str, Any]] = []
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
            return data

        data = on_all_ranks(opened)
        records = evaluate(config, module, data, accelerator, clean=clean)

        def written(records: Records | None = records, data: DataSet = data) -> None:
            if records is None:
                return
            rows.append(save_shifted(Shifted(records, data.index.identity), output))
            write_shift(row(clean, clean_identity, Path("records.parquet")), rows, output)
            print(_line(data.variant, rows[-1]))

        on_all_ranks(written)
    on_all_ranks(lambda: render_report(output) if clean is not None else None)


def _line(variant: Variant, figures: dict[str, Any]) -> str:
    before, after = figures["before"], figures["after"]
    generated = " (generated)" if variant.generated else ""
    return (
        f"{variant}{generated}: {figures['images']} images, accuracy {before['accuracy']:.4f}, ECE "
        f"{before['ece']:.4f}, with the clean temperature {after['ece']:.4f}"
    )


def running_metrics(
    config: Config, module: nn.Module, index: Index, accelerator: Accelerator
) -> dict[str, float]:
    """Calibration, failure prediction and entropy over all ranks, from sums alone; called by all.

    The report's figures, to rounding, AUROC and the areas within their binning error. NaN where
    undefined, and everywhere when some logit is not finite.
    """
    samples, logits = predict(config, module, index, accelerator)
    binned = BinnedEvaluation()
    if len(samples):
        binned.add(logits, index.label[samples])
    if accelerator.num_processes > 1:
        total = torch.from_numpy(binned.state).to(accelerator.device)
        dist.all_reduce(total)
        binned.state[:] = total.cpu().numpy()
    figures = vars(binned.figures())
    return {
        f"val/{name}": math.nan if value is None else value
        for name, value in figures.items()
        if name not in ("images", "not_finite") and not name.endswith("_error")
    }
