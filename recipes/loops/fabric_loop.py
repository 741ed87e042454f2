"""CSAM in a Lightning Fabric loop, with accumulated micro-batches and mixed precision.

    python recipes/loops/fabric_loop.py --devices 2 --precision bf16

What changes in a loop of yours: the micro-batches of one step are handed over together, so that
there is no `no_backward_sync` and no division of losses; and mixed precision is torch's autocast
around the step, where Fabric's own would want to run the backward pass itself.
"""

import argparse

import torch
from lightning_fabric import Fabric  # or: from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from flatcal_dist.sharpness import CSAM, ReplicatedEngine, SharpnessAwareStep

BATCH, MICRO_BATCHES = 64, 2  # images of all processes together; parts of a process's share
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--save", help="where the weights go")
    arguments = parser.parse_args()

    # Before: Fabric(..., precision="bf16-mixed").
    fabric = Fabric(accelerator="cpu", devices=arguments.devices, strategy="auto")
    fabric.launch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = fabric.setup(model, optimizer)  # as before
    # New: the step. compute_dtype is what autocast below rounds weights to.
    precision = PRECISIONS[arguments.precision]
    engine = ReplicatedEngine(model, optimizer, compute_dtype=precision)
    step = SharpnessAwareStep(engine, CSAM(rho=0.05, gamma=1.0))

    train, test = digits()
    sampler = DistributedSampler(train, fabric.world_size, fabric.global_rank, drop_last=True)
    size = BATCH // fabric.world_size // MICRO_BATCHES
    loader = DataLoader(train, size, sampler=sampler, drop_last=True)
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    for epoch in range(arguments.epochs):
        model.train()
        batches = list(loader)
        for start in range(0, len(batches) - MICRO_BATCHES + 1, MICRO_BATCHES):
            # Before, for each micro-batch:
            #     with fabric.no_backward_sync(model, enabled=not last):
            #         loss = nn.functional.cross_entropy(model(images), labels) / MICRO_BATCHES
            #         fabric.backward(loss)
            # and after the last: optimizer.step(); optimizer.zero_grad()
            with torch.autocast(fabric.device.type, precision, enabled=precision != torch.float32):
                result = step(batches[start : start + MICRO_BATCHES])
        fabric.print(f"epoch {epoch}: loss {result.loss:.4f}")

    model.eval()
    images, labels = fabric.to_device(test.tensors)
    with torch.no_grad():
        hits = model(images).argmax(1) == labels
    fabric.print(f"test accuracy {hits.double().mean().item():.3f}")
    if arguments.save:
        fabric.save(arguments.save, engine.full_weights())


if __name__ == "__main__":
    main()
