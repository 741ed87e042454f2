"""The wrong answers given with the most confidence, and small pictures of them."""

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
SIDE = 112  # pixels of the longer side
FOLDER = "errors"


def most_confident_errors(records: Records) -> list[ConfidentError]:
    """The `SHOWN` wrong answers of the highest confidence, highest first.

    `consistent` tells whether the answer is among the labels that a second look found right (ReaL;
    Beyer et al., Are we done with ImageNet?, 2020): then the label is doubtful rather than the
    network. None where the image was not looked at again or had no such label.
    """
    wrong = np.flatnonzero(~records.correct)
    score = records.before.log_confidence[wrong]
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
                label_probability=float(np.exp(-records.before.nll[i])),
                consistent=None if again < 0 else again == 1,
            )
        )
    return errors


def save_thumbnails(
    errors: list[ConfidentError], image_of: Callable[[str], bytes | None] | None, folder: Path
) -> None:
    """Write folder/errors/NN.jpg for every error of which `image_of(id)` gives an encoded image.

    NN is the error's place in the list. What Pillow cannot read is left out: a picture is a help,
    not a result. Pictures of an earlier report are removed, also without `image_of`: they would
    be taken for these errors'.
    """
    for old in (folder / FOLDER).glob("*.jpg"):
        old.unlink()
    for place, error in enumerate(errors if image_of is not None else ()):
        data = image_of(error.id)
        picture = None if data is None else thumbnail(data)
        if picture is not None:
            with write_atomically(folder / FOLDER / f"{place:02d}.jpg") as temporary:
                temporary.write_bytes(picture)


def thumbnail(data: bytes) -> bytes | None:
    """A JPEG with a longer side of `SIDE` pixels; None if these bytes are no image.

    Images smaller than that (digits) are enlarged without smoothing.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB")
    except Exception:  # a damaged file raises nearly anything in Pillow
        return None
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(scale * side)) for side in picture.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    out = io.BytesIO()
    picture.resize(size, how).save(out, "JPEG", quality=80, optimize=True)
    return out.getvalue()


def read_thumbnails(folder: Path, count: int) -> list[str | None]:
    """The pictures of the first `count` errors as data URIs; None where there is none."""
    files = [folder / FOLDER / f"{place:02d}.jpg" for place in range(count)]
    return [
        "data:image/jpeg;base64," + base64.b64encode(f.read_bytes()).decode()
        if f.is_file()
        else None
        for f in files
    ]
