"""Runs with objectives that pair samples and keep a history: restarts, ranks, engines."""

import pytest
import torch
from accelerate import PartialState

from flatcal_dist import inputs
from flatcal_dist.config import load
from flatcal_dist.data import DataError, prepare_digits
from flatcal_dist.objectives import CRL, CSKD, CrossEntropy, Focal
from flatcal_dist.training import checkpoint, loop, main
from flatcal_dist.training.objectives import refuse_unfit
from tests.launching import digits
from tests.sharpness.reference import far
from tests.training.jobs import Run, same, stop_after_six

SAM = ("sharpness.rule=sam", "optimizer.learning_rate=0.3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def minimize(objective) -> None:
    """Let the run that this rank is about to begin have this objective."""
    original = loop.run
    main.run = lambda *arguments: original(*arguments, objective=objective)


def with_crl(rank):
    minimize(CRL(weight=2.0))


def with_crl_six_steps(rank):
    stop_after_six(rank)
    with_crl(rank)


class Checked(CSKD):
    """CS-KD that wants partners of one class: 10 classes have 5 pairs of odd ones at most."""

    def losses(self, output, targets):
        assert (targets.labels[0::2] != targets.labels[1::2]).sum() <= 5
        assert targets.samples.unique().numel() == len(targets)
        return super().losses(output, targets)


def with_cs_kd(rank):
    minimize(Checked())


def with_cs_kd_six_steps(rank):
    stop_after_six(rank)
    with_cs_kd(rank)


def history(run: Run, step: int | None = None) -> dict[str, torch.Tensor]:
    path = run.path / f"checkpoints/step_{step or run.saved()[-1]:08d}"
    return checkpoint.load_part(path, 0)["objective"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def stayed(data, tmp_path_factory) -> Run:
    """A run of CRL that never stopped, two and a half epochs long."""
    path = tmp_path_factory.mktemp("stayed") / "run"
    return Run(path, data, "ddp", *SAM).finish(fault=with_crl)


def test_a_history_is_kept_and_resumed_bit_for_bit(data, tmp_path, stayed):
    """Stopped inside of the first epoch, at its end, and inside of the second."""
    run = Run(tmp_path / "run", data, "ddp", *SAM)
    for _ in range(3):
        assert run.start(fault=with_crl_six_steps).wait() == [75, 75]
    assert run.state()["step"] == 18
    job = run.start()
    assert job.wait() == [0, 0], "cross-entropy needs no history, and may ignore one"
    path = run.path / "checkpoints/step_00000030"
    assert "objective" not in checkpoint.load_part(path, 0)

    run = Run(tmp_path / "again", data, "ddp", *SAM)
    for _ in range(3):
        assert run.start(fault=with_crl_six_steps).wait() == [75, 75]
    middle = history(run, 18)
    assert int(middle["epochs"]) == 1
    assert 0 < int(middle["agreed"].sum()) <= 6 * 64
    assert len(middle["correct"]) == 800
    run.finish(fault=with_crl)
    assert same(run, stayed)
    assert equal(history(run), history(stayed))
    assert int(history(run)["epochs"]) == 2
    assert history(run)["correct"].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 1), ("zero2", 2), ("fsdp2", 2), ("ddp", 4)])
def test_a_history_goes_on_with_other_ranks_and_engines(data, tmp_path, stayed, engine, ranks):
    run = Run(tmp_path / "run", data, "ddp", *SAM)
    for _ in range(3):
        assert run.start(fault=with_crl_six_steps).wait() == [75, 75]
    run.finish(fault=with_crl, ranks=ranks, engine=engine)
    ours, theirs = history(run), history(stayed)
    assert int(ours["epochs"]) == 2
    # Rounding may turn a prediction that is a draw; a history that was lost or counted twice is
    # another one for most of the 800 images.
    for name in ("correct", "agreed"):
        assert (ours[name] != theirs[name]).sum() <= 2
    assert far(run.weights(), stayed.weights()) < 1e-4


def test_a_run_pairs_images_of_one_class_and_resumes(data, tmp_path):
    run = Run(tmp_path / "run", data, "ddp", *SAM)
    assert run.start(fault=with_cs_kd_six_steps).wait() == [75, 75], run.start().output()
    run.finish(fault=with_cs_kd)
    other = Run(tmp_path / "stayed", data, "ddp", *SAM).finish(fault=with_cs_kd)
    assert same(run, other)


def test_a_checkpoint_without_a_history_is_refused(data, tmp_path):
    run = Run(tmp_path / "run", data, "ddp", *SAM)
    assert run.start(fault=stop_after_six).wait() == [75, 75]
    for engine in ("ddp", "fsdp2"):
        job = run.start(fault=with_crl, engine=engine)
        assert 0 not in job.wait()
        assert "it has no history of CRL" in job.output()
    run.finish()


def test_what_the_data_cannot_give_is_refused_with_the_remedy(data, tmp_path):
    PartialState()

    def check(objective, *overrides, ranks=2):
        _, file, *words = digits("sam", tmp_path / "run", data, *overrides)
        config = load(file, words)
        refuse_unfit(objective, config, inputs.open_training(config.data, 10), ranks)

    for objective in (CRL(), CSKD(), Focal(), CrossEntropy()):
        check(objective)
        check(objective, "data.micro_batch_size=8", ranks=4)
    stream = "data.reader=streaming"
    with pytest.raises(DataError, match=r"CRL keeps a history .* data\.reader=indexed"):
        check(CRL(), stream)
    with pytest.raises(DataError, match=r"CSKD compares images of one class.* data\.reader="):
        check(CSKD(), stream)
    check(Focal(), stream)
    for objective in (CRL(), CSKD(), Focal()):
        name = type(objective).__name__
        with pytest.raises(DataError, match=f"{name} is defined for hard labels only"):
            check(objective, "data.mixup=0.2")
    check(CrossEntropy(), "data.mixup=0.2")
    for objective in (CRL(), CSKD()):
        with pytest.raises(DataError, match="compares pairs of images, but 66 images on 2 ranks"):
            check(objective, "data.global_batch_size=66")
    check(Focal(), "data.global_batch_size=66")
