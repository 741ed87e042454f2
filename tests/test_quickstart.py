"""launch/quickstart.py: what it refuses, in words. launch/quickstart.sh shows what it does."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT


def refused(*words: str | Path) -> str:
    command = [sys.executable, str(ROOT / "launch/quickstart.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", ["--seeds", "--processes"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_number_that_is_none_is_refused(option, value, tmp_path):
    said = refused(tmp_path / "study", f"{option}={value}")
    assert f"{option}: '{value}' is not a number of 1 or more" in said
    assert not (tmp_path / "study").exists()


def test_a_directory_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "letter").write_text("dear all")
    assert f"as {tmp_path}/letter (File exists)" in refused(tmp_path / "letter")
    assert f"as {tmp_path}/letter/x (Not a directory)" in refused(tmp_path / "letter/x")


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "data/digits").mkdir(parents=True)
    (tmp_path / "seconds.json").write_text("{")
    assert "seconds.json cannot be read" in refused(tmp_path)
    (tmp_path / "seconds.json").unlink()
    (tmp_path / "runs/sgd-seed0").mkdir(parents=True)
    (tmp_path / "runs/sgd-seed0/state.json").write_text("{")
    assert "state.json cannot be read" in refused(tmp_path)
