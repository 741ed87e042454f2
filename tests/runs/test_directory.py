"""The run directory and the log in it."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from flatcal_dist import files
from flatcal_dist.config import Config, RunConfig, load
from flatcal_dist.runs import directory as run_directory
from flatcal_dist.runs.directory import RunDirectory, RunError
from flatcal_dist.tracking.tracker import Tracker, read_metrics
from flatcal_dist.training import finishing


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(run=RunConfig(dir=str(tmp_path / "run")), wandb={"mode": "disabled"})


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_directory, "LOCK_PATIENCE", 0.2)


def test_another_configuration_is_refused_and_nothing_is_written(config):
    directory = RunDirectory(config.run.dir)
    directory.check(config)
    assert not directory.path.exists()
    directory.open(config, {})
    directory.check(config)
    sharpness = load(None, ["sharpness.rule=sam", "sharpness.rho=0.5"]).sharpness
    other = config.model_copy(update={"sharpness": sharpness})
    with pytest.raises(RunError, match=r"sharpness.rule: the run has 'none', now 'sam'"):
        directory.check(other)


def test_a_directory_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    RunDirectory(tmp_path / "run").check(config)
    (tmp_path / "run/thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"holds files but no config\.yaml"):
        RunDirectory(tmp_path / "run").check(config)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b" \n")])
def test_a_run_whose_configuration_is_lost_is_told_how_to_get_it_back(config, damage):
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    damage(directory.config_file)
    with pytest.raises(RunError, match=r"config\.yaml.*: the command .*, with --print-config > "):
        directory.check(config)


@pytest.mark.parametrize("text", ["of_another_version: 3\n", "run: [\n"])
def test_a_recorded_configuration_that_cannot_be_read_says_how_to_go_on(config, text):
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    directory.config_file.write_text(text)
    with pytest.raises(
        RunError, match=r"(?s)config\.yaml.*the version that environment\.json names"
    ):
        directory.check(config)


def test_restarts_are_counted_and_the_first_cause_is_kept(config):
    directory = RunDirectory(config.run.dir)
    assert directory.open(config, {}).restarts == 0
    assert directory.fail("disk full", rank=1) == "rank 1: disk full"
    assert directory.fail("connection closed", rank=0) == "rank 1: disk full"
    directory.lock.close()
    state = directory.open(config, {})
    assert (state.restarts, state.phase, state.cause) == (1, "running", None)


def test_a_start_that_has_not_entered_records_nothing(config):
    """A second job whose configuration is wrong must not end the first one."""
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    other = RunDirectory(config.run.dir)
    assert other.fail("wrong key", rank=0) == "wrong key"
    other.interrupt("SIGTERM")
    assert directory.state().phase == "running"
    other.enter()
    assert other.fail("disk full", rank=1) == "rank 1: disk full"
    assert directory.state().phase == "failed"


def test_a_second_job_is_refused_and_told_who_is_there(config):
    first, second = RunDirectory(config.run.dir), RunDirectory(config.run.dir)
    first.open(config, {})
    with pytest.raises(
        RunError, match=rf"in use by another job \(host .*, process {os.getpid()}\)"
    ):
        second.open(config, {})
    assert f"process {os.getpid()}" in second.in_use()
    first.lock.close()
    assert second.in_use() is None
    assert second.open(config, {}).restarts == 1


def test_a_job_that_is_just_ending_is_waited_for(config, monkeypatch):
    """Killed with SIGKILL it may hold the lock for a while; and those who look hold it a moment."""
    monkeypatch.setattr(run_directory, "LOCK_PATIENCE", 30.0)
    first, second = RunDirectory(config.run.dir), RunDirectory(config.run.dir)
    first.open(config, {})
    threading.Timer(0.3, first.lock.close).start()
    assert second.open(config, {}).restarts == 1


def test_what_a_start_left_that_never_began_is_no_hindrance(config, tmp_path):
    directory = RunDirectory(config.run.dir)
    directory.claim()  # and then it was killed, or found no room for config.yaml
    directory.lock.close()
    directory.stop_file.touch()  # asked for while the job was in the queue
    again = RunDirectory(config.run.dir)
    again.check(config)
    assert again.open(config, {}).restarts == 0
    (directory.checkpoints / "step_00000001").mkdir()
    directory.config_file.unlink()
    with pytest.raises(RunError, match=r"holds files but no config\.yaml"):
        again.check(config)


def test_how_a_run_ended_is_said_once(config):
    """An interrupted rank ends at once; those it leaves see a lost connection, and may be first."""
    directory = RunDirectory(config.run.dir)
    state = directory.open(config, {})
    assert directory.interrupt("SIGTERM") == "SIGTERM"
    assert directory.fail("connection closed", rank=0) == "SIGTERM"
    assert (directory.state().phase, directory.state().cause) == ("preempted", "SIGTERM")
    state.phase = "finished"
    directory.write(state)
    directory.interrupt("SIGTERM")  # while W&B was ending, say
    assert directory.state().phase == "finished"


def test_an_unreadable_environment_is_named(config):
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    (directory.path / "environment.json").write_text("{")
    with pytest.raises(RunError, match=r"environment\.json cannot be read"):
        directory.check_data({}, "pil 1")


@pytest.mark.parametrize(
    "content", ['{"decoder": 5}', '{"decoder": " "}', '{"train_data": 7}', '{"train_data": null}']
)
def test_an_environment_of_other_kinds_is_named(config, content):
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    (directory.path / "environment.json").write_text(content)
    with pytest.raises(RunError, match=r"environment\.json cannot be read \((deco|train_)"):
        directory.check_data({"train_data": "a" * 64}, "pil 1")


@pytest.mark.parametrize("name", [*run_directory.FILES, *run_directory.DIRECTORIES])
def test_what_stands_in_the_way_is_named_before_any_work(config, name):
    """At the end of a training it would be too late."""
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    directory.lock.close()
    path = directory.path / name
    path.rename(directory.path / "was") if path.exists() else None
    path.touch() if name in run_directory.DIRECTORIES else path.mkdir()
    with pytest.raises(RunError, match=rf"{name} is no (file|directory), .*: move what lies there"):
        directory.check(config)
    path.rmdir() if path.is_dir() else path.unlink()
    path.symlink_to("/nowhere")
    with pytest.raises(RunError, match=rf"{name} is a symbolic link to /nowhere, which is not"):
        directory.check(config)


def test_other_data_is_refused(config):
    directory = RunDirectory(config.run.dir)
    directory.check_data({"train_data": "a" * 64}, "pil 1")
    directory.open(config, {"train_data": "a" * 64})
    directory.check_data({"train_data": "a" * 64}, "pil 1")
    with pytest.raises(RunError, match="begun with other data: train_data was aaaa"):
        directory.check_data({"train_data": "b" * 64}, "pil 1")


def test_another_decoder_is_refused_and_another_version_is_not(config):
    directory = RunDirectory(config.run.dir)
    directory.open(config, {"decoder": "simplejpeg 1.9.0"})
    directory.check_data({}, "simplejpeg 2.0.0")
    with pytest.raises(
        RunError, match=r"begun with the decoder simplejpeg 1\.9\.0, here it is pil"
    ):
        directory.check_data({}, "pil 13.0.0")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"a/../b", b"x" * 5000, b"a b"])
def test_an_id_that_is_none_of_w_and_b_is_no_id(config, content):
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    assert directory.wandb_id() is None
    directory.wandb_id_file.write_bytes(content)
    assert directory.wandb_id() is None
    directory.wandb_id_file.write_text("abcd1234\n")
    assert directory.wandb_id() == "abcd1234"


def test_an_unreadable_state_is_named(config):
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})
    (directory.path / "state.json").write_text("{")
    with pytest.raises(RunError, match=r"state.json cannot be read"):
        directory.state()


def test_a_file_that_may_not_be_read_is_not_to_be_deleted(config, monkeypatch):
    """It may hold what it should."""
    directory = RunDirectory(config.run.dir)
    directory.open(config, {})

    def refuse(path: Path, *_: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "read_bytes", refuse)
    monkeypatch.setattr(run_directory, "read_bytes", refuse)
    for read in (directory.state, directory.environment):
        with pytest.raises(RunError, match=r"json cannot be read \(Permission denied\); mend its"):
            read()


def test_a_torn_last_line_does_not_spoil_the_next_one(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tr')
    tracker = Tracker(config, tmp_path, total_steps=3, start=2, active=True)
    tracker.log(2, {"train/loss": 0.5, "train/bad": float("nan")})
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1},
        {"step": 2, "train/loss": 0.5, "train/bad": None},
    ]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1:]:
        json.loads(line)


def test_a_log_that_is_removed_while_the_run_goes_on_is_begun_anew(config, tmp_path, capsys):
    tracker = Tracker(config, tmp_path, total_steps=3, start=0, active=True)
    tracker.log(1, {"train/loss": 0.5})
    tracker.path.unlink()
    tracker.log(2, {"train/loss": 0.4})
    tracker.log(3, {"train/loss": 0.3})
    tracker.close()
    assert [record["step"] for record in read_metrics(tracker.path)] == [2, 3]
    assert capsys.readouterr().out.count("was removed: a new one begins with step 2") == 1


def test_a_log_whose_directory_is_gone_leaves_the_word_to_the_directory(config, tmp_path):
    (tmp_path / "run").mkdir()
    tracker = Tracker(config, tmp_path / "run", total_steps=3, start=0, active=True)
    shutil.rmtree(tmp_path / "run")
    tracker.log(1, {"train/loss": 0.5})
    tracker.close()


def test_a_sink_that_cannot_start_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
    def no_process(*_, **__):
        raise OSError("cannot allocate memory")

    monkeypatch.setattr("subprocess.Popen", no_process)
    tracker = Tracker(Config(), tmp_path, total_steps=3, start=0, active=True)
    tracker.log(1, {"train/loss": 0.5})
    tracker.log(2, {"train/loss": 0.4})
    tracker.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capsys.readouterr().out.count("W&B did not start") == 1


def test_a_finished_run_says_how_to_make_what_it_lacks(config):
    directory = RunDirectory(config.run.dir)
    made = finishing.missing(config, directory)
    assert made.endswith(
        f"flatcal export {directory.path} {directory.weights_file} && "
        f"flatcal evaluate {directory.path}"
    )
    directory.report.mkdir(parents=True)
    (directory.report / "metrics.json").touch()
    assert "evaluate" not in finishing.missing(config, directory)
    directory.weights_file.touch()
    assert finishing.missing(config, directory) == ""
