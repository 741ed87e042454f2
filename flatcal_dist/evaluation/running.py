"""The figures of a validation during training, without a report."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from flatcal_dist import inputs
from flatcal_dist.calibration.calibrators.refinement import refined_nll
from flatcal_dist.calibration.metrics.binned import BinnedEvaluation
from flatcal_dist.config import Config
from flatcal_dist.data import EvaluationBatch, Index
from flatcal_dist.data.loading.memory import HeldBatches
from flatcal_dist.evaluation.predicting import Prediction, gathered, predict
from flatcal_dist.evaluation.reporting import check_whole
from flatcal_dist.ranks.distributed import on_all_ranks, said_by_rank_0


def held_validation(
    config: Config, index: Index, accelerator: Accelerator
) -> Iterable[EvaluationBatch] | None:
    """Return the batches of all validations if `data.reader=memory` holds them, else None.

    Nothing is read before the first validation.
    """
    if config.data.reader != "memory":
        return None
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return HeldBatches(inputs.evaluation_batches(config, index, rank, world_size, False))


def running_metrics(
    config: Config,
    module: nn.Module,
    index: Index,
    accelerator: Accelerator,
    batches: Iterable[EvaluationBatch] | None = None,
) -> dict[str, float]:
    """Return calibration, failure prediction and entropy over all ranks, from sums alone.

    All ranks call this function. The figures are those of the report up to rounding; AUROC and the
    areas have an error of binning. A figure is NaN where it is undefined. All figures are NaN if a
    logit is not finite. With `train.keep_best=refined_nll` the logits of all ranks are gathered.

    Args:
        config: The configuration of the network.
        module: The network.
        index: The images.
        accelerator: All its ranks take part.
        batches: This rank's batches of the images; None loads them.
    """
    found = predict(config, module, index, accelerator, batches=batches)
    binned = BinnedEvaluation()
    if len(found.samples):
        binned.add(found.logits, index.label[found.samples])
    if accelerator.num_processes > 1:
        total = torch.from_numpy(binned.state).to(accelerator.device)
        dist.all_reduce(total)
        binned.state[:] = total.cpu().numpy()
    figures = vars(binned.figures())
    refined = {}
    if config.train.keep_best == "refined_nll":
        refined = {"val/refined_nll": _refined_nll(config, found, index)}
    return refined | {
        f"val/{name}": math.nan if value is None else value
        for name, value in figures.items()
        if name not in ("images", "not_finite") and not name.endswith("_error")
    }


def _refined_nll(config: Config, own: Prediction, index: Index) -> float:
    """The NLL after cross-fitted temperature of all ranks' images, on every rank.

    Rank 0 computes it from all logits, in the order of the images. So it does not depend on the
    number of ranks.
    """
    found = gathered(own)

    def computed() -> float:
        if dist.is_initialized() and dist.get_rank():
            return math.nan
        check_whole(index, found.samples, "data.validation")
        return refined_nll(index.keys(), found.logits, index.label, config.evaluate.folds)

    return said_by_rank_0(on_all_ranks(computed))
