"""Which images, classes and networks an evaluation refuses."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from flatcal_dist import cli, config, inputs
from flatcal_dist.config import Config
from flatcal_dist.data import DataError, image_folder, prepare_digits, prepare_shards
from flatcal_dist.evaluation import evaluated_images
from flatcal_dist.evaluation.evaluated_images import refuse_common
from flatcal_dist.files import write_json
from flatcal_dist.networks.registry import build
from tests.evaluation.test_predicting import settings, write_run
from tests.support.launching import flatcal

WHY = "of the other set: evaluate others"


class Set:
    """Images of 8 bytes, or with `sizes` of as many, that hold their number."""

    def __init__(self, numbers, labels=None, sizes=None):
        sizes = [8] * len(numbers) if sizes is None else sizes
        self.images = [str(n).encode().rjust(s, b"0") for n, s in zip(numbers, sizes, strict=True)]
        self.size = np.array(sizes)
        self.label = np.zeros(len(numbers), int) if labels is None else np.array(labels)
        self.reads = 0

    def __len__(self):
        return len(self.images)

    def read(self, sample):
        self.reads += 1
        return self.images[sample]

    def key(self, sample):
        return f"key of {self.images[sample].decode()}"


def test_sets_without_a_common_image_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_common(Set(range(300)), Set(range(300, 400)), WHY)
        refuse_common(Set(range(300)), Set([]), WHY)


@pytest.mark.parametrize(("shared", "others"), [(3, 300), (1, 100), (3, 900)])
def test_a_few_common_images_are_told(shared, others):
    """One in a hundred of the smaller set: published data sets have some."""
    first = 300 - shared
    message = f"{shared} of the 300 evaluated images, first key of 00000{first}, are of the other"
    with pytest.warns(RuntimeWarning, match=f"{message} set$"):
        refuse_common(Set(range(300)), Set(range(first, first + others)), WHY)


@pytest.mark.parametrize(("shared", "others"), [(4, 300), (2, 100), (300, 900), (1, 1)])
def test_more_are_refused(shared, others):
    first = 300 - shared
    with pytest.raises(DataError, match=rf"^{shared} of the 300 .*, are {WHY}$"):
        refuse_common(Set(range(300)), Set(range(first, first + others)), WHY)


def test_only_images_of_equal_size_are_read_and_in_large_sets_of_equal_label(monkeypatch):
    one = Set(range(50), labels=[0] * 25 + [1] * 25)
    other = Set(range(50), labels=[0] * 25 + [2] * 25, sizes=[8] * 40 + [9] * 10)
    with pytest.raises(DataError, match=r"^40 of the 50"):
        refuse_common(one, other, WHY)
    assert other.reads == 40
    monkeypatch.setattr(evaluated_images, "WHOLE", 99)
    one.reads = other.reads = 0
    with pytest.raises(DataError, match=r"^25 of the 50"):
        refuse_common(one, other, WHY)
    assert (one.reads, other.reads) == (25, 25)


def refused(words: list[str]) -> str:
    """The last line of `flatcal WORDS`, which ends the process that it runs in."""
    done = flatcal(*words)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    return done.stdout.splitlines()[-1]


def test_equal_networks_are_no_ensemble(digits_shards, tmp_path) -> None:
    run = write_run(tmp_path / "run", settings(digits_shards), 0)
    copy = write_run(tmp_path / "copy", settings(digits_shards), 0)
    (tmp_path / "link").symlink_to(run)
    for other in (copy, tmp_path / "link"):
        words = ["evaluate", str(run), str(other), "--ensemble", "--output", str(tmp_path / "out")]
        assert "one network twice: " in refused(words)


def write_trained(path: Path, setting: Config) -> Path:
    """A run that recorded which images it was trained on."""
    run = write_run(path, setting, 0)
    index = inputs.open_index(setting.data, "train", 10)
    write_json(run / "environment.json", {"train_data": index.identity})
    return run


def test_images_that_were_seen_are_not_judged(digits_shards, tmp_path) -> None:
    held = write_trained(tmp_path / "held", settings(digits_shards, "data.holdout=0.2"))
    plain = write_trained(tmp_path / "plain", settings(digits_shards))
    training = ["--data", f"{digits_shards}/digits-train-{{0000..0003}}.tar"]
    output = ["--output", str(tmp_path / "out")]
    told = refused(["evaluate", str(held), *training, *output])
    assert re.search(r"160 of the 800 .*, first .* are kept apart by data\.holdout", told)
    scores = ["--confidence", "mahalanobis,trust_score"]
    told = refused(["evaluate", str(plain), *training, *scores, *output])
    assert re.search(r"800 of the 800 .* which trust_score and mahalanobis would find", told)
    cli.main(["evaluate", str(plain), *training, *output])  # which nothing keeps from being read
    assert json.loads((tmp_path / "out/metrics.json").read_text())["images"] == 800


def test_other_training_images_than_then_are_refused(digits_shards, tmp_path) -> None:
    """Which images are kept apart depends on all of them."""
    own = tmp_path / "digits"
    shutil.copytree(digits_shards, own)
    run = write_trained(tmp_path / "run", settings(own, "data.holdout=0.2"))
    plain = write_trained(tmp_path / "plain", settings(own))
    other = prepare_digits(tmp_path / "other", seed=5)
    for shard in other.glob("digits-train-*"):
        shutil.copy(shard, own)
    output = ["--output", str(tmp_path / "out")]
    told = refused(["evaluate", str(run), *output])
    assert re.search(r"holds other images than when .*/run was trained .* back$", told)
    told = refused(["evaluate", str(plain), "--confidence", "trust_score", *output])
    assert re.search(r"other images .* or evaluate with --confidence none$", told)
    done = flatcal("evaluate", str(plain), *output)
    assert done.returncode == 0, done.stdout


def test_classes_of_other_names_are_refused(tmp_path) -> None:
    def sharded(name: str, classes: str) -> Path:
        for number, label in enumerate(classes):
            folder = tmp_path / f"{name}_tree/{label}"
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), 20 * number + 5 * i).save(folder / f"{name}{i}.png")
        tree = image_folder(tmp_path / f"{name}_tree")
        prepare_shards(tree, tmp_path / name, "train", shards=1, prefix="x")
        return tmp_path / name

    known, others = sharded("known", "abc"), sharded("others", "abe")
    overrides = [f"data.train={known}/x-train-{{0000..0000}}.tar", "model.num_classes=3"]
    overrides += ["data.validation=null", "data.image_size=8", "data.channels=1", "data.workers=0"]
    setting = config.load(None, ["model.name=mlp", "data.mean=[0.0]", "data.std=[1.0]", *overrides])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml(setting))
    module = build("mlp", 3, 1, 8, {})
    save_file(module.state_dict(), run / "model.safetensors")
    output = ["--output", str(tmp_path / "out")]
    for data in (others / "x-train-0000.tar", tmp_path / "others_tree"):
        told = refused(["evaluate", str(run), "--data", str(data), *output])
        assert re.search(r"other classes than .*'c' is in one of them only", told)
    cli.main(["evaluate", str(run), "--data", str(tmp_path / "known_tree"), *output])
