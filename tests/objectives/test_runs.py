"""Runs with objectives that pair samples and keep a history: restarts, ranks, engines."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from flatcal_dist import inputs
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints.format import CheckpointError
from flatcal_dist.config import ConfigError, load
from flatcal_dist.data import DataError
from flatcal_dist.objectives import CRL, CSKD, CrossEntropy, Focal
from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.training.objectives import refuse_unfit
from tests.support.jobs import Run, same, stop_after_six
from tests.support.launching import digits
from tests.support.reference import far, make_network, make_optimizer

WITH_CRL = ("objective.name=crl", "objective.weight=2.0")
SAM = ("sharpness.rule=sam", "optimizer.learning_rate=0.3")


@pytest.fixture(scope="module")
def data(digits_shards):
    return digits_shards


def pairs_are_of_one_class(rank):
    """Look at all that CS-KD is given: 10 classes have 5 pairs of odd images at most."""
    original = CSKD.losses

    def checked(self, output, targets):
        assert (targets.labels[0::2] != targets.labels[1::2]).sum() <= 5
        assert targets.samples.unique().numel() == len(targets)
        return original(self, output, targets)

    CSKD.losses = checked


def pairs_are_of_one_class_for_six_steps(rank):
    stop_after_six(rank)
    pairs_are_of_one_class(rank)


def history(run: Run, step: int | None = None) -> dict[str, torch.Tensor]:
    path = run.path / f"checkpoints/step_{step or run.saved()[-1]:08d}"
    return checkpoint.load_part(path, 0)["objective"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def stayed(data, tmp_path_factory) -> Run:
    """A run of CRL that never stopped, two and a half epochs long."""
    return Run(tmp_path_factory.mktemp("stayed") / "run", data, "ddp", *SAM, *WITH_CRL).finish()


def stopped_three_times(path, data) -> Run:
    """Inside of the first epoch, at its end, and inside of the second: after 18 steps."""
    run = Run(path, data, "ddp", *SAM, *WITH_CRL)
    for _ in range(3):
        assert run.start(fault=stop_after_six).wait() == [75, 75]
    return run


def test_a_history_is_kept_and_resumed_bit_for_bit(data, tmp_path, stayed):
    run = stopped_three_times(tmp_path / "run", data)
    middle = history(run, 18)
    assert int(middle["epochs"]) == 1
    assert 0 < int(middle["agreed"].sum()) <= 6 * 64
    assert len(middle["correct"]) == 800
    run.finish()
    assert same(run, stayed)
    assert equal(history(run), history(stayed))
    assert int(history(run)["epochs"]) == 2
    assert history(run)["correct"].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [
        ("fsdp2", 2),
        *(
            pytest.param(*other, marks=pytest.mark.exhaustive)
            for other in (("ddp", 1), ("zero2", 2), ("ddp", 4))
        ),
    ],
)
def test_a_history_goes_on_with_other_ranks_and_engines(data, tmp_path, stayed, engine, ranks):
    run = stopped_three_times(tmp_path / "run", data)
    run.finish(ranks=ranks, engine=engine)
    ours, theirs = history(run), history(stayed)
    assert int(ours["epochs"]) == 2
    # Rounding may turn a prediction that is a draw; a history that was lost or counted twice is
    # another one for most of the 800 images.
    for name in ("correct", "agreed"):
        assert (ours[name] != theirs[name]).sum() <= 2
    assert far(run.weights(), stayed.weights()) < 1e-4


def test_a_run_pairs_images_of_one_class_and_resumes(data, tmp_path):
    words = (*SAM, "objective.name=cs_kd")
    run = Run(tmp_path / "run", data, "ddp", *words)
    assert run.start(fault=pairs_are_of_one_class_for_six_steps).wait() == [75, 75]
    run.finish(fault=pairs_are_of_one_class)
    stayed = Run(tmp_path / "stayed", data, "ddp", *words).finish(fault=pairs_are_of_one_class)
    assert same(run, stayed)


def test_a_checkpoint_without_a_history_is_read_by_others_and_refused_by_crl(tmp_path):
    def step(objective):
        network = make_network()
        objective.begin(24, "cpu")
        engine = ReplicatedEngine(network, make_optimizer(network))
        return SharpnessAwareStep(engine, None, loss=objective)

    plain, history = (checkpoint.state_of(step(one)) for one in (CrossEntropy(), CRL()))
    assert "objective" not in plain
    for objective in (CrossEntropy(), Focal(), CSKD()):
        for state in (plain, history):
            checkpoint.fill_objective(step(objective), state.get("objective"), tmp_path)
    checkpoint.fill_objective(step(CRL()), history["objective"], tmp_path)
    with pytest.raises(CheckpointError, match=r"has no history of CRL.* or begin another run"):
        checkpoint.fill_objective(step(CRL()), plain.get("objective"), tmp_path)
    other = CRL()
    other.begin(25, "cpu")
    with pytest.raises(CheckpointError, match="of 24 samples, the training data has 25"):
        checkpoint.fill_objective(SimpleNamespace(loss=other), history["objective"], tmp_path)


def test_what_the_data_cannot_give_is_refused_with_the_remedy(data, tmp_path):
    PartialState()

    def check(objective, *overrides, ranks=2):
        name = f"objective.name={objective}"
        _, file, *words = digits("sam", tmp_path / "run", data, name, *overrides)
        config = load(file, words)
        train = inputs.open_training(config.data, 10)
        refuse_unfit(config.objective.build(), config, train, ranks)

    for objective in ("crl", "cs_kd", "focal", "cross_entropy", "label_smoothing"):
        check(objective)
        check(objective, "data.micro_batch_size=8", ranks=4)
    stream = "data.reader=streaming"
    check("mmce")
    check("mmce", "data.micro_batch_size=16", "objective.accumulation=second_pass")
    with pytest.raises(DataError, match=r"name=mmce compares all .* 2 micro-batches on each of 2"):
        check("mmce", "data.micro_batch_size=16")
    for objective in ("crl", "cs_kd"):
        with pytest.raises(ConfigError, match=rf"name={objective} needs .* data\.reader=indexed"):
            check(objective, stream)
    check("focal", stream)
    for objective in ("crl", "cs_kd"):
        with pytest.raises(ConfigError, match="defined for hard labels only"):
            check(objective, "mixing.name=mixup")
        with pytest.raises(DataError, match="compares pairs of images, but 66 images on 2 ranks"):
            check(objective, "data.global_batch_size=66")
    check("focal", "data.global_batch_size=66")
