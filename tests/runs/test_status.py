"""The table of `flatcal status` in terminals of every width."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from flatcal_dist.runs.status import Status, print_status, status

RUNS = [
    Status(
        "/scratch/team/runs/resnet50_csam-1a2b3c4d", "running", 123456, 312800, 3, "n[001-016]",
        "4711_12", "running", 98765.0, 3.0, 1.2345,
        {"val/accuracy": 0.7712, "val/nll": 0.91, "val/ece": 0.0213},
    ),
    Status("runs/[bold]b", "failed", 5, 90, cause="rank 1: data.train: no such shard [red]x"),
]  # fmt: skip


def shown(width: int, runs: list[Status]) -> str:
    text = io.StringIO()
    print_status(runs, Console(file=text, width=width))
    return text.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200, 1000])
def test_values_are_never_split_and_fit_the_width(width):
    text = shown(width, RUNS)
    lines = text.splitlines()
    assert sum("resnet50" in line for line in lines) == 1
    first = next(line for line in lines if "resnet50" in line)
    for value in ("/scratch/team/runs/resnet50_csam-1a2b3c4d", "running", "123456/312800"):
        assert value in first
    if width >= 80:
        table = lines[: lines.index(first) + 2]
        assert all(len(line.rstrip()) <= width for line in table)
    assert ("no room for: " in text) == (width < 200)
    if width == 1000:
        for value in ("4711_12 running", "n[001-016]", "1 day, 3:26:05", "0:00:03 ago", "1.2345"):
            assert value in first
        assert "accuracy 0.7712, nll 0.9100, ece 0.0213" in first
    assert "runs/[bold]b" in text
    assert "data.train: no such shard [red]x" in text


def test_columns_that_say_nothing_are_left_out():
    header = shown(80, [Status("runs/a", "not begun")]).splitlines()[0]
    assert header.split() == ["run", "phase", "step"]


def test_status_imports_neither_torch_nor_matplotlib(tmp_path):
    """Their imports take seconds, and the state of a run is plain JSON and YAML."""
    (tmp_path / "state.json").write_text('{"phase": "preempted", "step": 30, "seconds": 60.0}')
    (tmp_path / "config.yaml").write_text("train: {max_steps: 90}\n")
    code = (
        "import sys; from flatcal_dist import cli; "
        f"cli.main(['status', {str(tmp_path)!r}]); "
        "sys.exit(', '.join({'torch', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "30/90" in done.stdout


def test_keys_of_earlier_versions_do_not_hide_the_length_of_a_run(tmp_path):
    (tmp_path / "state.json").write_text('{"phase": "finished", "step": 90}')
    (tmp_path / "config.yaml").write_text("train: {max_steps: 90, label_smoothing: 0.1}\n")
    assert status([tmp_path])[0].total_steps == 90


def test_a_recorded_section_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "state.json").write_text('{"phase": "finished", "step": 90}')
    (tmp_path / "config.yaml").write_text("train: {max_steps: many}\n")
    (one,) = status([tmp_path])
    assert one.phase == "unreadable"
    assert "config.yaml: the section train: max_steps" in one.cause
