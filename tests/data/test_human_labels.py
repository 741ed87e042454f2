"""CIFAR-N's labels in the form in which they are published."""

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flatcal_dist.cli import main
from flatcal_dist.data import DataError, expand, load_index
from flatcal_dist.data.making.cifar import cifar
from flatcal_dist.data.making.human_labels import with_human_labels
from tests.data.published import cifar_archive, cifar_files

NAMES = ("worse_label", "aggre_label", "random_label1", "random_label2", "random_label3")


@pytest.fixture
def archive(tmp_path):
    return cifar_archive(tmp_path / "cifar-10-python.tar.gz", cifar_files(10), 10)


def human(archive, path, legacy=False, **changes):
    """As torch.save wrote the published file."""
    clean = cifar(archive, "train", checked=False).label.astype(np.int64)
    random = np.random.default_rng(0)
    labels = {"clean_label": clean}
    labels |= {name: random.integers(0, 10, len(clean)) for name in NAMES} | changes
    torch.save(labels, path, _use_new_zipfile_serialization=not legacy)
    return labels


@pytest.mark.parametrize("legacy", [False, True])
def test_shards_hold_the_labels_and_the_clean_ones_beside(archive, legacy, tmp_path):
    labels = human(archive, tmp_path / "CIFAR-10_human.pt", legacy)
    words = ["shard", str(archive), str(tmp_path / "out"), "--shards", "2", "--unchecked"]
    file = ["--labels", str(tmp_path / "CIFAR-10_human.pt"), "--labels-name", "worse_label"]
    main([*words, *file, "--workers", "1"])
    index = load_index(expand(str(tmp_path / "out"), "train"), 10)
    keys = index.keys()
    numbers = [int(key.rpartition("_")[2]) for key in keys]
    assert index.label.tolist() == labels["worse_label"][numbers].tolist()
    told = {}
    for shard in index.shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    told[Path(member.name).stem] = json.load(tar.extractfile(member))["clean_label"]
    assert [told[key] for key in keys] == labels["clean_label"][numbers].tolist()
    with pytest.raises(SystemExit, match=r"planned otherwise: source kind differs"):
        main([*words, *file[:-1], "aggre_label"])


def test_labels_that_do_not_fit_are_refused(archive, tmp_path):
    train, file = cifar(archive, "train", checked=False), tmp_path / "CIFAR-10_human.pt"
    human(archive, file)
    with pytest.raises(DataError, match=r"has the labels worse_label, .*random_label3: choose"):
        with_human_labels(train, file, None)
    with pytest.raises(DataError, match=r"and there are 12 images: .* --split train"):
        with_human_labels(cifar(archive, "validation", checked=False), file, "worse_label")
    human(archive, file, clean_label=np.zeros(60, np.int64))
    with pytest.raises(DataError, match=r"clean_label differs from the labels of \d+ images"):
        with_human_labels(train, file, "worse_label")
    human(archive, file, worse_label=np.full(60, 10))
    with pytest.raises(DataError, match=r"outside 0\.\.9"):
        with_human_labels(train, file, "worse_label")
    torch.save({"a": "b"}, file)
    with pytest.raises(DataError, match="holds no lists of labels"):
        with_human_labels(train, file, "worse_label")


def test_damaged_and_hostile_files_are_refused(archive, tmp_path):
    train, file = cifar(archive, "train", checked=False), tmp_path / "CIFAR-10_human.pt"
    human(archive, file)
    data = file.read_bytes()
    for share in (0.3, 0.99):
        file.write_bytes(data[: int(share * len(data))])
        with pytest.raises(DataError, match=r"cannot be read|asks for|is cut short"):
            with_human_labels(train, file, "worse_label")

    class Evil:
        def __reduce__(self):
            return print, ("hacked",)

    torch.save({"worse_label": Evil()}, file)
    with pytest.raises(DataError, match=r"asks for (__)?builtin(s|__).print"):
        with_human_labels(train, file, "worse_label")
    file.write_bytes(pickle.dumps({"worse_label": [1]}))
    with pytest.raises(DataError, match="cannot be read"):
        with_human_labels(train, file, "worse_label")
    with pytest.raises(SystemExit, match="--labels-name chooses from a file"):
        main(["shard", str(archive), str(tmp_path / "o"), "--unchecked", "--labels-name", "x"])
