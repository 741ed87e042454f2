"""Stands for timm's train.py, which is in no package: the same calls of timm, and nothing else.

It has what recipes/loops/timm_train.py relies on: `parser`, `main`, and a global `train_one_epoch`
that is called with the arguments that train.py gives it. `main` saves the same checkpoint.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import init_distributed_device

parser = argparse.ArgumentParser()
for name in ("data-dir", "model", "initial-checkpoint", "output", "opt", "sched"):
    parser.add_argument(f"--{name}")
for name in ("batch-size", "num-classes", "img-size", "epochs", "grad-accum-steps", "workers"):
    parser.add_argument(f"--{name}", type=int, default=1)
for name in ("weight-decay", "warmup-epochs", "smoothing"):
    parser.add_argument(f"--{name}", type=float)
for name in ("no-aug", "no-prefetcher"):
    parser.add_argument(f"--{name}", action="store_true")
parser.add_argument("--lr", type=float)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--recovery-interval", type=int, default=0)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--amp-dtype", default="float16")
parser.add_argument("--clip-mode", default="norm")
parser.add_argument("--naflex-loader", action="store_true")
parser.set_defaults(channels_last=False, mixup_off_epoch=0, log_interval=50)
parser.add_argument("--device")
parser.set_defaults(prefetcher=False)


def train_one_epoch(*_: object, **__: object) -> dict[str, float]:
    raise AssertionError("the script was to put its own in this place")


def main() -> None:
    args = parser.parse_args()
    device = init_distributed_device(args)  # sets args.distributed, rank and world_size
    torch.manual_seed(42 + args.rank)
    size = (3, args.img_size, args.img_size)
    model = create_model(
        args.model,
        num_classes=args.num_classes,
        checkpoint_path=args.initial_checkpoint,
    )
    loader = create_loader(
        create_dataset("", root=args.data_dir, split="train", is_training=True),
        input_size=size,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        mean=model.pretrained_cfg["mean"],
        std=model.pretrained_cfg["std"],
        num_workers=args.workers,
        distributed=args.distributed,
        use_prefetcher=False,
        device=device,
    )
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler, _ = create_scheduler_v2(optimizer, sched=args.sched, num_epochs=args.epochs)
    task = ClassificationTask(
        model, torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing), device=device
    )
    if args.distributed:
        task.prepare_distributed()
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[args.amp_dtype]
    for epoch in range(args.epochs):
        metrics = train_one_epoch(
            epoch,
            task.get_trainable_module(),
            loader,
            optimizer,
            args,
            task=task,
            device=device,
            lr_scheduler=scheduler,
            saver=None,
            output_dir=args.output,
            amp_autocast=partial(torch.autocast, "cpu", dtype) if args.amp else nullcontext,
            loss_scaler=None,
            model_dtype=torch.float32,
            mixup_fn=None,
            num_updates_total=args.epochs * len(loader),
            naflex_mode=args.naflex_loader,
            scheduled_batch_mode=False,
            batch_size_reference=None,
        )
        if args.rank == 0:
            print("epoch", epoch, metrics)
    if args.rank == 0:
        folder = Path(args.output, "run")
        folder.mkdir(parents=True)
        torch.save({"state_dict": model.state_dict()}, folder / "last.pth.tar")
