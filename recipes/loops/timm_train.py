"""SAM in timm's train.py, which stays as it is.

    python recipes/loops/timm_train.py TIMM/train.py --rho 0.05 --data-dir IMAGES ...

TIMM is a checkout of the timm that is installed; its package does not hold train.py. All options of
train.py stay. What changes is the function that trains for one epoch: this script puts the one
below in its place. To edit train.py instead, see README.md beside this file.
"""

import importlib.util
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Epochs:
    """Takes the place of `train_one_epoch`. One step serves all epochs, so an object keeps it."""

    def __init__(self) -> None:
        self.step: SharpnessAwareStep | None = None

    def __call__(
        self,
        epoch: int,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        args: Namespace,
        *,
        task: TrainingTask,
        device: torch.device,
        amp_autocast: Callable[[], AbstractContextManager],
        lr_scheduler: Any = None,
        mixup_fn: Any = None,
        model_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> dict[str, float]:
        refuse(args, options)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            for mixes in (loader, mixup_fn):  # whichever of the two does
                if hasattr(mixes, "mixup_enabled"):
                    mixes.mixup_enabled = False

        # New: the step, around the module that train.py wrapped in DistributedDataParallel. In
        # float16 it scales losses itself; train.py's loss_scaler is not used.
        network = task.get_trainable_module()
        if self.step is None:
            dtype = DTYPES[args.amp_dtype] if args.amp else torch.float32
            engine = ReplicatedEngine(network, optimizer, compute_dtype=dtype)
            self.step = SharpnessAwareStep(engine, SAM(args.rho), clip_norm=args.clip_grad)

        def forward(_: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
            """New: what train.py does at w, for both passes. Its task calls `network`."""
            with amp_autocast():
                result = task(*batch)
            return {"losses": result["loss"], "weight": len(batch[0])}  # a mean, and of how many

        network.train()
        losses = []
        count = -(-len(loader) // args.grad_accum_steps)
        for update, batches in enumerate(grouped(loader, args.grad_accum_steps), epoch * count + 1):
            if not args.prefetcher:
                batches = [(x.to(device, model_dtype), y.to(device)) for x, y in batches]
                batches = [mixup_fn(x, y) if mixup_fn else (x, y) for x, y in batches]
            if args.channels_last:
                batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
            # Before: forward and backward for each batch under `no_sync`, the loss divided by their
            # number, clipping, loss_scaler or optimizer.step(), optimizer.zero_grad().
            result = self.step(batches, forward=forward)
            losses.append(result.loss)  # over all ranks already
            task.update_ema(step=update)
            average = sum(losses) / len(losses)
            if args.rank == 0 and (update - 1) % args.log_interval == 0:
                logging.info("Train: %d [%d] loss %.4f (%.4f)", epoch, update, result.loss, average)
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=update, metric=average)
        return {"loss": average}


def grouped(loader: Any, size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches of each step; the last may have fewer."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def refuse(args: Namespace, options: dict[str, Any]) -> None:
    """Ends the program for options of train.py that this loop would pass over in silence."""
    if options.get("naflex_mode") or options.get("scheduled_batch_mode"):
        sys.exit("error: this loop does not weigh the losses of batches of different sizes")
    if options.get("model_ema") is not None:
        sys.exit("error: train.py is older than timm 1.0.28, and would want the EMA updated here")
    if args.clip_grad is not None and args.clip_mode != "norm":
        sys.exit(f"error: the step clips by norm: --clip-mode {args.clip_mode} is another way")
    if args.recovery_interval:
        sys.exit("error: this loop saves after whole epochs only: leave --recovery-interval out")


def load(path: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location("train", path)
    train = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(train)
    if not all(hasattr(train, name) for name in ("parser", "train_one_epoch", "main")):
        sys.exit(f"error: {path} is not train.py of timm 1.0.28 or newer")
    return train


def main() -> None:
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        sys.exit("usage: timm_train.py TIMM/train.py [--rho RHO] [options of train.py]")
    train = load(sys.argv.pop(1))
    train.parser.add_argument("--rho", type=float, default=0.05, help="length of e, SAM's radius")
    train.train_one_epoch = Epochs()
    train.main()


if __name__ == "__main__":
    main()
