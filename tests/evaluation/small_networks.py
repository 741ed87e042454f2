"""Small networks that see small images, and their logits computed by hand."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from flatcal_dist import config
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.config import Config
from flatcal_dist.data.images.corruptions import corrupted_jpeg
from flatcal_dist.data.images.decode import decode
from flatcal_dist.inputs import augmentation, evaluation_transform
from flatcal_dist.networks.registry import build
from flatcal_dist.ranks import distributed
from tests.support.quick_reports import be_quick

REAL = "imagenet_real_labels.json"
SIZE = 8  # pixels that the small network looks at
NAMES = [f"class {i} by name" for i in range(10)]
CORRUPTIONS = (["gaussian_noise", "pixelate"], [1, 4])


def settings(classes: int) -> Config:
    overrides = ["model.name=mlp", "model.options={width: 16, depth: 1}", "data.workers=0"]
    overrides += [f"model.num_classes={classes}", f"data.image_size={SIZE}"]
    return config.load(None, [*overrides, "evaluate.batch_size=48"])


def network(classes: int) -> torch.nn.Module:
    torch.manual_seed(classes)
    module = build("mlp", classes, 3, SIZE, {"width": 16, "depth": 1})
    with torch.no_grad():  # else random logits are so close together that ECE says nothing
        module.head.weight *= 10
    return module


def corrupted(pixels: np.ndarray, *rest) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    return corrupted_jpeg(png.getvalue(), "x", *rest)


def join(rank: int, world_size: int) -> Accelerator:
    if world_size > 1:
        be_quick()  # as the process of the test is, see conftest.py
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return distributed.start("ddp", "fp32")


def logits_by_hand(files: list[Path], classes: int, crop_pct: float | None = None) -> np.ndarray:
    """One image at a time through transform, normalization and network: float64 [n, classes]."""
    setting = settings(classes)
    if crop_pct:
        data = setting.data.model_copy(update={"crop_pct": crop_pct})
        setting = setting.model_copy(update={"data": data})
    transform = evaluation_transform(augmentation(setting.data), SIZE)
    mean, std = (np.array(v)[:, None, None] for v in (setting.data.mean, setting.data.std))
    module = network(classes).double()
    rows = []
    for file in files:
        pixels = transform(decode(file.read_bytes(), 3, file.name)).numpy() / 255
        with torch.no_grad():
            rows.append(module(torch.from_numpy((pixels - mean) / std)[None])[0].numpy())
    return np.array(rows)


def assert_scores(records: Records, files: list[Path], logits: np.ndarray, labels) -> None:
    """float32 through the network against float64: 1e-4 of logits up to 10."""
    order = np.argsort([file.stem for file in files])
    logits, labels = logits[order], np.array(labels)[order]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert records.label.tolist() == labels.tolist()
    assert records.before.confidence == pytest.approx(p.max(1), abs=1e-4)
    assert records.before.nll == pytest.approx(-np.log(p[np.arange(len(p)), labels]), abs=1e-3)
    assert (records.prediction == p.argmax(1)).mean() > 0.99
