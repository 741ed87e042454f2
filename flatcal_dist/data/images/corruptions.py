"""The corruptions of ImageNet-C, applied to clean images as they are read.

The published ImageNet-C was made from ImageNet's validation images. Their shorter side was resized
to 256, a centre crop of 224 was corrupted, and the result was stored as a JPEG of quality 85. Here
images are made in the same way, but by other code (the package imagecorruptions-imaug) and with
other random numbers. Figures on them are near the figures on the published files, but not the same.
They are labelled as generated.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations (ICLR 2019), section 4 and its published code.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torchvision.transforms import v2 as T

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.images.decode import decode

RESIZE, CROP, QUALITY = 256, 224, 85  # as the published images

COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # meant to choose settings on
SEVERITIES = (1, 2, 3, 4, 5)
OWN_SEED = ("impulse_noise", "glass_blur")  # do not draw from numpy's global stream


def corrupted_jpeg(
    data: bytes | memoryview, name: str, corruption: str, severity: int, key: str
) -> bytes:
    """Return an encoded image cropped, corrupted and encoded as in ImageNet-C.

    Random numbers depend on (key, corruption, severity) alone.

    Args:
        data: The clean image, in any format that shards hold.
        name: What names the image in errors.
        corruption: One of `COMMON` or `EXTRA`.
        severity: One of `SEVERITIES`.
        key: The key of the image.

    Raises:
        BadImage: The clean image cannot be decoded.
    """
    image = Image.fromarray(decode(data, 3, name).permute(1, 2, 0).numpy())
    pixels = np.asarray(T.CenterCrop(CROP)(T.Resize(RESIZE)(image)))
    damaged = _corrupt(pixels, corruption, severity, key)
    jpeg = io.BytesIO()
    Image.fromarray(damaged).save(jpeg, "jpeg", quality=QUALITY, optimize=True)
    return jpeg.getvalue()


def seed_of(corruption: str, severity: int, key: str) -> int:
    """Return a seed of 64 bits that depends on these alone."""
    digest = hashlib.sha256(f"{key}\0{corruption}\0{severity}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _corrupt(pixels: np.ndarray, corruption: str, severity: int, key: str) -> np.ndarray:
    import cv2  # loaded with imagecorruptions, and both take a second
    from imagecorruptions import corrupt

    cv2.setNumThreads(0)  # its threads do not survive a fork, and workers are many already
    seed = seed_of(corruption, severity, key) >> 32  # numpy's global stream takes 32 bits
    options = {"seed": seed} if corruption in OWN_SEED else {}
    with _numpy_seeded(seed):
        return corrupt(pixels, severity, corruption, **options)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed the global random stream of numpy inside, and restore it afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def require_package() -> None:
    """Raise DataError unless the corruptions can be computed here."""
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"corruptions need the package imagecorruptions-imaug ({error}): "
            "pip install 'flatcal_dist[corruptions]', or evaluate the published ImageNet-C"
        ) from None


@dataclass(frozen=True)
class Corrupted:
    """An index whose images are corrupted as they are read."""

    clean: ImageIndex
    keys_: tuple[str, ...]  # kept here: an Index would look each key up in the sidecar of its shard
    corruption: str
    severity: int
    corrupted: Callable[[bytes | memoryview, str, str, int, str], bytes]  # such as `corrupted_jpeg`

    def __len__(self) -> int:
        return len(self.clean)

    def read(self, sample: int) -> bytes:
        """Return the corrupted image, encoded. Raises DataError if the clean one cannot be read."""
        data, name, key = self.clean.read(sample), self.clean.name(sample), self.keys_[sample]
        return self.corrupted(data, name, self.corruption, self.severity, key)

    def announce(self, samples: Iterable[int]) -> None:
        self.clean.announce(samples)

    def name(self, sample: int) -> str:
        return f"{self.clean.name(sample)} ({self.corruption} {self.severity})"

    def key(self, sample: int) -> str:
        return self.keys_[sample]

    def keys(self) -> list[str]:
        return list(self.keys_)

    @property
    def label(self) -> np.ndarray:
        return self.clean.label

    @property
    def size(self) -> np.ndarray:
        """The bytes of each clean image."""
        return self.clean.size

    @property
    def identity(self) -> str:
        text = f"{self.clean.identity} {self.corruption} {self.severity}"
        if self.corrupted is not corrupted_jpeg:
            text += f" {self.corrupted.__name__}"
        return hashlib.sha256(text.encode()).hexdigest()


def choose(
    corruptions: Sequence[str] | None,
    severities: Sequence[int] | None,
    there: Sequence[str] = COMMON + EXTRA,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the corruptions and severities that are meant.

    Args:
        corruptions: Names; "common", "extra" and "all" stand for lists. None stands for "common".
        severities: None stands for all five.
        there: The corruptions that can be had.

    Raises:
        DataError: A corruption or a severity does not exist.
    """
    lists = {"common": COMMON, "extra": EXTRA, "all": COMMON + EXTRA}
    usual = {key: [name for name in names if name in there] for key, names in lists.items()}
    names = [n for c in corruptions or ("common",) for n in usual.get(c, (c,))]
    for name in names:
        if name not in there:
            known = "cannot be made of small images" if name in lists["all"] else "does not exist"
            raise DataError(
                f"the corruption {name!r} {known}; expected common, extra, all, or some of "
                f"{', '.join(there)}"
            )
    levels = tuple(severities or SEVERITIES)
    if bad := [level for level in levels if level not in SEVERITIES]:
        raise DataError(f"severity {bad[0]} does not exist; expected some of 1 to 5")
    return tuple(dict.fromkeys(names)), tuple(sorted(set(levels)))
