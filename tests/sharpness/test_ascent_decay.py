"""Weight decay in the ascent gradient: e from g + decay * w, on every engine and in every scope."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatcal_dist.config import load
from flatcal_dist.config.method import method_of
from flatcal_dist.sharpness import (
    ASAM,
    GSAM,
    SAM,
    MomentumSAM,
    ReplicatedEngine,
    SharpnessAwareStep,
)
from tests.support.engines import OWN, UNLIKE, everywhere, make_engine
from tests.support.reference import CLOSE, bits, far, make_batch, make_network, my_part, norm, train

DECAY, RATE, NUMBERS = 0.5, 0.1, range(3)


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    """SGD that decays matrices, as most recipes do. The last group comes first in the network."""
    named = list(network.named_parameters())
    biases = [w for n, w in named if n.endswith("bias")]
    matrices = [w for n, w in named if not n.endswith("bias")]
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": matrices}]
    return torch.optim.SGD(groups, RATE, momentum=0.9, weight_decay=DECAY)


def literal(rule, units_of, network=make_network, decay=DECAY) -> dict[str, Tensor]:
    """The weights after steps by a plain loop.

    units_of: gives the batches of a step's number, each of which has a perturbation of its own.
    decay: that of the ascent gradient; the optimizer's is always the same.
    """
    network = network()
    optimizer = optimizer_of(network)
    weights = list(network.parameters())
    decays = [decay if n.endswith("weight") else 0.0 for n, _ in network.named_parameters()]

    def gradient(batch) -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(network(batch[0]), batch[1]), weights))

    for number in NUMBERS:
        units = units_of(number)
        samples = sum(len(labels) for _, labels in units)
        total = [torch.zeros_like(w) for w in weights]
        start = [w.detach().clone() for w in weights]
        for unit in units:
            g = gradient(unit)
            with torch.no_grad():
                d = [a + x * w for a, x, w in zip(g, decays, start, strict=True)]
                t = [w.abs() + rule.eta if isinstance(rule, ASAM) else 1 + 0 * w for w in start]
                if isinstance(rule, ASAM):
                    names = [n for n, _ in network.named_parameters()]
                    t = [a if "weight" in n else 1 + 0 * a for n, a in zip(names, t, strict=True)]
                length = norm([a * b for a, b in zip(t, d, strict=True)])
                for w, a, b in zip(weights, t, d, strict=True):
                    w += rule.rho * a * a * b / length
            g_s = gradient(unit)
            with torch.no_grad():
                if isinstance(rule, GSAM):  # the ascent gradient without decay
                    along = sum(float((a * b).sum()) for a, b in zip(g, g_s, strict=True))
                    factor = along / norm(g_s) ** 2
                    g_s = [b - rule.alpha * (a - factor * b) for a, b in zip(g, g_s, strict=True)]
                for w, w0, sum_, b in zip(weights, start, total, g_s, strict=True):
                    w.copy_(w0)
                    sum_ += len(unit[1]) / samples * b
        for w, g in zip(weights, total, strict=True):
            w.grad = g
        optimizer.step()
    return network.state_dict()


def stepped(rank, world_size, kind, rule, micro_batches, **options):
    engine = make_engine(kind, optimizer=optimizer_of)
    step = SharpnessAwareStep(engine, rule, **options)
    train(step, rank, world_size, micro_batches, NUMBERS)
    return engine.full_weights()


SHARP = SAM(0.3, ascent_decay=True)


@pytest.mark.parametrize("kind", UNLIKE)
def test_the_whole_batch_perturbs_by_its_gradient_and_the_decay(kind):
    expected = literal(SHARP, lambda number: [make_batch(number)])
    without = literal(SHARP, lambda number: [make_batch(number)], decay=0.0)
    assert far(expected, without) > 1000 * CLOSE, "the choice matters here"
    assert far(everywhere(kind, stepped, SHARP, 3)[0], expected) < CLOSE
    plain = everywhere(kind, stepped, SAM(0.3), 3)[0]
    assert far(plain, without) < CLOSE, "and by default the decay is the optimizer's alone"


@pytest.mark.parametrize("kind", OWN)
def test_each_rank_perturbs_by_its_gradient_and_the_decay(kind):
    ranks = 1 if kind == "one" else 2
    parts = lambda number: [my_part(r, ranks, number)[0] for r in range(ranks)]  # noqa: E731
    found = everywhere(kind, stepped_by_rank, SHARP)[0]
    assert far(found, literal(SHARP, parts)) < CLOSE


def stepped_by_rank(rank, world_size, kind, rule):
    return stepped(rank, world_size, kind, rule, 3, scope="rank")


@pytest.mark.parametrize("kind", ["one", "ddp", "zero1"])
def test_each_micro_batch_perturbs_by_its_gradient_and_the_decay(kind):
    """They have 5 and 4 samples (one process), and 3 and 2 of each rank: each counts as a mean."""
    ranks = 1 if kind == "one" else 2

    def units(number):
        parts = [my_part(r, ranks, number, 5) for r in range(ranks)]
        return [tuple(map(torch.cat, zip(*unit, strict=True))) for unit in zip(*parts, strict=True)]

    found = everywhere(kind, stepped_by_micro_batch, SHARP)[0]
    assert far(found, literal(SHARP, units)) < CLOSE


def stepped_by_micro_batch(rank, world_size, kind, rule):
    return stepped(rank, world_size, kind, rule, 5, per_micro_batch=True)


@pytest.mark.parametrize(
    "rule", [ASAM(0.5, ascent_decay=True), GSAM(0.2, alpha=0.4, ascent_decay=True)]
)
def test_other_rules_get_it_too(rule):
    expected = literal(rule, lambda number: [make_batch(number)])
    assert far(stepped(0, 1, "one", rule, 1), expected) < CLOSE


def test_losses_that_are_scaled_and_norm_layers_alone():
    rule = SHARP
    network = make_network()
    engine = ReplicatedEngine(network, optimizer_of(network), torch.float16)
    assert engine.loss_scale > 1
    train(SharpnessAwareStep(engine, rule), 0, 1, 1, NUMBERS)
    expected = literal(rule, lambda number: [make_batch(number)])
    assert far(network.state_dict(), expected) < CLOSE
    network = make_network(norm=True)
    engine = ReplicatedEngine(network, optimizer_of(network))
    moved = []
    handle = network[0].register_forward_hook(lambda m, *_: moved.append(m.weight.clone()))
    step = SharpnessAwareStep(engine, SAM(0.3, ascent_decay=True, select="norms"))
    step([make_batch(0)])
    handle.remove()
    assert torch.equal(*moved), "what is not selected does not move"


def test_a_share_of_the_batch_and_no_decay_at_all():
    half = SAM(0.3, share=0.5, ascent_decay=True)
    found = [stepped(0, 1, "one", half, 4, per_micro_batch=each) for each in (False, True)]
    assert far(*found) > 1000 * CLOSE
    networks = [make_network(), make_network()]
    for network, rule in zip(networks, (SHARP, SAM(0.3)), strict=True):
        engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), RATE))
        train(SharpnessAwareStep(engine, rule), 0, 1, 1, NUMBERS)
    assert bits(networks[0].state_dict()) == bits(networks[1].state_dict())


def test_it_is_a_key_of_rules_with_an_ascent_and_part_of_the_methods_name():
    config = load(None, ["sharpness.rule=csam", "sharpness.ascent_decay=true"])
    assert config.sharpness.build().decays_ascent
    assert method_of(config) == "csam[ascent_decay=yes]"
    assert not hasattr(MomentumSAM(), "ascent_decay")
    with pytest.raises(ValueError, match="ascent_decay"):
        load(None, ["sharpness.rule=momentum_sam", "sharpness.ascent_decay=true"])
