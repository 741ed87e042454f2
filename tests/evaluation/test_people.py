"""`flatcal evaluate --people`, from CIFAR's archive to the page."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import softmax

from flatcal_dist import cli
from flatcal_dist.networks.registry import build
from tests.data.published import cifar_archive, cifar_files


def test_evaluating_against_people(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cifar_archive(tmp_path / "cifar-10-python.tar.gz", cifar_files(10), 10)
    shard = ["shard", "cifar-10-python.tar.gz", "cifar10", "--split", "validation"]
    cli.main([*shard, "--unchecked", "--shards", "2"])
    torch.manual_seed(0)
    save_file(build("lenet5", 10, 3, 32, {}).state_dict(), tmp_path / "lenet5.safetensors")
    counts = np.random.default_rng(0).integers(0, 20, (12, 10))
    np.save(tmp_path / "cifar10h-counts.npy", counts)
    words = ["evaluate", "--model", "lenet5", "--weights", "lenet5.safetensors"]
    words += ["--set", "model.num_classes=10", "data.image_size=32", "data.workers=0"]
    words += ["--data", "cifar10/cifar10-validation-{0000..0001}.tar", "--output", "out"]
    cli.main([*words, "--people", "cifar10h-counts.npy", "--save-logits"])
    stored = np.load(tmp_path / "out/logits.npz")
    number = [int(name[-5:]) for name in stored["ids"]]
    assert sorted(number) == list(range(12)), "the images are in the shards in another order"
    people = (counts / counts.sum(axis=1, keepdims=True))[number]
    p = softmax(stored["logits"].astype(float), axis=1)
    said = json.loads((tmp_path / "out/metrics.json").read_text())["people"]
    assert said["images"] == 12
    assert said["agreement"] == pytest.approx(people[range(12), p.argmax(1)].mean())
    assert said["cross_entropy"] == pytest.approx(-(people * np.log(p)).sum(1).mean(), rel=1e-6)
    assert "People were asked about the same 12 images" in (tmp_path / "out/index.html").read_text()
