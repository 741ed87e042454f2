"""What is written: whole files, cells that are no formulas, errors that name the file."""

import csv
import errno
import io
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from flatcal_dist import cli, files
from flatcal_dist.calibration.shift.report import read_shift
from flatcal_dist.config import Config
from flatcal_dist.files import (
    WriteError,
    csv_text,
    open_to_append,
    read_bytes,
    read_json,
    refuse_no_directory,
    write_json,
)
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.tracking.tracker import Tracker


def test_no_cell_is_a_formula_and_numbers_stay_numbers():
    formulas = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]
    cells = [*formulas, "plain", "a=b", "-0.5", "+3", "-1e-5", -0.5, None, 7]
    ((*row,),) = csv.reader(io.StringIO(csv_text([cells]), newline=""))
    expected = ["'" + cell.replace("\r", "\n") for cell in formulas]
    assert row == [*expected, "plain", "a=b", "-0.5", "+3", "-1e-5", "-0.5", "", "7"]


@contextmanager
def room(size: int):
    """Files cannot grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_said_with_the_file(tmp_path):
    write_json(tmp_path / "state.json", {"before": 1})
    with (
        room(100),
        pytest.raises(WriteError, match=r"state\.json cannot be written \(File too large"),
    ):
        write_json(tmp_path / "state.json", {"a": "x" * 1000})
    assert read_json(tmp_path / "state.json") == {"before": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"], "nothing is left"
    tracker = Tracker(Config(wandb={"mode": "disabled"}), tmp_path, 3, 0, active=True)
    tracker.log(1, {"train/loss": 0.5})
    with room(10), pytest.raises(WriteError, match=r"metrics\.jsonl cannot be written"):
        tracker.log(2, {"train/loss": 0.5})
    tracker.close()


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO]
)
def test_whatever_refuses_a_file_is_said_with_the_file(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", refuse)
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(WriteError, match=r"config\.yaml cannot be written") as error:
        directory.open(Config(), {})
    assert os.strerror(number) in str(error.value)


def test_what_the_block_itself_cannot_read_keeps_its_name(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="elsewhere"),
        files.write_atomically(tmp_path / "x.txt"),
    ):
        (tmp_path / "elsewhere").read_text()
    with (
        pytest.raises(IsADirectoryError),
        files.write_atomically(tmp_path / "x.txt"),
    ):
        Path("/etc").read_text()


def test_devices_directories_and_links_are_neither_replaced_nor_followed(tmp_path):
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    target.write_text("theirs")
    link.symlink_to(target)
    for path in (pipe, tmp_path):
        with pytest.raises(WriteError, match="no regular file"):
            write_json(path, 1)
        with pytest.raises(ValueError, match="no regular file"):
            read_bytes(path)
    with pytest.raises(WriteError, match="no regular file"):
        open_to_append(pipe)
    with pytest.raises(WriteError, match="is a symbolic link"):
        open_to_append(link)
    write_json(link, 1)
    assert (target.read_text(), link.is_symlink()) == ("theirs", False)
    stdout = tmp_path / "stdout"
    stdout.symlink_to("/proc/self/fd/1")
    with pytest.raises(WriteError, match="no regular file"):
        write_json(stdout, 1)
    assert stdout.is_symlink()


def test_a_name_that_is_no_text_can_be_written_about(tmp_path):
    write_json(tmp_path / "state.json", {"cause": "caf\udce9 is gone"})
    assert b"udce9" in (tmp_path / "state.json").read_bytes()


def test_a_place_for_results_is_looked_at_before_they_are_made(tmp_path):
    (tmp_path / "letter").write_text("dear all")
    (tmp_path / "gone").symlink_to("/nowhere")
    for path in (tmp_path, tmp_path / "a/b", Path("relative/x")):
        refuse_no_directory(path)
    assert not (tmp_path / "a").exists()
    for name, place in (("letter", "letter"), ("letter/a/b", "letter"), ("gone", "gone")):
        with pytest.raises(
            WriteError, match=rf"{name} cannot be written \(.*{place} is there, and"
        ):
            refuse_no_directory(tmp_path / name)
    with pytest.raises(SystemExit, match="letter is there, and no directory"):
        cli.main(["compare", "run", "run2", "--output", str(tmp_path / "letter")])


@pytest.mark.parametrize("content", ["[1]", "5", "null", "{"])
def test_reports_that_hold_something_else_are_named(tmp_path, content):
    report = tmp_path / "report"
    report.mkdir()
    for name in ("metrics.json", "shift.json"):
        (report / name).write_text(content)
    (report / "records.parquet").touch()
    with pytest.raises(ValueError, match=r"shift\.json is damaged"):
        read_shift(report)
    with pytest.raises(SystemExit, match=r"metrics\.json is damaged"):
        cli.main(["report", str(tmp_path)])
