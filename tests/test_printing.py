"""A closed, full or narrow output: printing may fail, what was asked for is done all the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flatcal_dist.ranks.distributed import describe
from tests.support.launching import ROOT, command, digits

PRINT = """
import os, sys, warnings
from flatcal_dist.printing import never_fail, problem_of_output
never_fail()
from rich.console import Console
for number in range(20000):
    print("a line that is long enough to fill buffers", number)
Console().print("[bold]rich[/bold]")
Console(stderr=True).print("rich")
warnings.warn("a warning")
print("to stderr", file=sys.stderr)
sys.stdout.flush(), sys.stderr.flush()
descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(descriptor, b"done" if problem_of_output() is None else b"problem")
assert descriptor > 2
"""


@pytest.fixture(scope="module")
def data(digits_shards: Path) -> Path:
    return digits_shards


def shell(line: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=170,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirection", "expected"),
    [
        ("| head -n 3", "done"),
        ("2>&1 | head -n 3", "done"),
        (">/dev/full", "problem"),
        ("2>/dev/full", "done"),
        (">&-", "done"),
        ("2>&-", "done"),
        ("<&- >&- 2>&-", "done"),
    ],
)
def test_printing_goes_on(redirection, expected, tmp_path):
    (tmp_path / "p.py").write_text(PRINT)
    line = f"{sys.executable} p.py file {redirection}; exit ${{PIPESTATUS[0]}}"
    done = shell(line, tmp_path)
    assert done.returncode == 0, done
    assert (tmp_path / "file").read_text() == expected
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_letters_that_the_terminal_does_not_know(tmp_path):
    line = f'PYTHONIOENCODING=ascii {sys.executable} -c "from flatcal_dist import printing as p; '
    done = shell(line + "p.never_fail(); print('\\u00e9')\"", tmp_path)
    assert (done.returncode, done.stdout) == (0, "\\xe9\n")


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    """What is asked for by `python -u` in jobs, whose process may be killed at any time."""
    code = "import os; from flatcal_dist import printing as p; p.never_fail(); print('a'); "
    done = shell(f'{sys.executable} -u -c "{code} os._exit(0)"', tmp_path)
    assert done.stdout == "a\n"


@pytest.mark.parametrize(
    "redirection",
    ["2>&1 | head -n 1", pytest.param(">/dev/full 2>&1", marks=pytest.mark.exhaustive)],
)
def test_a_run_ends_well_when_nobody_reads(redirection, data, tmp_path):
    options = ("train.max_steps=30", "train.log_every_steps=1")
    words = command("imagenet_sam", *digits("sam", tmp_path / "run", data, *options), processes=1)
    line = " ".join(f"'{word}'" for word in words)
    done = shell(f"{line} {redirection}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run/state.json").read_text())["phase"] == "finished"


def test_commands_end_quietly_when_the_reader_has_gone(tmp_path):
    flatcal = f"{sys.executable} -m flatcal_dist.cli"
    line = f"{flatcal} status {' '.join(['no'] * 3000)} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = shell(line, tmp_path)
    assert done.stdout.splitlines()[-1] == "1"  # these are no runs
    assert done.stderr == ""


@pytest.mark.exhaustive
def test_what_a_command_printed_has_to_have_arrived(tmp_path):
    done = shell(f"{sys.executable} -m flatcal_dist.cli environment > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output cannot be written: ")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("from flatcal_dist.printing import never_fail as start", "interrupted: the same command"),
        (
            "from flatcal_dist.ranks.launcher import end_with_the_launcher as start",  # of a recipe
            "interrupted before the work began: the same command",
        ),
    ],
)
@pytest.mark.parametrize("moment", ["raise KeyboardInterrupt", "os.kill(os.getpid(), 2)"])
def test_ctrl_c_leaves_a_line_and_no_traceback(start, said, moment):
    code = f"import os\n{start}\nstart()\n{moment}\nimport time; time.sleep(60)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        restore_signals=True, preexec_fn=lambda: signal.signal(2, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT  # by which a shell ends its script too
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1


def test_an_interruption_of_pythons_own_is_named():
    assert describe(KeyboardInterrupt()).startswith("interrupted by SIGINT;")
    assert describe(KeyboardInterrupt("SIGUSR1")).startswith("interrupted by SIGUSR1;")
