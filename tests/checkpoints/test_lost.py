"""A run that has lost its checkpoints does not begin again at step 0 unless it is told to."""

import shutil

import pytest

from flatcal_dist.config import Config, RunConfig
from flatcal_dist.data import prepare_digits
from flatcal_dist.runs.directory import RunDirectory, RunError
from flatcal_dist.training import resuming
from tests.support.jobs import Run


def config(path, start_again: int | None = None) -> Config:
    return Config(run=RunConfig(dir=str(path), start_again=start_again))


def begun(path, saved: int, step: int = 9) -> RunDirectory:
    directory = RunDirectory(path)
    state = directory.open(config(path), {})
    state.saved, state.step = saved, step
    directory.write(state)
    directory.lock.close()
    return directory


def test_a_run_that_had_a_checkpoint_says_what_to_do(tmp_path):
    directory = begun(tmp_path / "run", saved=8)
    with pytest.raises(RunError, match=r"(?s)had a checkpoint of step 8.*run\.start_again=1"):
        resuming._refuse_lost(directory, config(directory.path), ["step 8 is damaged"])
    with pytest.raises(RunError, match=r"run\.start_again=2 was for another start"):
        resuming._refuse_lost(directory, config(directory.path, 2), [])
    resuming._refuse_lost(directory, config(directory.path, 1), [])
    (directory.path / "state.json").unlink()
    directory.metrics_file.write_text('{"step": 3}\n')
    with pytest.raises(RunError, match=r"has records of steps in metrics\.jsonl"):
        resuming._refuse_lost(directory, config(directory.path), [])


def test_a_run_that_was_killed_before_its_first_checkpoint_loses_nothing(tmp_path):
    directory = begun(tmp_path / "run", saved=0)
    resuming._refuse_lost(directory, config(directory.path), [])


def test_a_start_again_that_has_no_effect_says_so(tmp_path):
    directory = begun(tmp_path / "run", saved=8)
    whole = directory.checkpoints / "step_00000008"
    said = resuming._not_again(directory, config(directory.path, 1), whole)
    assert said[0].startswith(f"run.start_again=1 has no effect: {whole} is whole")
    assert resuming._not_again(directory, config(directory.path, 1), None) == []
    for other in (None, 2):  # a job that is requeued says it at each start
        assert resuming._not_again(directory, config(directory.path, other), whole) == []


@pytest.mark.parametrize("loss", ["damaged", "removed"])
def test_a_requeued_job_does_not_begin_again_unattended(tmp_path, loss):
    data = prepare_digits(tmp_path / "digits")
    run = Run(tmp_path / "run", data)
    words = ("train.stop_after_minutes=0.0001",)

    def lose() -> None:
        if loss == "removed":
            shutil.rmtree(run.path / "checkpoints")
        else:
            for state in run.path.glob("checkpoints/step_*/state_*.pt"):
                state.write_bytes(state.read_bytes()[:-1] + b"?")

    assert run.start(*words, ranks=1).wait() == [75]
    assert (run.saved(), run.state()["saved"]) == ([1], 1)
    lose()
    before = (run.path / "state.json").read_bytes()
    assert run.start(*words, ranks=1).wait() == [1]
    assert "run.start_again=1" in run.log.read_text()
    assert (run.path / "state.json").read_bytes() == before, "nothing is changed"
    if loss == "removed":
        return
    told = (*words, "run.start_again=1")
    assert run.start(*told, ranks=1).wait() == [75]
    assert (run.saved(), run.state()["restarts"]) == ([1], 1), "from the beginning"
    assert (run.path / "checkpoints/damaged_step_00000001").is_dir(), "not thrown away"
    assert run.start(*told, ranks=1).wait() == [75], "a word that is over does no harm"
    assert (run.saved(), run.state()["restarts"]) == ([1, 2], 2)
    lose()
    assert run.start(*told, ranks=1).wait() == [1]
    assert "was for another start" in run.log.read_text()
