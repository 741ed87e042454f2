"""Shards of real images that need no download: the handwritten digits of scikit-learn.

The data are 1,797 gray images of 8x8 pixels in ten classes (the test part of UCI's "Optical
Recognition of Handwritten Digits"). The protocol:

- A seeded permutation chooses 800 images for training. The other 997 are the validation split and
  do not change.
- 20 % of the training labels, exactly 160, are wrong: each is replaced by one of the nine other
  classes, uniformly at random. In this setting the effect of sharpness-aware training is clearest
  on little data (Foret et al. 2021, section 3.3, flip a fraction of CIFAR-10's training labels and
  keep the test labels). Some authors draw the new label from all ten classes, so that a tenth of
  these labels are right. Here the rate is exact.
- Only the label for training (`.cls`) is noisy. The json member keeps the true one as
  `clean_label`.
- Pixels 0..16 are stored as round(value * 255 / 16) in 8-bit PNGs, which round(stored * 16 / 255)
  undoes exactly.
- Keys are `digits_0000` to `digits_1796`, which count the images in the order of scikit-learn.
"""

import io
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.order import shuffled
from flatcal_dist.data.shards.index import load_index
from flatcal_dist.data.shards.regular import read_regular
from flatcal_dist.data.shards.writing import Sample, write_shards

SEED = 1  # 0 chooses 58 zeros where 79 are expected, as one seed in a thousand does
IMAGES = 1797
TRAIN_IMAGES = 800
NOISE = 0.2  # share of the training labels
CLASSES = 10

# Two ranks with two workers find one shard each. The loader does not need this.
SHARDS = {"train": 4, "validation": 2}


def prepare_digits(directory: Path, *, label_noise: float = NOISE, seed: int = SEED) -> Path:
    """Write the shards of the digits, unless they are there.

    The directory gets digits-train-{0000..0003}.tar, digits-validation-{0000..0001}.tar, their
    indexes, `_info.json` for timm, and `digits.json` with the parameters. It appears whole, by
    rename, so any number of processes may call this function at once.

    Args:
        directory: Where the shards will lie.
        label_noise: The share of training labels that are wrong.
        seed: The seed of the split and of the wrong labels.

    Returns:
        The directory.

    Raises:
        DataError: The directory holds something else, only a part of the digits, or digits with
            other parameters.
    """
    if not 0 <= label_noise <= 1:
        raise DataError(f"label_noise is a fraction of the labels, 0 to 1, not {label_noise}.")
    directory = Path(directory)
    parameters = {"seed": seed, "label_noise": label_noise, "train_images": TRAIN_IMAGES}
    if _holds_anything(directory):
        _check(directory, parameters)
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        for split, samples in _splits(label_noise, seed).items():
            per_shard = -(-len(samples) // SHARDS[split])
            write_shards(
                samples, temporary, f"digits-{split}", split=split, samples_per_shard=per_shard
            )
        (temporary / "digits.json").write_text(json.dumps(parameters) + "\n")
        try:
            temporary.rename(directory)
        except OSError:
            if not _holds_anything(directory):
                raise
            _check(directory, parameters)  # another process was faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _holds_anything(directory: Path) -> bool:
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def _check(directory: Path, parameters: dict[str, float]) -> None:
    shards = {
        split: [directory / f"digits-{split}-{i:04d}.tar" for i in range(count)]
        for split, count in SHARDS.items()
    }
    mend = _mend(directory)
    needed = [*shards["train"], *shards["validation"], directory / "_info.json"]
    missing = [path.name for path in [directory / "digits.json", *needed] if not path.exists()]
    if missing:
        raise DataError(
            f"{directory} exists but does not hold the digits: {', '.join(missing)} not found. "
            f"{mend}"
        )
    try:
        found = json.loads(read_regular(directory / "digits.json", 1 << 16))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{directory / 'digits.json'} cannot be read ({error}). {mend}") from error
    if found != parameters:
        raise DataError(
            f"{directory} holds the digits with other parameters: {found}, asked for {parameters}. "
            f"{mend}"
        )
    try:
        counts = [len(load_index(paths, CLASSES)) for paths in shards.values()]
    except DataError as error:
        raise DataError(f"{directory} holds damaged digits: {error} {mend}") from error
    if counts != [TRAIN_IMAGES, IMAGES - TRAIN_IMAGES]:
        raise DataError(f"{directory} holds {counts} digits, expected [800, 997]. {mend}")


def _mend(directory: Path) -> str:
    """Say how to mend a directory that is not as expected; it may hold the data of a user."""
    ours = re.compile(r"digits-(train|validation)(-\d{4}\.tar(\.index)?|\.sha256)|_info\.json")
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else {"a file"}
    strange = [name for name in names - {"digits.json"} if not ours.fullmatch(name)]
    if "digits.json" in names and not strange:
        return "Delete the directory to have it written again, or choose another one."
    return (
        "This program did not write what is there, and leaves it as it is. Set "
        "data.prepare=null to train on your shards; for the digits, name a directory that does not "
        "exist yet."
    )


def _splits(label_noise: float, seed: int) -> dict[str, list[Sample]]:
    from sklearn.datasets import load_digits  # takes a second to import

    pixels, truth = load_digits(return_X_y=True)
    generator = np.random.Philox(key=seed)
    chosen = shuffled(len(truth), generator)
    train, validation = chosen[:TRAIN_IMAGES], np.sort(chosen[TRAIN_IMAGES:])
    noisy = train[shuffled(TRAIN_IMAGES, generator)[: round(label_noise * TRAIN_IMAGES)]]
    labels = truth.astype(np.int64)
    shift = 1 + (generator.random_raw(len(noisy)) % (CLASSES - 1)).astype(np.int64)
    labels[noisy] = (labels[noisy] + shift) % CLASSES
    return {
        "train": list(_samples(pixels, truth, labels, train)),
        "validation": list(_samples(pixels, truth, labels, validation)),
    }


def _samples(
    pixels: np.ndarray, truth: np.ndarray, labels: np.ndarray, numbers: np.ndarray
) -> Iterator[Sample]:
    for number in numbers.tolist():
        gray = np.round(pixels[number].reshape(8, 8) * 255 / 16).astype(np.uint8)
        png = io.BytesIO()
        Image.fromarray(gray).save(png, "png")
        yield Sample(
            key=f"digits_{number:04d}",
            image=png.getvalue(),
            extension="png",
            label=int(labels[number]),
            filename=f"load_digits[{number}]",
            more={"clean_label": int(truth[number])},
        )
