"""Evaluation on every rank: each image is counted once, and the report is written by one rank."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from flatcal_dist import inputs
from flatcal_dist.calibration.metrics import equal_width_index
from flatcal_dist.calibration.records import Records
from flatcal_dist.calibration.report import write_report
from flatcal_dist.calibration.softmax import score_images
from flatcal_dist.calibration.summary import About
from flatcal_dist.config import Config
from flatcal_dist.data import DataError, Index
from flatcal_dist.environment import describe_environment
from flatcal_dist.models import parameter_count
from flatcal_dist.weights import sha256

BINS = 15  # of the ECE, as in the report


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
    training = module.training
    module.eval()
    with accelerator.autocast():
        for batch in batches:
            images = normalize(batch.images.to(accelerator.device, non_blocking=True))
            output = module(images).float()
            valid = batch.valid
            samples.append(batch.samples[valid].numpy())
            logits.append(output[valid.to(output.device)].cpu().numpy())
    module.train(training)
    return np.concatenate(samples), np.concatenate(logits)


def evaluate(
    config: Config, module: nn.Module, index: Index, accelerator: Accelerator
) -> Records | None:
    """One record per image, merged on rank 0; None on the other ranks. Called by all of them.

    Raises DataError, on rank 0, unless every image of the index was counted exactly once.
    """
    samples, logits = predict(config, module, index, accelerator)
    parts = gather_object([(samples, logits)])
    if not accelerator.is_main_process:
        return None
    samples = np.concatenate([part[0] for part in parts])
    logits = np.concatenate([part[1] for part in parts])
    order = np.argsort(samples, kind="stable")
    if not np.array_equal(samples[order], np.arange(len(index))):
        raise DataError(
            f"{len(np.unique(samples))} different images were evaluated, {len(samples)} in all, "
            f"but the index holds {len(index)}: the ranks do not see the same shards"
        )
    return Records.from_logits(
        ids=index.keys(),
        labels=index.label,
        logits=logits[order],
        folds=config.evaluate.folds,
    )


def report(
    config: Config,
    module: nn.Module,
    index: Index,
    accelerator: Accelerator,
    output: Path,
    *,
    weights_file: Path | None = None,
    training_seconds: float | None = None,
) -> dict[str, Any] | None:
    """Evaluate on all ranks; on rank 0 write the report into `output` and return its metrics."""
    records = evaluate(config, module, index, accelerator)
    if records is None:
        return None
    sharpness = config.sharpness
    about = About(
        title=output.parent.name,
        model=config.model.name,
        method=config.optimizer.name if sharpness.rule == "none" else sharpness.rule,
        rho=None if sharpness.rule == "none" else sharpness.rho,
        gamma=sharpness.gamma if sharpness.rule == "csam" else None,
        seed=config.run.seed,
        data=f"{config.data.validation} ({index.identity[:16]})",
        image_size=config.data.image_size,
        crop_pct=config.data.crop_pct,
        interpolation=config.data.interpolation,
        parameters=parameter_count(module),
        checkpoint=sha256(weights_file) if weights_file else None,
        precision=config.train.precision,
        engine=config.train.engine,
        world_size=accelerator.num_processes,
        training_seconds=training_seconds,
        versions=describe_environment()["packages"],
        configuration=config.model_dump(),
    )
    return write_report(records, output, about)


def running_metrics(
    config: Config, module: nn.Module, index: Index, accelerator: Accelerator
) -> dict[str, float]:
    """Accuracy, NLL, ECE and signed gap over all ranks, from sums alone; called by all of them.

    The same figures as the report's, to rounding. NaN when some logit is not finite.
    """
    samples, logits = predict(config, module, index, accelerator)
    sums = np.zeros((4, BINS))  # per bin: images, confidence, correct, NLL
    if np.isfinite(logits).all():
        scores = score_images(logits, index.label[samples]) if len(samples) else None
        if scores is not None:
            bins = equal_width_index(scores.confidence, BINS)
            for row, values in enumerate((None, scores.confidence, scores.correct, scores.nll)):
                sums[row] = np.bincount(bins, weights=values, minlength=BINS)
    else:
        sums[:] = np.nan
    total = torch.from_numpy(sums).to(accelerator.device)
    if accelerator.num_processes > 1:
        dist.all_reduce(total)
    images, confidence, correct, nll = total.cpu().numpy()
    count = images.sum()
    return {
        "val/accuracy": float(correct.sum() / count),
        "val/nll": float(nll.sum() / count),
        "val/ece": float(np.abs(confidence - correct).sum() / count),
        "val/signed_gap": float((confidence.sum() - correct.sum()) / count),
    }
