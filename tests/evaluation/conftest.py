"""Trees of small images for evaluation."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flatcal_dist.data.images.decode import decode
from flatcal_dist.data.sets.imagenet import subset
from tests.evaluation.small_networks import (
    CORRUPTIONS,
    corrupted,
)
from tests.support.photographs import write_photographs
from tests.support.quick_reports import quick_reports
from tests.support.variant_trees import WNIDS, write_tree


@pytest.fixture(scope="module", autouse=True)
def reports_of_this_module() -> Iterator[None]:
    """Reports are written in passing: nothing is drawn, and only quick calibrators are fitted."""
    with quick_reports(calibrators=False):
        yield


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    write_tree(root / "val", WNIDS, "ILSVRC2012_val_{number:08d}.JPEG")
    write_tree(root / "v2", [str(i) for i in range(1000)])
    write_tree(root / "r", [WNIDS[i] for i in subset("imagenet_r")], "art_{number}.jpg")
    write_photographs(root / "photographs", images_per_class=3, seed=1)
    for corruption in CORRUPTIONS[0]:  # as published, by the same function
        for severity in CORRUPTIONS[1]:
            for file in (root / "photographs").glob("*/*"):
                folder = root / "c" / corruption / str(severity) / file.parent.name
                folder.mkdir(parents=True, exist_ok=True)
                pixels = decode(file.read_bytes(), 3, "x").permute(1, 2, 0).numpy()
                image = corrupted(pixels, corruption, severity, file.stem)
                (folder / file.name).write_bytes(image)
    return root
