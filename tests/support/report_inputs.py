"""What a report may be given beside records: pictures, shift, the log of a training."""

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from flatcal_dist.calibration.records.records import Records, Source
from flatcal_dist.calibration.shift.report import Shifted, save_shifted, write_shift
from flatcal_dist.calibration.shift.rows import measure
from tests.support.synthetic import make_logits

CORRUPTIONS = ("fog", "gaussian_noise", "jpeg_compression")
TRAINING = [
    {"step": 10, "train/loss": 0.7},
    *(
        {
            "step": 10 * e, "epoch": e, "val/accuracy": 0.5 + 0.04 * e, "val/auroc": 0.9 - 0.01 * e,
            "val/mean_entropy": 1.2 / e, "val/mean_entropy_correct": 1 / e,
            "val/mean_entropy_wrong": 2 / e, "val/ece": None if e == 2 else 0.02 * e,
        }
        for e in range(1, 6)
    ),
]  # fmt: skip


def encoded_digit(name: str) -> bytes:
    """A small gray PNG that depends on the name alone."""
    pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (8, 8), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_some_shift(clean: Records, folder: Path) -> None:
    """shift.json beside a report of `clean`: a set of other images, and corrupted ones."""
    rows = []
    for name, corruption, severity in [
        ("elsewhere", None, None),
        *(("digits-c", c, s) for c in CORRUPTIONS for s in (1, 3)),
    ]:
        ids, labels, logits = make_logits(120, images_seed=severity or 7)
        source = Source(
            name=name, kind=name, corruption=corruption, severity=severity, generated=True
        )
        records = Records.from_logits(ids, labels, logits * 1.5, clean=clean, source=source)
        rows.append(save_shifted(Shifted(records, "0" * 64), folder))
    write_shift(measure(clean, "1" * 64, Path("records.parquet")), rows, folder)
