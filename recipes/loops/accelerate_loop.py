"""SAM in an Accelerate loop, with batches that are dictionaries and a training accuracy.

    accelerate launch --config_file configs/accelerate/cpu_ddp.yaml recipes/loops/accelerate_loop.py

What changes in a loop of yours: the optimizer is not prepared, because the step drives it; and
forward pass and loss move into a function, which the step calls once for each of its two passes.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep


class Digits(Dataset):
    """scikit-learn's handwritten digits, 1,437 to train on or 360 to test on."""

    def __init__(self, train: bool) -> None:
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=360, random_state=0)
        self.pixels = torch.tensor(parts[0 if train else 1], dtype=torch.float32) / 16
        self.labels = torch.tensor(parts[2 if train else 3])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.pixels[index], "labels": self.labels[index]}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """New: forward pass and loss, by the model that the step hands in; one loss for each image.

    What else is returned comes back from the first pass, which is at the weights themselves.
    """
    logits = model(batch["pixels"])
    losses = F.cross_entropy(logits, batch["labels"], label_smoothing=0.1, reduction="none")
    return {"losses": losses, "right": logits.argmax(1) == batch["labels"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save", help="where the weights go")
    arguments = parser.parse_args()

    # A batch is that of all processes, so any number of them trains the same network.
    data = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    # Without an accelerator it has to be told, or its processes do not join one another.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), dataloader_config=data)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(Digits(True), 64, shuffle=True, drop_last=True, generator=order)
    test = DataLoader(Digits(False), 120)

    # Before: model, optimizer, loader, test = accelerator.prepare(model, optimizer, loader, test)
    model, loader, test = accelerator.prepare(model, loader, test)
    step = SharpnessAwareStep(ReplicatedEngine(model, optimizer), SAM(rho=0.05))

    for epoch in range(arguments.epochs):
        model.train()
        right = torch.zeros(2, device=accelerator.device)
        for batch in loader:
            # Before:
            #     optimizer.zero_grad()
            #     output = forward(model, batch)
            #     accelerator.backward(output["losses"].mean())
            #     optimizer.step()
            result = step([batch], forward=forward)
            (output,) = result.outputs  # of this process, one for each micro-batch, without a graph
            right += torch.stack([output["right"].sum(), torch.tensor(len(output["right"]))])
        right = accelerator.reduce(right)
        accelerator.print(f"epoch {epoch}: training accuracy {(right[0] / right[1]).item():.3f}")

    model.eval()
    with torch.no_grad():
        hits = [forward(model, batch)["right"] for batch in test]
    hits = accelerator.gather_for_metrics(torch.cat(hits))
    accelerator.print(f"test accuracy {hits.double().mean().item():.3f}")
    if arguments.save:
        accelerator.save(accelerator.unwrap_model(model).state_dict(), arguments.save)


if __name__ == "__main__":
    main()
