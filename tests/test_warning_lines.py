"""What a user sees of warnings, and of a path that is not there, when a command is run."""

from pathlib import Path

import numpy as np

from tests.support.launching import flatcal


def test_warnings_are_lines_without_source(tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    np.savez(tmp_path / "sure.npz", logits=9.0 * np.eye(3)[labels], labels=labels)
    done = flatcal("report", tmp_path / "sure.npz")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    told = [line for line in lines if "no finite temperature minimises the NLL" in line]
    assert len(told) == 1
    assert told[0].startswith("warning: ")
    assert "RuntimeWarning" not in done.stdout
    assert ".py:" not in done.stdout


def test_a_report_on_what_is_not_there_says_so(tmp_path: Path) -> None:
    done = flatcal("report", tmp_path / "missing.csv")
    assert done.returncode == 1
    assert f"there is no {tmp_path / 'missing.csv'}" in done.stdout
    assert "metrics.json" not in done.stdout
