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
from collections.abc import Iterable, Iterator, Sequence
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


def corrupted_jpeg(image: Image.Image, corruption: str, severity: int, key: str) -> bytes:
    """Return an image cropped, corrupted and encoded as in ImageNet-C.

    Random numbers depend on (key, corruption, severity) alone.

    Args:
        image: The clean image, RGB.
        corruption: One of `COMMON` or `EXTRA`.
        severity: One of `SEVERITIES`.
        key: The key of the image.
    """
    pixels = np.asarray(T.CenterCrop(CROP)(T.Resize(RESIZE)(image)))
    damaged = _corrupt(pixels, corruption, severity, key)
    jpeg = io.BytesIO()
    Image.fromarray(damaged).save(jpeg, "jpeg", quality=QUALITY, optimize=True)
    return jpeg.getvalue()


def _corrupt(pixels: np.ndarray, corruption: str, severity: int, key: str) -> np.ndarray:
    import cv2  # loaded with imagecorruptions, and both take a second
    from imagecorruptions import corrupt

    cv2.setNumThreads(0)  # its threads do not survive a fork, and workers are many already
    digest = hashlib.sha256(f"{key}\0{corruption}\0{severity}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
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

    def __len__(self) -> int:
        return len(self.clean)

    def read(self, sample: int) -> bytes:
        """Return the corrupted image as JPEG. Raises DataError if the clean one cannot be read."""
        key = self.keys_[sample]
        data = self.clean.read(sample)
        pixels = decode(data, 3, self.clean.name(sample)).permute(1, 2, 0).numpy()
        return corrupted_jpeg(Image.fromarray(pixels), self.corruption, self.severity, key)

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
        return hashlib.sha256(text.encode()).hexdigest()


def choose(
    corruptions: Sequence[str] | None, severities: Sequence[int] | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the corruptions and severities that are meant.

    None stands for the 15 common corruptions and for all five severities. "common", "extra" and
    "all" stand for lists. Raises DataError for a corruption or a severity that does not exist.
    """
    lists = {"common": COMMON, "extra": EXTRA, "all": COMMON + EXTRA}
    names = [n for c in corruptions or ("common",) for n in lists.get(c, (c,))]
    for name in names:
        if name not in lists["all"]:
            raise DataError(
                f"{name!r} is no corruption of ImageNet-C; expected common, extra, all, or some of "
                f"{', '.join(lists['all'])}"
            )
    levels = tuple(severities or SEVERITIES)
    if bad := [level for level in levels if level not in SEVERITIES]:
        raise DataError(f"severity {bad[0]} does not exist; expected some of 1 to 5")
    return tuple(dict.fromkeys(names)), tuple(sorted(set(levels)))
