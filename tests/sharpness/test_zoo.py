"""Networks that read and change more than weights: as the reference, or refused before a step.

And without a perturbation the two passes are the plain step, bit for bit.
"""

from functools import partial

import pytest
import torch

from flatcal_dist.sharpness import ASAM, SAM, LookSAM, SharpnessAwareStep, StepError
from tests.support import zoo
from tests.support.engines import MOST, UNLIKE, everywhere, make_engine, saved, used
from tests.support.reference import CLOSE, RULES, bits, far, reference, train

STEPS = range(3)
SHARP = ("sam", "csam", "asam", "looksam")
NO_LENGTH = (SAM(0.0), ASAM(0.0), LookSAM(0.0, every=2))
# What an engine does not hold: part of the message, and where.
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {}
FEW = ("renorm", "spectral norm, old", "rebound", "starts as None", "sliced", "expanded")
FEW += ("checkpointed, reentrant", "shared module")


def trained(rank, world_size, kind, name, rule):
    """Weights and buffers in use, what is saved, the bits of all; or why it was refused."""
    try:
        engine = make_engine(kind, zoo.make(name))
        step = SharpnessAwareStep(engine, rule)
    except StepError as error:
        return str(error)
    torch.manual_seed(1 + rank)
    results = train(step, rank, world_size, 2, STEPS, batch=zoo.batches(name))
    assert not any(result.skipped for result in results)
    own = used(engine)
    return own, engine.full_weights(), (bits(own), saved(engine), bits({"": torch.rand(3)}))


def visit(rank, world_size, kind, names, rules):
    """For each network: by rule, after some steps; and whether nothing is the plain step."""
    outcome = {}
    for name in names:
        sharp = {rule: trained(rank, world_size, kind, name, RULES[rule]) for rule in rules}
        ends = [trained(rank, world_size, kind, name, rule) for rule in (None, *NO_LENGTH)]
        refused = [end for end in (*sharp.values(), *ends) if isinstance(end, str)]
        same = not refused and all(end[2] == ends[0][2] for end in ends)
        outcome[name] = refused, same, {r: end[:2] for r, end in sharp.items() if not refused}
    return outcome


def check(kind, names, rules):
    outcomes = everywhere(kind, visit, names, rules)
    wrong = []
    for name in names:
        message, where = REFUSED.get(name, ("", ()))
        refused = outcomes[0][name][0]
        if kind in where:
            count = len(rules) + 1 + len(NO_LENGTH)
            if len([r for r in refused if message in r]) != count:
                wrong.append((name, "is not refused", refused))
            continue
        if refused or not all(outcome[name][1] for outcome in outcomes):
            wrong.append((name, "rho 0 is not the plain step", refused))
            continue
        for rule in rules:
            expected = reference(
                RULES[rule], len(outcomes), micro_batches=2, numbers=STEPS,
                network=partial(zoo.make, name), batch=zoo.batches(name),
            )  # fmt: skip
            for rank, theirs in enumerate(expected):
                own, weights = outcomes[rank][name][2][rule]
                held = {n: own[n] for n in theirs if n in own}
                off = far(held, {n: theirs[n] for n in held})
                if rank == 0:
                    assert list(weights) == list(theirs), name
                    off = max(off, far(weights, theirs))
                if off >= CLOSE:
                    wrong.append((name, rule, rank, off))
    assert not wrong, wrong


@pytest.mark.parametrize("kind", ["one", *UNLIKE[1:]])
def test_some_networks(kind):
    names = list(zoo.ZOO) if kind == "one" else FEW
    check(kind, names, SHARP if kind == "one" else SHARP[:1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("kind", MOST)
def test_all_networks_and_rules(kind, part):
    check(kind, list(zoo.ZOO)[part::3], SHARP)
