"""CSAM in a plain PyTorch loop, on one process.

    python recipes/loops/plain_pytorch.py

What changes in a loop of yours: the four lines from `zero_grad()` to `optimizer.step()` become one
call. The optimizer, the loader and everything around the step stay as they are.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatcal_dist.sharpness import CSAM, ReplicatedEngine, SharpnessAwareStep


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits, 1,437 to train on and 360 to test on."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, random_state=0)
    train_images, test_images = (torch.tensor(x, dtype=torch.float32) / 16 for x in parts[:2])
    train_labels, test_labels = map(torch.tensor, parts[2:])
    return TensorDataset(train_images, train_labels), TensorDataset(test_images, test_labels)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save", help="where the weights go")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train, test = digits()
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True, generator=order)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    # New: the step is built once. The engine says how the network is laid out over processes, here
    # on one; the rule says what is done with the two gradients. SAM(rho=0.05) is another rule.
    step = SharpnessAwareStep(ReplicatedEngine(model, optimizer), CSAM(rho=0.05, gamma=1.0))

    for epoch in range(arguments.epochs):
        model.train()
        for images, labels in loader:
            # Before:
            #     optimizer.zero_grad()
            #     loss = nn.functional.cross_entropy(model(images), labels)
            #     loss.backward()
            #     optimizer.step()
            result = step([(images, labels)])
        # result.loss is the loss at the weights; result.perturbed_loss is that of the second pass,
        # a step of length rho uphill. Their difference is how sharp the loss is here.
        rise = result.perturbed_loss - result.loss
        print(f"epoch {epoch}: loss {result.loss:.4f}, it rises by {rise:.4f}")
    print(f"test accuracy {accuracy(model, test):.3f}")
    if arguments.save:
        torch.save(model.state_dict(), arguments.save)


if __name__ == "__main__":
    main()
