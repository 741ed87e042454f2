"""Small studies, in files as users write them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launching import ROOT


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """Write a study of the digits: its text after `base` and `directory`."""

    def write(text: str) -> Path:
        file = tmp_path / "study.yaml"
        base = f"{ROOT}/configs/digits/sgd.yaml"
        file.write_text(f"base: {base}\ndirectory: {tmp_path}/runs\n{text}")
        return file

    return write
