"""What a user sees of warnings, and of a path that is not there, when a command is run."""

import subprocess
import sys
from pathlib import Path

import numpy as np


def command(*words: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "flatcal_dist.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240)


def test_warnings_are_lines_without_source(tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    np.savez(tmp_path / "sure.npz", logits=9.0 * np.eye(3)[labels], labels=labels)
    done = command("report", tmp_path / "sure.npz")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    told = [line for line in lines if "no finite temperature minimises the NLL" in line]
    assert len(told) == 1
    assert told[0].startswith("warning: ")
    assert "RuntimeWarning" not in done.stderr
    assert ".py:" not in done.stderr


def test_a_report_on_what_is_not_there_says_so(tmp_path: Path) -> None:
    done = command("report", tmp_path / "missing.csv")
    assert done.returncode == 1
    assert f"there is no {tmp_path / 'missing.csv'}" in done.stderr
    assert "metrics.json" not in done.stderr
