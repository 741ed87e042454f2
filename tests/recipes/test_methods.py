"""Every rule and every objective in the digits recipe: ranks, engines, restarts, combinations."""

import math
from itertools import product

import pytest
import torch

from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.config import ConfigError, load, method_of
from flatcal_dist.config.choice_sections import AVERAGES, MIXING, OBJECTIVES, RULES
from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep, StepError
from tests.support.engines import ENGINES
from tests.support.jobs import Run, same, stop_after_six
from tests.support.reference import far, make_batch, make_network, make_optimizer

# Relative to the largest weight after 20 steps. Rounding in another order is far below it; another
# batch, partner, share or scale moves weights by 1e-3 and more.
ALIKE = 1e-5
STEPS = ("train.max_steps=20", "evaluate.at_end=false", "optimizer.learning_rate=0.3")

# What makes each method differ from plain training within the first epochs.
KEYS = {
    "flsc": ("objective.second_from=1", "objective.third_from=2"),
    "focal": ("objective.plain_epochs=1",),
    "mmce": ("objective.accumulation=second_pass",),
    "looksam": ("sharpness.every=2",),
    "le_sam": ("sharpness.budget=0.1", "sharpness.rho=0.2"),
    "momentum_sam": ("sharpness.rho=0.3",),
    "asam": ("sharpness.rho=0.5",),
}
METHODS = {
    **{f"rule {name}": (f"sharpness.rule={name}", *KEYS.get(name, ())) for name in sorted(RULES)},
    **{
        f"objective {name}": (
            f"objective.name={name}", "sharpness.rule=sam", *KEYS.get(name, ())
        )
        for name in sorted(OBJECTIVES)
    },
    "wsam, coupled": ("sharpness.rule=wsam", "sharpness.decouple=false"),
    "a share": ("sharpness.rule=sam", "sharpness.share=0.5", "data.micro_batch_size=16"),
    "late": ("sharpness.rule=csam", "sharpness.start_epoch=0.5", "sharpness.stop_epoch=1.25"),
    "regmixup": ("mixing.name=regmixup", "sharpness.rule=sam", "objective.name=crl"),
    "mmce, two micro-batches": (
        "objective.name=mmce", "objective.accumulation=second_pass", "sharpness.rule=sam",
        "data.micro_batch_size=16",
    ),
}  # fmt: skip
REMEMBERS = (
    "rule looksam", "rule momentum_sam", "rule friendly_sam", "rule stale_sam", "objective crl",
)  # fmt: skip
FEW = ("rule wsam", "rule friendly_sam", "objective mmce", "regmixup", "late")


@pytest.fixture(scope="module")
def data(digits_shards):
    return digits_shards


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The weights of a method on one rank, which is trained once."""
    trained = {}

    def weights(method: str) -> dict[str, torch.Tensor]:
        if method not in trained:
            run = Run(tmp_path_factory.mktemp("alone") / "run", data, "ddp", *STEPS)
            trained[method] = run.finish(*METHODS[method], *_alone(method), ranks=1).weights()
        return trained[method]

    return weights


def _alone(method: str) -> tuple[str, ...]:
    """A share of each micro-batch: the same images only if micro-batches are the same."""
    return ("data.micro_batch_size=16",) if method == "a share" else ()


def check(method: str, engine: str, ranks: int, data, path, alone) -> None:
    run = Run(path / "run", data, engine, *STEPS).finish(*METHODS[method], ranks=ranks)
    assert far(run.weights(), alone(method)) < ALIKE


@pytest.mark.parametrize("method", FEW)
def test_some_methods_give_the_same_network_on_two_ranks(method, data, tmp_path, alone):
    check(method, "ddp", 2, data, tmp_path, alone)


@pytest.mark.parametrize(
    ("method", "engine"),
    [("rule wsam", "zero2"), ("objective mmce", "fsdp2"), ("regmixup", "zero3")],
)
def test_some_methods_on_other_engines(method, engine, data, tmp_path, alone):
    check(method, engine, 2, data, tmp_path, alone)


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_network_on_every_engine(method, engine, data, tmp_path, alone):
    check(method, engine, 2, data, tmp_path, alone)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", [name for name in METHODS if name != "a share"])
def test_every_method_on_four_ranks(method, data, tmp_path, alone):
    """A share is of each micro-batch, and on four ranks these would be of other images."""
    check(method, "ddp", 4, data, tmp_path, alone)


# Restarts


def restarted(method: str, engine: str, data, path) -> None:
    """A run that is stopped after steps 6, 12 and 18 ends as one that is not, bit for bit."""
    words = (*STEPS, *METHODS[method])
    stayed = Run(path / "stayed", data, engine, *words).finish()
    run = Run(path / "run", data, engine, *words)
    for _ in range(3):
        assert run.start(fault=stop_after_six).wait() == [75, 75]
    assert same(run.finish(), stayed)


@pytest.mark.parametrize(
    "method", ["rule friendly_sam", pytest.param("rule stale_sam", marks=pytest.mark.exhaustive)]
)
def test_some_methods_go_on_bit_for_bit(method, data, tmp_path):
    restarted(method, "ddp", data, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_bit_for_bit(method, data, tmp_path):
    restarted(method, "ddp", data, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2"])
@pytest.mark.parametrize("method", REMEMBERS)
def test_what_is_remembered_goes_on_bit_for_bit_on_every_engine(method, engine, data, tmp_path):
    restarted(method, engine, data, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_with_other_ranks_and_engines(method, data, tmp_path, alone):
    run = Run(tmp_path / "run", data, "zero2", *STEPS, *METHODS[method], *_alone(method))
    assert run.start(fault=stop_after_six).wait() == [75, 75]
    run.finish(ranks=1, engine="fsdp2") if method != "a share" else run.finish()
    assert far(run.weights(), alone(method)) < ALIKE


def test_a_rule_perturbs_in_its_phase_only(data, tmp_path):
    """From half of the first epoch to a quarter of the second, of 12 steps each."""
    run = Run(tmp_path / "run", data, "ddp", *STEPS, *METHODS["late"]).finish(ranks=1)
    records = {step: one for (step, validation), one in run.records().items() if not validation}
    assert sorted(records) == list(range(1, 21))
    assert [n for n, one in records.items() if "train/perturbed_loss" in one] == list(range(7, 16))


def test_the_budget_of_le_sam_falls_over_the_run(data, tmp_path):
    """The length of e times that of the gradient is the budget, half a cosine over 20 steps."""
    words = ("sharpness.rule=le_sam", "sharpness.budget=0.001", "sharpness.rho=100")
    run = Run(tmp_path / "run", data, "ddp", *STEPS, *words).finish(ranks=1)
    for (step, validation), record in run.records().items():
        if not validation:
            budget = 0.0005 * (1 + math.cos(math.pi * (step - 1) / 20))
            spent = record["optim/effective_rho"] * record["optim/ascent_gradient_norm"]
            assert spent == pytest.approx(budget, rel=1e-2)  # of weights in float32


# What the rule remembers is what a checkpoint holds


def test_the_memory_of_rules_is_saved(data, tmp_path):
    for rule in ("friendly_sam", "stale_sam", "momentum_sam"):
        run = Run(tmp_path / rule, data, "ddp", *STEPS, f"sharpness.rule={rule}")
        assert run.start(fault=stop_after_six).wait() == [75, 75]
        state = checkpoint.load_part(run.path / f"checkpoints/step_{run.saved()[-1]:08d}", 0)
        assert set(state["memory"]) == set(run_weights(state))


def run_weights(state) -> list[str]:
    return list(state["engine"]["weights"])


# All combinations: a step, or a refusal before any work

COMBINATIONS = list(product(["none", *RULES], OBJECTIVES, ["none", *AVERAGES], ["none", *MIXING]))


def words_of(rule: str, objective: str, average: str, mixing: str) -> list[str]:
    return [
        f"sharpness.rule={rule}", f"objective.name={objective}", f"average.name={average}",
        f"mixing.name={mixing}", "train.epochs=200",
    ]  # fmt: skip


def test_every_combination_has_a_name_of_its_own_or_is_refused_with_the_reason():
    names, refusals = [], []
    for combination in COMBINATIONS:
        try:
            names.append(method_of(load(None, words_of(*combination))))
        except ConfigError as error:
            refusals.append(str(error))
    assert len(set(names)) == len(names) > 200
    assert len(refusals) > 100
    assert [text for text in refusals if "choose" not in text and "set " not in text] == []


@pytest.mark.parametrize("each", [5, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_combination_that_loads_takes_steps(each):
    """What the configuration accepts, the step accepts: rules, objectives and mixing.

    Of these, every fifth in turn: each rule meets each objective once, but for refusals.
    """
    taken = 0
    choices = [["none", *RULES], [*OBJECTIVES], ["none", *MIXING]]
    for places in product(*(range(len(names)) for names in choices)):
        if sum(places) % each:
            continue
        rule, objective, mixing = (names[i] for names, i in zip(choices, places, strict=True))
        try:
            config = load(None, words_of(rule, objective, "none", mixing))
        except ConfigError:
            continue
        assert steps(config, mixing) == 2, (rule, objective, mixing)
        taken += 1
    assert taken > 100 / each


def steps(config, mixing: str) -> int:
    from dataclasses import replace

    from flatcal_dist.objectives.targets import Mixed, Targets

    network, rule = make_network(), config.sharpness.build()
    objective = config.objective.build()
    objective.begin(24, "cpu")
    step = SharpnessAwareStep(
        ReplicatedEngine(network, make_optimizer(network, lr=0.01)),
        rule,
        loss=None if rule and rule.own_loss else objective,
    )
    for number in range(2):
        inputs, labels = make_batch(number)
        soft = torch.nn.functional.one_hot(labels, 5).float().lerp(torch.full((24, 5), 0.2), 0.3)
        targets = Targets(labels, torch.arange(24), 0)
        if mixing == "regmixup":
            inputs, targets = inputs.repeat_interleave(2, 0), replace(targets, mixed=Mixed(soft, 1))
        elif mixing != "none":
            targets = replace(targets, labels=soft)
        result = step([(inputs, targets)])
        assert not result.skipped
    step.end_epoch()
    return step.taken


def test_what_the_configuration_cannot_know_the_step_refuses():
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network))
    objective = load(None, ["objective.name=mmce"]).objective.build()
    step = SharpnessAwareStep(engine, None, loss=objective)
    with pytest.raises(StepError, match=r"MMCE compares all samples .* has 2 micro-batches"):
        step([make_batch(0), make_batch(1)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", ["none", *RULES])
def test_every_rule_runs_with_every_objective_and_average(rule, data, tmp_path):
    """Two epochs of the recipe on two ranks, with evaluation at the end.

    Averages take turns, so that each meets each rule and each objective.
    """
    averages, ran = ["none", *AVERAGES], 0
    for number, objective in enumerate(sorted(OBJECTIVES)):
        average = averages[(number + len(rule)) % len(averages)]
        words = [*words_of(rule, objective, average, "none"), "data.micro_batch_size=16"]
        words += ["train.max_steps=26"] + ["average.start=0"] * (average == "swa")
        words += KEYS.get(objective, ())
        try:
            load(None, words)
        except ConfigError:
            continue
        run = Run(tmp_path / str(number), data, "ddp", *words).finish()
        assert run.state()["phase"] == "finished", words
        ran += 1
    assert ran > 0
