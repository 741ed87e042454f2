"""Runs on a small set: held in memory, with images kept apart for the temperature."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from flatcal_dist import cli
from flatcal_dist.calibration.calibrators import TemperatureScaling
from flatcal_dist.runs.directory import RunDirectory
from tests.support.launching import digits, launch

SMALL = ("data.augmentation=pad_crop", "data.crop_padding=1", "train.max_steps=30",
         "data.holdout=0.2", "train.log_every_steps=10")  # fmt: skip


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
