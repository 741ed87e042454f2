"""Batches and networks of any form, by a function forward(model, batch) of the user's."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatcal_dist.sharpness import CSAM, SAM, ReplicatedEngine, SharpnessAwareStep, StepError
from tests.support.engines import UNLIKE, everywhere, make_engine
from tests.support.reference import (
    CLOSE,
    bits,
    far,
    make_batch,
    make_network,
    make_optimizer,
    my_part,
    reference,
)


@dataclass
class Output:
    losses: Tensor
    logits: Tensor
    note: str = "mine"


def of_dict(model, batch):
    logits = model(batch["x"])
    return Output(F.cross_entropy(logits, batch["y"], reduction="none"), logits)


def of_mean(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"]), len(batch["y"])


def of_mapping(model, batch):
    return {"losses": F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")}


FORMS = (of_dict, of_mean, of_mapping)


def by_forward(rank, world_size, kind):
    outcome = []
    for forward in FORMS:
        engine = make_engine(kind)
        step = SharpnessAwareStep(engine, SAM(0.1))
        for number in range(3):
            pairs = my_part(rank, world_size, number, 2)
            batches = [{"x": x, "y": y} for x, y in pairs]
            result = step(batches, forward=forward)
        outcome.append((engine.full_weights(), result.outputs))
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_forms_of_batches_and_losses_train_as_pairs_do(kind):
    expected = reference(SAM(0.1), numbers=range(3))[0]
    for weights, _ in everywhere(kind, by_forward)[0]:
        assert far(weights, expected) < CLOSE


def test_what_forward_returned_in_the_first_pass_comes_back_without_a_graph():
    network = make_network()
    inputs, target = make_batch(0)
    with torch.no_grad():
        logits = network(inputs)
    step = SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), SAM(0.1))
    (output,) = step([{"x": inputs, "y": target}], forward=of_dict).outputs
    assert torch.equal(output.logits, logits)
    assert output.note == "mine"
    assert not output.losses.requires_grad
    network = make_network()
    step = SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), CSAM(0.1))
    (output,) = step([(inputs, target)]).outputs
    assert torch.equal(output, logits)


class Named(nn.Module):
    """Takes two inputs, one by name, and gives a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def forward(self, x, *, factor):
        return {"logits": self.network(x * factor)}


def several_inputs(rank, world_size, kind):
    outcome = {}
    precisions = [torch.float32] + [torch.bfloat16] * (kind in ("zero2", "zero3", "fsdp2"))
    for precision in precisions:
        engine = make_engine(kind, Named(), precision)

        def forward(model, batch):
            logits = model(batch[0], factor=torch.ones(1))["logits"]
            return F.cross_entropy(logits.float(), batch[1], reduction="none")

        step = SharpnessAwareStep(engine, SAM(0.1))
        results = [step(my_part(rank, world_size, n, 2), forward=forward) for n in range(3)]
        outcome[precision] = engine.full_weights(), results[0].loss, results[0].outputs
    elsewhere = make_network()

    def around(model, batch):
        return F.cross_entropy(elsewhere(batch[0]), batch[1], reduction="none")

    try:
        step(my_part(rank, world_size, 0), forward=around)
    except StepError as error:
        outcome["around"] = str(error)
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_networks_of_several_inputs_and_a_mapping_as_output(kind):
    expected = {f"network.{n}": w for n, w in reference(SAM(0.1), numbers=range(3))[0].items()}
    for rank, outcome in enumerate(everywhere(kind, several_inputs)):
        weights, loss, outputs = outcome[torch.float32]
        assert weights or rank, "whole on rank 0 at least"
        assert not weights or far(weights, expected) < CLOSE
        assert len(outputs) == 2
        if torch.bfloat16 in outcome:
            assert outcome[torch.bfloat16][1] == pytest.approx(loss, rel=0.02)
        assert kind == "one" or "did not call the model that it was given" in outcome["around"]


class Tagger(nn.Module):
    """A class for each of 3 places; and a second head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.places, self.aux = nn.Linear(6, 8), nn.Linear(8, 15), nn.Linear(8, 5)

    def forward(self, x, scale):
        hidden = self.body(x * scale).tanh()
        return self.places(hidden).view(-1, 3, 5), self.aux(hidden)


def test_losses_of_places_an_auxiliary_head_several_inputs_and_a_gradient_penalty():
    """One tensor of losses of any shape counts its elements; weights may be fractions."""
    inputs, target = make_batch(0)
    tags = torch.stack([target, target.flip(0), target], 1)

    def losses(model, x):
        places, aux = model(x, scale=torch.tensor(2.0))
        each = F.cross_entropy(places.transpose(1, 2), tags, reduction="none")
        return each + 0.3 * F.cross_entropy(aux, target, reduction="none")[:, None]

    def forward(model, batch):
        x = batch.clone().requires_grad_()
        each = losses(model, x)
        (slope,) = torch.autograd.grad(each.sum(), x, create_graph=True)
        return each + slope.square().sum() / each.numel()

    ours, theirs = Tagger(), Tagger()
    step = SharpnessAwareStep(ReplicatedEngine(ours, make_optimizer(ours)), SAM(0.1))
    result = step([inputs], forward=forward, samples=tags.numel())
    optimizer, weights = make_optimizer(theirs), list(theirs.parameters())
    g = torch.autograd.grad(forward(theirs, inputs).mean(), weights)
    length = torch.stack([a.norm() for a in g]).norm()
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        torch._foreach_add_(weights, [0.1 * a / length for a in g])
    loss = forward(theirs, inputs).mean()
    loss.backward()
    with torch.no_grad():
        torch._foreach_copy_(weights, before)
    optimizer.step()
    assert result.perturbed_loss == pytest.approx(loss.item(), rel=1e-6)
    assert far(ours.state_dict(), theirs.state_dict()) < CLOSE


@pytest.mark.parametrize(
    ("forward", "options", "message"),
    [
        (lambda m, b: F.cross_entropy(m(b["x"]), b["y"]), {}, "cannot know the mean of how many"),
        (lambda m, b: "loss", {}, "gave a str without losses"),
        (lambda m, b: m(b["x"]).argmax(1), {}, "without losses"),
        (lambda m, b: (m(b["x"])[:, 0], 3), {}, "a weight belongs to one mean"),
        (lambda m, b: (F.cross_entropy(m(b["x"]), b["y"]), m(b["x"])), {}, "gave a Tensor beside"),
        (lambda m, b: {"logits": m(b["x"])}, {}, "gave a dict without losses"),
        (of_dict, {"samples": 7}, "the passes gave 24 losses for 7 samples"),
        (None, {}, "give it forward="),
    ],
)
def test_what_cannot_be_taken_is_refused_and_leaves_all_as_it_was(forward, options, message):
    network = make_network()
    before = bits(network.state_dict())
    step = SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), SAM(0.1))
    inputs, target = make_batch(0)
    with pytest.raises(StepError, match=message):
        step([{"x": inputs, "y": target}], forward=forward, **options)
    assert bits(network.state_dict()) == before
    own = SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), CSAM(0.1))
    with pytest.raises(StepError, match="computes the losses itself"):
        own([{"x": inputs, "y": target}], forward=of_dict)
