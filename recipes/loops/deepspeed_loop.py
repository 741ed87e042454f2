"""CSAM in a DeepSpeed loop with ZeRO, whose processes hold parts of gradients and weights.

    accelerate launch --config_file configs/accelerate/cpu_zero2.yaml \
        recipes/loops/deepspeed_loop.py
    torchrun --nproc_per_node 2 recipes/loops/deepspeed_loop.py --stage 3

What changes in a loop of yours: `start_zero` stands for `deepspeed.initialize`, as the step has to
decide when gradients are reduced; and `backward` and `step` of DeepSpeed's engine become one call.
"""

import argparse
import os

import deepspeed
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from flatcal_dist.sharpness import CSAM, SharpnessAwareStep
from flatcal_dist.sharpness.zero import ZeroEngine, start_zero

BATCH = 64  # of all processes together


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits, 1,437 to train on and 360 to test on."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, random_state=0)
    train_images, test_images = (torch.tensor(x, dtype=torch.float32) / 16 for x in parts[:2])
    train_labels, test_labels = map(torch.tensor, parts[2:])
    return TensorDataset(train_images, train_labels), TensorDataset(test_images, test_labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--save", help="where the weights go")
    arguments = parser.parse_args()

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # alone, start_zero makes a group of one
        deepspeed.init_distributed()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # Before: model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine = ZeroEngine(start_zero(model, optimizer, stage=arguments.stage))
    step = SharpnessAwareStep(engine, CSAM(rho=0.05, gamma=1.0))

    train, test = digits()
    world, rank = engine.world_size, dist.get_rank()
    sampler = DistributedSampler(train, world, rank, seed=0, drop_last=True)
    loader = DataLoader(train, BATCH // world, sampler=sampler, drop_last=True)
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        engine.model.train()
        for images, labels in loader:
            # Before:
            #     loss = nn.functional.cross_entropy(model(images), labels)
            #     model.backward(loss)
            #     model.step()
            result = step([(images.to(engine.device), labels.to(engine.device))])
        if rank == 0:  # the loss is the mean over all processes already
            print(f"epoch {epoch}: loss {result.loss:.4f}")

    images, labels = (tensor.to(engine.device) for tensor in test.tensors)
    engine.model.eval()
    with torch.no_grad():  # by all processes, as ZeRO-3 gathers weights from all of them
        hits = engine.inference(images).argmax(1) == labels
    weights = engine.full_weights()  # by all processes as well; whole, in fp32, on the first
    if rank == 0:
        print(f"test accuracy {hits.double().mean().item():.3f}")
        if arguments.save:
            torch.save(weights, arguments.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
