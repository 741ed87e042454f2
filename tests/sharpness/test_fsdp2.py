"""What only FSDP2 has: sharding over groups of ranks that perturb by themselves."""

import math

import pytest

from flatcal_dist.sharpness import SharpnessAwareStep
from tests.ranks import on_ranks
from tests.sharpness.engines import make_engine, used
from tests.sharpness.reference import CLOSE, RULES, STEPS, bits, far, reference, train
from tests.sharpness.test_refusals import message


def groups(rank, world_size):
    """Sharded over 2 and 2: perturbed by groups, or for all; both step by step."""
    outcome = {}
    for rule in ("csam", "asam"):
        for scope in (2, "global"):
            engine = make_engine("fsdp2", ranks_per_group=2)
            step = SharpnessAwareStep(engine, RULES[rule], scope=scope, clip_norm=1.0)
            seen, results = [], []
            for number in range(STEPS):
                results += train(step, rank, world_size, 2, [number], measure=True)
                seen.append(bits(used(engine)))
            outcome[rule, scope] = used(engine), seen, results
    other = message(lambda: SharpnessAwareStep(engine, RULES["sam"], scope=2))
    fresh = make_engine("fsdp2", ranks_per_group=2)
    rank_scope = message(lambda: SharpnessAwareStep(fresh, RULES["sam"], scope="rank"))
    return outcome, other, rank_scope, bad_group(rank, world_size)


def bad_group(rank, world_size):
    """A value that is not finite in one group stops the other as well."""
    engine = make_engine("fsdp2", ranks_per_group=2)
    before = bits(used(engine))
    engine.module[-1].register_forward_hook(
        lambda module, args, output: output * math.inf if rank == 3 else output
    )
    step = SharpnessAwareStep(engine, RULES["sam"], scope=2)
    skipped = train(step, rank, world_size, numbers=[0])[0].skipped
    return skipped, bits(used(engine)) == before


def test_groups_perturb_by_themselves_and_stay_replicas():
    outcomes = on_ranks(4, groups)
    for case, (_, seen, results) in outcomes[0][0].items():
        rule, scope = case
        ranks = 2 if scope == 2 else 1
        expected = reference(RULES[rule], ranks, 1, clip_norm=1.0)[0]
        if scope == 2:
            assert far(expected, reference(RULES[rule], clip_norm=1.0)[0]) > 100 * CLOSE
        for outcome, *_ in outcomes:
            weights, theirs, reported = outcome[case]
            assert far(weights, expected) < CLOSE, case
            assert theirs == seen, "replicas must hold the same bits"
            assert reported == results, "ranks must report the same"
        if rule == "csam":
            assert results[0].effective_rho == pytest.approx(0.1, rel=1e-4)
    for _, other, rank_scope, stopped in outcomes:
        assert "already perturbs in scope 'global'" in other
        assert "2 ranks gather theirs" in rank_scope
        assert stopped == (True, True)
