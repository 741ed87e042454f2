"""From an ImageFolder tree (one folder a class) to shards."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.order import shuffled
from flatcal_dist.data.shards import Sample, write_shards
from flatcal_dist.data.walk import IMAGES

SHARDS = {"train": 1024, "validation": 64}  # of ImageNet-1K: about 140 and 100 MB each


def shard_image_folder(
    source: Path,
    destination: Path,
    split: str,
    *,
    prefix: str = "imagenet1k",
    shards: int | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write the images of SOURCE/CLASS/* as PREFIX-SPLIT-{0000...}.tar; return the shards.

    Labels count the class folders in the order of their names (ImageNet's usual order). Images are
    copied as they are, in an order shuffled by `seed`; keys are the file names without extension,
    with the class in front where these are not unique. `shards`: how many at most.

    Raises DataError for a tree without class folders, a folder without images, or a file that is
    neither JPEG, PNG nor WebP.
    """
    files = list(_files(Path(source)))
    stems = [path.stem.replace(".", "_") for path, _ in files]
    if len(set(stems)) < len(stems):
        stems = [f"{path.parent.name}_{stem}" for (path, _), stem in zip(files, stems, strict=True)]
    order = shuffled(len(files), np.random.Philox(key=seed))
    samples = (_sample(*files[number], stems[number]) for number in order.tolist())
    per_shard = -(-len(files) // (shards or SHARDS[split]))
    return write_shards(
        samples, destination, f"{prefix}-{split}", split=split, samples_per_shard=per_shard
    )


def _files(source: Path) -> Iterator[tuple[Path, int]]:
    """Every image with its label, in the order of names."""
    if not source.is_dir():
        raise DataError(f"{source} is not a directory; expected one folder of images per class.")
    classes = sorted(path for path in source.iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{source} holds no folders; expected one folder of images per class.")
    for label, folder in enumerate(classes):
        images = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        if not images:
            raise DataError(
                f"{folder} holds no images. Fill it, or remove it: it counts as a class."
            )
        for path in images:
            if path.suffix.lower().lstrip(".") not in IMAGES:
                raise DataError(
                    f"{path} is not an image that can be sharded ({', '.join(IMAGES)}). Convert it "
                    "or move it out of the class folder."
                )
            yield path, label


def _sample(path: Path, label: int, key: str) -> Sample:
    return Sample(
        key=key,
        image=path.read_bytes(),
        extension=path.suffix.lower().lstrip("."),
        label=label,
        filename=f"{path.parent.name}/{path.name}",
        more={"class": path.parent.name},
    )
