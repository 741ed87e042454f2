"""What a run is given to read, before it reads."""

import shutil

import pytest

from flatcal_dist import inputs
from flatcal_dist.config import DataConfig
from flatcal_dist.data import DataError, image_folder, prepare_shards
from tests.support.photographs import write_photographs
from tests.support.web import serving


def test_splits_that_count_other_classes_are_refused(tmp_path):
    """Sharded into different directories, from a tree that lacks a folder; also on the web."""
    tree = write_photographs(tmp_path / "tree", classes=3, images_per_class=1)
    for name in ("train", "validation"):
        prepare_shards(image_folder(tree), tmp_path / name, name, shards=1)
    shutil.rmtree(tree / "n03792782")
    prepare_shards(image_folder(tree), tmp_path / "less", "validation", shards=1)
    with serving(tmp_path) as web:
        for place in (str(tmp_path), web.url):
            train, validation = f"{place}/train/", f"{place}/validation/"
            inputs.check_classes(DataConfig(train=train, validation=validation))
            wrong = DataConfig(train=train, validation=f"{place}/less/")
            with pytest.raises(DataError, match=r"3 classes and .* has 2, 'n03792782' is in one"):
                inputs.check_classes(wrong)
    (tmp_path / "less/imagenet1k-validation.plan.json").unlink()
    less = DataConfig(train=str(tmp_path / "train"), validation=str(tmp_path / "less"))
    inputs.check_classes(less)
