"""recipes/loops/timm_train.py: train.py with SAM in it, against SAM as the paper has it.

timm's packages leave train.py out, so a script with the same calls stands for it. A checkout's own
is run as well where TIMM_TRAIN_PY names it (in one process, as it wants GPUs for more).
"""

import os
import runpy
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.support.launching import ROOT, launch
from tests.support.reference import far

STAND_IN = ROOT / "tests/support/timm_stand_in.py"
STEPS, RHO, CLIP, SIZE, CLASSES = 3, 0.2, 0.5, 32, 3

# Rounding of float32 sums in another order, relative to the largest weight: measured up to 2e-7
# over these steps. Training without the perturbation is off by 5e-2.
CLOSE = 1e-6


def make_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_convnext", num_classes=CLASSES)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """An ImageFolder with 12 images to train on, and the weights to begin with."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in range(CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{number}.png")
    torch.save(make_network().state_dict(), folder / "initial.pth")
    return folder


def literal(images: Path) -> dict[str, Tensor]:
    """SAM on all images at once: g at w; e = rho g / ||g||; the gradient at w + e, clipped."""
    files = sorted((images / "train").glob("*/*.png"))
    pixels = torch.tensor(np.stack([np.asarray(Image.open(file)) for file in files]))
    target = torch.tensor([int(file.parent.name) for file in files])
    network = make_network()
    mean, std = (torch.tensor(network.pretrained_cfg[key]) for key in ("mean", "std"))
    inputs = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    weights = list(network.parameters())
    for _ in range(STEPS):
        g = torch.autograd.grad(F.cross_entropy(network(inputs), target), weights)
        length = torch.cat([part.flatten() for part in g]).norm()
        before = [w.detach().clone() for w in weights]
        with torch.no_grad():
            torch._foreach_add_(weights, [RHO * part / length for part in g])
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
    return network.state_dict()


def options(images: Path, output: Path, batch: int, accumulated: int) -> list[str]:
    """Of train.py; each epoch is one step on all images."""
    given = {
        "rho": RHO, "data-dir": images, "model": "test_convnext", "num-classes": CLASSES,
        "img-size": SIZE, "initial-checkpoint": images / "initial.pth", "batch-size": batch,
        "grad-accum-steps": accumulated, "epochs": STEPS, "opt": "sgd", "lr": 0.1,
        "weight-decay": 0, "smoothing": 0, "clip-grad": CLIP, "sched": "step", "warmup-epochs": 0,
        "workers": 0, "device": "cpu", "output": output,
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [*words, "--no-aug", "--no-prefetcher"]


@pytest.mark.parametrize(
    ("script", "processes", "batch", "accumulated"),
    [("stand-in", 1, 12, 1), ("stand-in", 1, 4, 3), ("stand-in", 2, 3, 2), ("train.py", 1, 4, 3)],
)
def test_train_py_takes_sam_steps(images, tmp_path, script, processes, batch, accumulated):
    path = STAND_IN if script == "stand-in" else os.environ.get("TIMM_TRAIN_PY")
    if path is None:
        pytest.skip("TIMM_TRAIN_PY names no train.py of timm")
    words = [str(path), *options(images, tmp_path, batch, accumulated)]
    done = launch("loops/timm_train", *words, processes=processes)
    assert done.returncode == 0, done.stdout
    [file] = tmp_path.glob("*/last.pth.tar")
    weights = torch.load(file, weights_only=False)["state_dict"]
    assert far(weights, literal(images)) < CLOSE


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recovery-interval", "5"], "leave --recovery-interval out"),
        (["--clip-mode", "value"], "--clip-mode value is another way"),
        (["--naflex-loader"], "batches of different sizes"),
    ],
)
def test_options_that_the_loop_would_pass_over_are_refused(images, tmp_path, more, message):
    done = launch(
        "loops/timm_train", str(STAND_IN), *options(images, tmp_path, 12, 1), *more, processes=1
    )
    assert done.returncode != 0
    assert message in done.stdout


def test_a_train_py_that_wants_its_average_updated_is_refused():
    refuse = runpy.run_path(str(ROOT / "recipes/loops/timm_train.py"))["refuse"]
    with pytest.raises(SystemExit, match=r"older than timm 1\.0\.28"):
        refuse(Namespace(clip_grad=None, recovery_interval=0), {"model_ema": object()})


def test_another_script_is_refused(tmp_path):
    other = tmp_path / "train.py"
    other.write_text("import torch\n")
    done = launch("loops/timm_train", str(other), processes=1)
    assert done.returncode != 0
    assert "is not train.py of timm" in done.stdout
