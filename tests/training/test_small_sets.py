"""Runs on a small set: held in memory, with images kept apart for the temperature."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flatcal_dist import cli
from flatcal_dist.calibration.calibrators import TemperatureScaling
from flatcal_dist.config import load
from flatcal_dist.data.images.decode import decode
from flatcal_dist.inputs import open_holdout
from flatcal_dist.networks.registry import build
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.tracking.tracker import read_metrics as read_records
from tests.support.launching import digits, launch

SMALL = ("data.augmentation=pad_crop", "data.crop_padding=1", "data.holdout=0.2",
         "train.max_steps=30", "train.log_every_steps=10",
         "train.validate_every_epochs=1")  # fmt: skip


@pytest.fixture(scope="module")
def shards(digits_shards: Path) -> Path:
    return digits_shards


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """Two ranks, in memory, with its report."""
    run = tmp_path_factory.mktemp("runs") / "memory"
    more = ("data.reader=memory", "evaluate.at_end=true")
    done = launch("imagenet_sam", *digits("sam", run, shards, *SMALL, *more))
    assert done.returncode == 0, done.stdout
    return run


def test_in_memory_and_indexed_train_the_same_network(run, shards, tmp_path):
    other = tmp_path / "indexed"
    done = launch("imagenet_sam", *digits("sam", other, shards, *SMALL, "data.reader=indexed"))
    assert done.returncode == 0, done.stdout
    one, two = (load_file(path / "model.safetensors") for path in (run, other))
    assert all((one[name] == two[name]).all() for name in one)
    validated = [
        [{k: v for k, v in record.items() if k.startswith("val/")} for record in records
         if "epoch" in record and "val/nll" in record]
        for records in (read_records(path / "metrics.jsonl") for path in (run, other))
    ]  # fmt: skip
    assert len(validated[0]) == 3
    assert validated[0] == validated[1], "the images that are held are those of the shards"


def test_an_epoch_is_that_of_the_images_that_are_left(run):
    assert RunDirectory(run).state().epoch == 30 // (640 // 64)


def test_the_temperature_is_that_of_the_images_kept_apart(run, tmp_path, monkeypatch):
    metrics = json.loads((run / "report/metrics.json").read_text())
    _, valid, optimum = metrics["temperatures"]
    assert (valid["images"], optimum["images"]) == (160, 997)
    assert metrics["temperature"] == valid["temperature"] != optimum["temperature"]
    assert metrics["source"]["fitted_apart"]
    assert "TS-valid" in (run / "report/index.html").read_text()

    # Evaluated again by one process, which also writes the logits of the evaluated images.
    cli.main(["evaluate", str(run), "--output", str(tmp_path / "again"), "--save-logits"])
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert again["temperature"] == pytest.approx(metrics["temperature"], rel=1e-5)
    assert again["after_temperature"]["nll"] == pytest.approx(
        metrics["after_temperature"]["nll"], rel=1e-5
    )
    stored = np.load(tmp_path / "again/logits.npz")
    own = TemperatureScaling().fit(stored["logits"], stored["labels"]).temperature
    assert again["temperatures"][2]["temperature"] == pytest.approx(own)


def test_figures_of_the_images_kept_apart_are_those_of_the_network_as_trained(run):
    config = load(run / "config.yaml", [])
    index = open_holdout(config.data, 10)
    network = build(config.model.name, 10, 1, 8, dict(config.model.options))
    network.load_state_dict(load_file(run / "model.safetensors"))
    images = torch.stack([decode(index.read(i), 1, str(i)) for i in range(len(index))]) / 255
    mean, std = config.data.mean[0], config.data.std[0]
    with torch.inference_mode():
        logits = network.eval()((images - mean) / std).double()
    labels = torch.from_numpy(index.label.astype(np.int64))
    confidence, answers = logits.softmax(1).max(1)
    right = (answers == labels).double()
    apart = json.loads((run / "report/metrics.json").read_text())["images_apart"]
    assert apart["images"] == len(index) == 160
    assert (
        "images_apart" not in json.loads((run / "report/metrics.json").read_text())["conventions"]
    )
    assert apart["figures"]["accuracy"] == float(right.mean())
    nll = float(torch.nn.functional.cross_entropy(logits, labels))
    assert apart["figures"]["nll"] == pytest.approx(nll, rel=1e-5)
    gap = float((confidence - right).mean())
    assert apart["figures"]["signed_gap"] == pytest.approx(gap, abs=1e-6)
    assert "160 training images that were kept apart" in (run / "report/index.html").read_text()
