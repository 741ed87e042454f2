"""The wrong answers of the highest confidence, and small pictures of them."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.classes import class_numbers
from flatcal_dist.calibration.report.parts import ConfidentError
from flatcal_dist.files import write_atomically

SHOWN = 24
SIDE = 112  # the longer side of a picture, in pixels
FOLDER = "errors"


def most_confident_errors(records: Records) -> list[ConfidentError]:
    """Return the `SHOWN` wrong answers of the highest confidence, highest first.

    `consistent` tells whether the answer is one of the labels that a second look found right (ReaL;
    Beyer et al., Are we done with ImageNet?, 2020). If so, the label is doubtful rather than the
    network. It is None if nobody looked again at the image, or if no label was found right.
    """
    wrong = np.flatnonzero(~records.correct)
    score, nll = records.before.log_confidence[wrong], records.before.column("nll")
    errors, number = [], class_numbers(records)
    for i in wrong[np.lexsort((records.id[wrong], -score))][:SHOWN]:
        again = -1 if records.real is None else int(records.real[i])
        errors.append(
            ConfidentError(
                id=str(records.id[i]),
                label=int(number[records.label[i]]),
                answer=int(number[records.prediction[i]]),
                confidence=float(records.before.confidence[i]),
                confidence_after_temperature=float(records.after.confidence[i]),
                label_probability=float(np.exp(-nll[i])),
                consistent=None if again < 0 else again == 1,
            )
        )
    return errors


def save_thumbnails(
    errors: list[ConfidentError], image_of: Callable[[str], bytes | None] | None, folder: Path
) -> None:
    """Write a picture folder/errors/NN.jpg for every error whose image is known.

    NN is the place of the error in the list. Images that Pillow cannot read are left out, because a
    picture is a help and not a result. Pictures of an earlier report are always removed, because
    they would be shown beside the wrong errors.

    Args:
        errors: The errors.
        image_of: Returns the encoded image of an id, or None. None: no picture is written.
        folder: The folder of the report.
    """
    for old in (folder / FOLDER).glob("*.jpg"):
        old.unlink()
    if image_of is None:
        return
    for place, error in enumerate(errors):
        data = image_of(error.id)
        picture = None if data is None else thumbnail(data)
        if picture is not None:
            with write_atomically(folder / FOLDER / f"{place:02d}.jpg") as temporary:
                temporary.write_bytes(picture)


def thumbnail(data: bytes) -> bytes | None:
    """Return a JPEG whose longer side has `SIDE` pixels. None if the bytes are no image.

    Smaller images, such as digits, are enlarged without smoothing.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB")
    except Exception:  # for a damaged file, Pillow raises errors of many kinds
        return None
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(scale * side)) for side in picture.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    out = io.BytesIO()
    picture.resize((width, height), how).save(out, "JPEG", quality=80, optimize=True)
    return out.getvalue()


def read_thumbnails(folder: Path, count: int) -> list[str | None]:
    """Return the pictures of the first `count` errors as data URIs, or None for a missing one."""
    files = [folder / FOLDER / f"{place:02d}.jpg" for place in range(count)]
    return [
        "data:image/jpeg;base64," + base64.b64encode(f.read_bytes()).decode()
        if f.is_file()
        else None
        for f in files
    ]
