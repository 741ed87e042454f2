"""Every engine against the plain reference, and against one another, to 1e-6 of the weights."""

from functools import partial

import pytest
import torch

from flatcal_dist.sharpness import SharpnessAwareStep
from tests.support.engines import ENGINES, make_engine, used
from tests.support.ranks import on_ranks
from tests.support.reference import (
    CLOSE,
    NEW,
    RULES,
    SAMPLES,
    STEPS,
    bits,
    far,
    network_of,
    reference,
    train,
)

# rule, micro-batches (24 samples do not divide by 5), scope, perturb per micro-batch
REPEATED = ("wsam_not_decoupled", "sam_share")
GLOBAL = [("none", 4, "global", False), ("sam", 5, "global", False), ("csam", 1, "global", False)]
GLOBAL += [("csam", 4, "global", False), ("asam", 4, "global", False)]
# Others are these with other numbers, to an engine.
TOGETHER = ("looksam", "gsam", "momentum_sam", *(n for n in NEW if n not in REPEATED))
GLOBAL += [(rule, 2, "global", False) for rule in TOGETHER]
OWN = [("sam", 3, "rank", False), ("csam", 1, "rank", False), ("asam", 2, "rank", False)]
# Rules that do not compare the gradients of a whole step.
APART = ("le_sam", "functional_sam", "sam_norms", "sam_share")
OWN += [(rule, 2, "rank", False) for rule in APART]
EACH = [("csam", 3, "global", True), ("sam", 2, "rank", True)]
EACH += [(rule, 3, scope, True) for rule, scope in zip(APART, ("rank", "global") * 2, strict=True)]
ALL = [(rule, parts, "global", False) for rule in RULES for parts in (1, 4, 5)]
ALL_OWN, ALL_EACH = (
    [(rule, parts, "rank", each) for rule in ("sam", "csam", "asam", *APART) for parts in (1, 3)]
    for each in (False, True)
)


def what_it_can(kind: str, own, each) -> list:
    """ZeRO-3 and FSDP2 have no weights of a rank's own; ZeRO-2 reduces every micro-batch."""
    cases = own if kind in ("ddp", "zero1", "zero2") else []
    return cases + (each if kind in ("ddp", "zero1") else [])


def trained(rank, world_size, kind, cases):
    """For each case: weights as saved; after each step what was reported, and all bits in use."""
    outcome = {}
    for rule, micro_batches, scope, each in cases:
        engine = make_engine(kind, network_of(RULES[rule]))
        step = SharpnessAwareStep(engine, RULES[rule], scope=scope, per_micro_batch=each)
        seen = []
        for number in range(STEPS):
            (result,) = train(step, rank, world_size, micro_batches, [number])
            seen.append((result, bits(used(engine))))
        outcome[rule, micro_batches, scope, each] = engine.full_weights(), seen
    return outcome


def check(outcomes, world_size):
    for case, (weights, seen) in outcomes[0].items():
        rule, micro_batches, scope, each = case
        ranks = {"global": 1, "rank": world_size, 2: world_size // 2}[scope]
        whole = not each and rule != "sam_share"
        if not whole:  # the units of accumulation are then part of the result
            ranks = world_size
        expected = reference(
            RULES[rule],
            ranks,
            {"global": ranks, "rank": 1, 2: ranks // 2}[scope],
            1 if whole else micro_batches,
            network=partial(network_of, RULES[rule]),
            per_micro_batch=each,
        )[0]
        assert far(weights, expected) < CLOSE, case
        for outcome in outcomes[1:]:
            others, theirs = outcome[case]
            assert theirs == seen, f"{case}: ranks report, and hold after every step, the same"
            assert not others or far(others, weights) == 0, case


def test_csam_is_not_sam_here_and_nothing_is_near_its_jump():
    """The reference refuses batches with a sample near p = 1/2; in every run that is compared."""
    for ranks, scope, parts, each in (
        (1, 1, 1, False),
        (2, 1, 1, False),
        (2, 2, 3, True),
        (4, 1, 1, False),
        (4, 2, 1, False),
    ):
        seen = []
        options = {"per_micro_batch": each}
        csam = reference(RULES["csam"], ranks, scope, parts, seen=seen, **options)[0]
        sam = reference(RULES["sam"], ranks, scope, parts, **options)[0]
        assert far(csam, sam) > 1000 * CLOSE
        by_step = torch.cat(seen).view(STEPS, SAMPLES)
        assert ((by_step > 0.5).sum(1) > 0.25 * SAMPLES).all()
        assert ((by_step > 0.5).sum(1) < 0.75 * SAMPLES).all()
    by_rank = reference(RULES["csam"], 2, 1)[0]
    assert far(by_rank, reference(RULES["csam"])[0]) > 1000 * CLOSE, "and the scopes differ"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("micro_batches", [1, 4, 5])
def test_one_process(rule, micro_batches):
    check([trained(0, 1, "one", [(rule, micro_batches, "global", False)])], 1)


def test_one_process_per_micro_batch():
    check([trained(0, 1, "one", EACH[:1])], 1)


@pytest.mark.parametrize("kind", ENGINES)
def test_two_ranks(kind):
    check(on_ranks(2, trained, kind, GLOBAL + what_it_can(kind, OWN, EACH)), 2)


def test_four_ranks_and_groups_of_two():
    check(on_ranks(4, trained, "ddp", [("csam", 2, "global", False), ("csam", 2, 2, False)]), 4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ENGINES)
def test_every_rule_accumulation_and_scope(kind):
    check(on_ranks(2, trained, kind, ALL + what_it_can(kind, ALL_OWN, ALL_EACH)), 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ENGINES)
def test_four_ranks(kind):
    groups = [(rule, 2, 2, False) for rule in ("csam", "le_sam", "sam_share")]
    groups = groups if kind in ("ddp", "zero1", "zero2") else []
    new = [(rule, 2, "global", False) for rule in NEW]
    check(on_ranks(4, trained, kind, [*ALL[3:9], *new, *groups]), 4)
