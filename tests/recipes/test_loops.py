"""The loops of recipes/loops, run as a user runs them, against literal SAM and CSAM.

Every loop trains two epochs of 22 steps, in the second of which the network is sure of most images,
so that CSAM is not SAM. The reference is a plain loop in one process, which calls nothing of the
package: two gradients, weights copied back, the optimizer.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support.launching import ROOT, launch, run
from tests.support.reference import far

LOOPS = ROOT / "recipes/loops"
EPOCHS, STEPS, BATCH, RHO = 2, 22, 64, 0.05
JUMP = 1e-5  # nearer to p = 1/2 than this, rounding decides which of CSAM's losses it is

# Rounding of float32 sums in another order, relative to the largest weight: measured up to 1e-6
# over the first 22 steps (AdamW; SGD 4e-7), for twice as many. SAM in place of CSAM, or no rule, is
# off by 1e-2 or more.
CLOSE = 1e-5

Pairs = list[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def smoothed_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")


def csam_loss(logits: Tensor, target: Tensor) -> Tensor:
    """-log p where p <= 1/2, else -log p / (1 + p); p: softmax of the true class."""
    p = logits.softmax(1)[torch.arange(len(target)), target]
    assert (p - 0.5).abs().min() > JUMP, "choose other batches"
    return torch.where(p <= 0.5, -p.log(), -p.log() / (1 + p))


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=3e-3)


def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    images, _, labels, _ = train_test_split(images, labels, test_size=360, random_state=0)
    return TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))


def by_generator() -> Pairs:
    """The order of a loader that shuffles by a generator with seed 0."""
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(digits(), BATCH, shuffle=True, drop_last=True, generator=order)
    return [batch for _ in range(EPOCHS) for batch in loader]


def by_permutation() -> Pairs:
    """The order that samplers with seed 0 and `set_epoch` have, on any number of ranks."""
    images, labels = digits().tensors
    batches = []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        batches += [(images[part], labels[part]) for part in order[: STEPS * BATCH].split(BATCH)]
    return batches


def literal(
    steps: Pairs,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    ascent: Loss,
    descent: Loss,
    precision: torch.dtype = torch.float32,
    parts: int = 1,
) -> dict[str, Tensor]:
    """Weights after these steps: g at w; e = rho g / ||g||; the gradient at w + e, followed at w.

    precision: of autocast. parts: micro-batches of a step, whose gradients are summed.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = make_optimizer(network)
    weights = list(network.parameters())

    def gradients(loss: Loss, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        optimizer.zero_grad()
        for images, target in zip(*(tensor.chunk(parts) for tensor in batch), strict=True):
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                logits = network(images)
            (loss(logits.float(), target).sum() / BATCH).backward()
        return [w.grad.clone() for w in weights]

    for batch in steps:
        g = gradients(ascent, batch)
        length = torch.cat([part.flatten() for part in g]).norm()
        before = [w.detach().clone() for w in weights]
        with torch.no_grad():
            torch._foreach_add_(weights, [RHO * part / length for part in g])
        gradients(descent, batch)
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        optimizer.step()
    return network.state_dict()


def trained(
    loop: str, folder: Path, *arguments: str, processes: int = 1, launcher: str = "cpu_ddp"
) -> dict[str, Tensor]:
    """The weights after two epochs of the script, which has printed an accuracy above chance."""
    file = folder / f"{loop}_{processes}{'_'.join(arguments)}.pt"
    words = ["--epochs", str(EPOCHS), "--save", str(file), *arguments]
    done = launch(f"loops/{loop}", *words, processes=processes, launcher=launcher)
    return checked(done.returncode, done.stdout, file)


def checked(code: int, output: str, file: Path) -> dict[str, Tensor]:
    assert code == 0, output
    [accuracy] = re.findall(r"test accuracy (\d\.\d+)", output)
    assert float(accuracy) > 0.7, output
    return torch.load(file, weights_only=True)


def test_plain_pytorch_is_csam(tmp_path):
    expected = literal(by_generator(), sgd, plain_loss, csam_loss)
    assert far(trained("plain_pytorch", tmp_path), expected) < CLOSE


def test_accelerate_is_sam_on_any_number_of_processes(tmp_path):
    expected = literal(by_permutation(), adamw, smoothed_loss, smoothed_loss)
    for processes in (1, 2):
        weights = trained("accelerate_loop", tmp_path, processes=processes)
        assert far(weights, expected) < CLOSE, processes


@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_is_csam_on_any_number_of_processes(tmp_path, stage):
    expected = literal(by_permutation(), adamw, plain_loss, csam_loss)
    for processes in (1, 2):
        weights = trained(
            "deepspeed_loop", tmp_path, "--stage", stage, processes=processes, launcher="cpu_zero2"
        )
        assert far(weights, expected) < CLOSE, processes


def fabric(folder: Path, devices: int, precision: str) -> dict[str, Tensor]:
    """Fabric starts the second process by itself."""
    file = folder / f"fabric_{devices}_{precision}.pt"
    words = ["--epochs", str(EPOCHS), "--devices", str(devices), "--precision", precision]
    script = str(LOOPS / "fabric_loop.py")
    done = run([sys.executable, script, *words, "--save", str(file)], cwd=ROOT)
    return checked(done.returncode, done.stdout, file)


@pytest.mark.exhaustive
def test_fabric_is_csam_on_any_number_of_processes(tmp_path):
    pytest.importorskip("lightning_fabric")
    expected = literal(by_permutation(), sgd, plain_loss, csam_loss)
    for devices in (1, 2):
        assert far(fabric(tmp_path, devices, "fp32"), expected) < CLOSE, devices


@pytest.mark.exhaustive
def test_fabric_in_bf16_is_csam_under_autocast(tmp_path):
    pytest.importorskip("lightning_fabric")
    exact = literal(by_permutation(), sgd, plain_loss, csam_loss)
    expected = literal(by_permutation(), sgd, plain_loss, csam_loss, torch.bfloat16, 2)
    assert far(expected, exact) > 20 * CLOSE, "bf16 shows"
    one = fabric(tmp_path, 1, "bf16")
    assert far(one, expected) < CLOSE
