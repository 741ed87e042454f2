"""Networks and optimizers of Lightning Fabric on one process; recipes/test_loops.py has two."""

import pytest
import torch

from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep, StepError
from tests.support.reference import (
    CLOSE,
    RULES,
    far,
    make_network,
    make_optimizer,
    reference,
    train,
)

fabric = pytest.importorskip("lightning_fabric")


def set_up(precision: str):
    network = make_network()
    own = fabric.Fabric(accelerator="cpu", devices=1, precision=precision)
    return own.setup(network, make_optimizer(network))


def test_a_network_and_an_optimizer_of_fabric_train_under_the_networks_own_names():
    model, optimizer = set_up("32-true")
    engine = ReplicatedEngine(model, optimizer)
    step = SharpnessAwareStep(engine, RULES["looksam"])
    train(step, 0, 1)
    names = [name for name, _ in make_network().named_parameters()]
    assert list(engine.masters()) == names
    assert list(engine.arrangement()["pieces"]) == names
    assert list(step.memory) == names, "so that a checkpoint of two ranks fits one process"
    expected = reference(RULES["looksam"])[0]
    assert far(engine.full_weights(), expected) < CLOSE
    assert engine.model is model, "what is called"


def test_its_state_goes_to_another_one_and_back():
    model, optimizer = set_up("32-true")
    step = SharpnessAwareStep(ReplicatedEngine(model, optimizer), RULES["sam"])
    train(step, 0, 1, numbers=range(3))
    again = ReplicatedEngine(*set_up("32-true"))
    again.load_local_state(step.engine.local_state())
    train(SharpnessAwareStep(again, RULES["sam"]), 0, 1, numbers=range(3, 5))
    assert far(again.full_weights(), reference(RULES["sam"])[0]) < CLOSE


def test_its_mixed_precision_is_refused_with_the_remedy():
    with pytest.raises(StepError, match=r"bf16-mixed.*torch\.autocast"):
        ReplicatedEngine(*set_up("bf16-mixed"), torch.bfloat16)
