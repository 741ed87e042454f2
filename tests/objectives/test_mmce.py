"""MMCE against its double sum, over ranks and micro-batches, and at its ends."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flatcal_dist.config import load
from flatcal_dist.objectives import MMCE, Targets
from flatcal_dist.sharpness import SAM, FunctionalSAM, SharpnessAwareStep, StepError
from tests.support.engines import MOST, everywhere, make_engine
from tests.support.literal_objectives import Case
from tests.support.reference import (
    CLOSE,
    far,
    make_batch,
    make_network,
    make_optimizer,
    my_part,
    norm,
)

FORMS = ("plain", "weighted", "weighted_2020")


def literal(logits, labels, form):
    """The formulas of Kumar et al. (2018), pair by pair."""
    c, predicted = logits.softmax(1).max(1)
    a = (predicted == labels).to(c.dtype)
    total, right, wrong = 0.0, float(a.sum()), float((1 - a).sum())
    if form != "plain" and not (right and wrong):
        return c.sum() * 0
    power = 2 if form == "weighted_2020" else 1
    for i in range(len(c)):
        for j in range(len(c)):
            kernel = torch.exp(-(c[i] - c[j]).abs() / 0.4)
            if form == "plain":
                total = total + (a[i] - c[i]) * (a[j] - c[j]) * kernel / len(c) ** 2
            elif a[i] and a[j]:
                total = total + (1 - c[i]) * (1 - c[j]) * kernel / right ** (2 * power)
            elif not a[i] and not a[j]:
                total = total + c[i] * c[j] * kernel / wrong ** (2 * power)
            else:
                r, w = (i, j) if a[i] else (j, i)
                total = total - (1 - c[r]) * c[w] * kernel / (right * wrong) ** power
    return total if form == "plain" else (total + 1e-10).sqrt()


@pytest.mark.parametrize("form", FORMS)
def test_it_is_its_double_sum_and_so_is_its_gradient(form):
    torch.manual_seed(0)
    logits = (2 * torch.randn(17, 5, dtype=torch.float64)).requires_grad_()
    labels = torch.where(torch.arange(17) % 3 > 0, logits.argmax(1), torch.randint(5, (17,)))
    ours = MMCE(1.5, form)(logits, labels).mean()
    theirs = F.cross_entropy(logits, labels) + 1.5 * literal(logits, labels, form)
    assert torch.allclose(ours, theirs, rtol=1e-10)
    slopes = [torch.autograd.grad(value, logits)[0] for value in (ours, theirs)]
    assert torch.allclose(*slopes, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_that_is_all_right_or_all_wrong_or_sure(form):
    for labels in (torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)):
        for logits in (torch.tensor([[3.0, 0.0]] * 4), torch.tensor([[1e4, 0.0]] * 4)):
            logits.requires_grad_()
            losses = MMCE(2.0, form)(logits, labels)
            losses.sum().backward()
            assert losses.isfinite().all()
            assert logits.grad.isfinite().all()


def test_weight_zero_is_cross_entropy_and_keys_are_read():
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    plain = F.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(MMCE(0.0)(logits, labels), plain)
    words = ["objective.name=mmce", "objective.weight=3", "objective.form=plain"]
    assert load(None, words).objective.build() == MMCE(3.0, "plain")
    with pytest.raises(ValueError, match="MMCE is defined for hard labels only"):
        MMCE()(logits, logits.softmax(1))


# Over ranks and micro-batches


def losses(logits, targets, form="weighted", weight=2.0, **_):
    plain = F.cross_entropy(logits.double(), targets.labels, reduction="none")
    return plain + weight * literal(logits.double(), targets.labels, form)


TRAINED = [
    Case("mmce", losses, {"form": form, "weight": weight, "accumulation": "second_pass"})
    for form, weight in (("weighted", 0.5), ("plain", 2.0))  # a root amplifies rounding near 0
]


def ours(rank, ranks, kind):
    step = SharpnessAwareStep(make_engine(kind), SAM(0.1), loss=MMCE(accumulation="second_pass"))
    results = [step(my_part(rank, ranks, number, 2)).loss for number in range(3)]
    return step.engine.full_weights(), results


@pytest.mark.parametrize("kind", MOST)
def test_micro_batches_are_one_batch_and_ranks_report_one_loss(kind):
    """test_every_objective has SAM with one micro-batch, and several without SAM."""
    outcome = everywhere(kind, ours)
    assert far(outcome[0][0], by_hand(SAM(0.1), 3)) < CLOSE
    assert len({tuple(results) for _, results in outcome}) == 1


def by_hand(rule, steps):
    """The plain loop of one process with the whole batch."""
    network = make_network()
    optimizer, weights = make_optimizer(network), list(network.parameters())
    for number in range(steps):
        inputs, labels = make_batch(number)

        def gradient(inputs=inputs, labels=labels):
            loss = losses(network(inputs), Targets(labels)).mean()
            return torch.autograd.grad(loss, weights)

        g = gradient()
        if rule:
            before = [w.detach().clone() for w in weights]
            with torch.no_grad():
                torch._foreach_add_(weights, [rule.rho / norm(g) * t for t in g])
            g = gradient()
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
        for w, t in zip(weights, g, strict=True):
            w.grad = t
        optimizer.step()
    return network.state_dict()


def uneven(rank, ranks, kind):
    """Ranks whose parts have different sizes, one of them without any sample."""
    inputs, labels = make_batch(0)
    cuts = [0, 24, 24] if ranks == 2 else [0, 24]
    part = slice(cuts[rank], cuts[rank + 1])
    step = SharpnessAwareStep(make_engine(kind), None, loss=MMCE(2.0))
    step([(inputs[part], labels[part])])
    return step.engine.full_weights()


def test_a_rank_without_samples_takes_part():
    assert (
        far(
            everywhere(
                "ddp",
                uneven,
            )[0],
            by_hand(None, 1),
        )
        < CLOSE
    )


def with_noise(rank, ranks, kind):
    """Dropout and batch norm: the look ahead changes neither masks nor running statistics."""
    counts = []
    for micro_batches, objective in ((2, MMCE(0.0, accumulation="second_pass")), (2, None)):
        torch.manual_seed(rank)
        network = make_network(noise=0.3, norm=True)
        step = SharpnessAwareStep(make_engine(kind, network), SAM(0.1), loss=objective)
        torch.manual_seed(7 + rank)
        for number in range(2):
            step(my_part(rank, ranks, number, micro_batches))
        counts.append((step.engine.full_weights(), torch.get_rng_state()))
    return counts


@pytest.mark.parametrize("kind", ["ddp", "zero3", "fsdp2"])
def test_the_look_ahead_leaves_no_trace(kind):
    for (a, random), (b, other) in everywhere(kind, with_noise):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert torch.equal(random, other)


def test_what_would_compare_a_part_of_the_batch_is_refused():
    def step(rule, **options):
        network = make_network()
        engine = make_engine("one", network)
        return SharpnessAwareStep(engine, rule, loss=MMCE(), **options)

    with pytest.raises(StepError, match="MMCE compares all samples of a step"):
        step(SAM(0.1), per_micro_batch=True)
    with pytest.raises(StepError, match=r"SAM\(share=0.5\) takes the ascent gradient of a part"):
        step(SAM(0.1, share=0.5))
    with pytest.raises(StepError, match="keeps the slopes at w"):
        step(FunctionalSAM(0.1))
    with pytest.raises(StepError, match=r"2 micro-batches: .* accumulation='second_pass'"):
        step(SAM(0.1))([make_batch(0), make_batch(1)])


def test_facts_of_mixed_images_are_those_of_the_clean_ones():
    from flatcal_dist.objectives.targets import Mixed

    inputs, labels = make_batch(0)
    soft = F.one_hot(labels, 5).float()
    targets = replace(Targets(labels), mixed=Mixed(soft, 1.0))
    engine = make_engine("one")
    result = SharpnessAwareStep(engine, None, loss=MMCE(2.0))(
        [(inputs.repeat_interleave(2, 0), targets)]
    )
    logits = make_network()(inputs)
    plain = F.cross_entropy(logits, labels)
    expected = 2 * plain + 2 * literal(logits, labels, "weighted")
    assert result.loss == pytest.approx(float(expected), rel=1e-5)
