"""`flatcal evaluate` on CIFAR, from its archive to the page: people's answers, CIFAR-10-C."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import softmax

from flatcal_dist import cli
from flatcal_dist.networks.registry import build
from tests.data.published import cifar_archive, cifar_files
from tests.support.launching import flatcal


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """The command on twelve test images, with LeNet-5 as it is drawn. Nothing is cut off images."""
    monkeypatch.chdir(tmp_path)
    cifar_archive(tmp_path / "cifar-10-python.tar.gz", cifar_files(10), 10)
    shard = ["shard", "cifar-10-python.tar.gz", "cifar10", "--split", "validation"]
    cli.main([*shard, "--unchecked", "--shards", "2"])
    torch.manual_seed(0)
    save_file(build("lenet5", 10, 3, 32, {}).state_dict(), tmp_path / "lenet5.safetensors")
    words = ["evaluate", "--model", "lenet5", "--weights", "lenet5.safetensors"]
    words += ["--set", "model.num_classes=10", "data.image_size=32", "data.workers=0"]
    words += ["data.augmentation=pad_crop"]
    return [*words, "--data", "cifar10/cifar10-validation-{0000..0001}.tar", "--output", "out"]


def test_evaluating_against_people(words, tmp_path) -> None:
    counts = np.random.default_rng(0).integers(0, 20, (12, 10))
    np.save(tmp_path / "cifar10h-counts.npy", counts)
    cli.main([*words, "--people", "cifar10h-counts.npy", "--save-logits"])
    stored = np.load(tmp_path / "out/logits.npz")
    number = [int(name[-5:]) for name in stored["ids"]]
    assert sorted(number) == list(range(12)), "the images are in the shards in another order"
    people = (counts / counts.sum(axis=1, keepdims=True))[number]
    p = softmax(stored["logits"].astype(float), axis=1)
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["about"]["crop_pct"] is None
    said = written["people"]
    assert said["images"] == 12
    assert said["agreement"] == pytest.approx(people[range(12), p.argmax(1)].mean())
    assert said["cross_entropy"] == pytest.approx(-(people * np.log(p)).sum(1).mean(), rel=1e-6)
    assert "People were asked about the same 12 images" in (tmp_path / "out/index.html").read_text()


def test_corruptions_whose_labels_are_of_other_images_are_refused(words, tmp_path) -> None:
    """In the order of the test images they are right, and turned by one they are not."""
    label = pickle.loads(cifar_files(10)["test_batch"], encoding="bytes")[b"labels"]
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c/fog.npy", np.zeros((60, 32, 32, 3), np.uint8))
    chosen = ["--data", "cifar_c=c", "--severities", "1"]
    np.save(tmp_path / "c/labels.npy", np.tile(label, 5))
    cli.main([*words, *chosen])
    assert (tmp_path / "out/shift.json").exists()
    np.save(tmp_path / "c/labels.npy", np.tile(np.roll(label, 1), 5))
    refused = flatcal(*words, *chosen, cwd=tmp_path)
    assert refused.returncode == 1
    assert "labels.npy has other labels than the clean test images" in refused.stdout
