"""perturb=False: steps in which the rule is not used are plain, and it forgets what it kept."""

import pytest

from flatcal_dist.sharpness import SharpnessAwareStep
from tests.support.engines import UNLIKE, everywhere, make_engine, used
from tests.support.reference import RULES, bits, my_part, train

KEEPING = ("looksam", "momentum_sam", "friendly_sam", "stale_sam", "wsam", "csam", "functional_sam")


def phases(rank, world_size, kind):
    """Plain, sharp, plain, sharp. Beside it, by steps of their own on one engine."""
    outcome = {}
    for name in KEEPING if kind in ("one", "ddp") else KEEPING[2:5]:
        ends = []
        for apart in (False, True):
            engine = make_engine(kind)
            sharp, plain = SharpnessAwareStep(engine, RULES[name]), SharpnessAwareStep(engine, None)
            memory = []
            for number, perturb in enumerate((False, True, True, False, True, True)):
                at = number if name != "looksam" else number + 1
                if apart and not perturb:
                    train(plain, rank, world_size, numbers=[number])
                    sharp = SharpnessAwareStep(engine, RULES[name])
                    memory.append(None)
                    continue
                sharp(my_part(rank, world_size, number), perturb=perturb, at=at)
                assert sharp.perturbs is (perturb and (name != "looksam" or at % 2 == 0))
                memory.append(sharp.memory)
            ends.append((bits(used(engine)), [m is None for m in memory]))
        outcome[name] = ends[0] == ends[1], ends[0][1]
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_phase_without_the_rule_is_plain_training_and_the_next_begins_anew(kind):
    for outcome in everywhere(kind, phases):
        for name, (same, forgotten) in outcome.items():
            assert same, name
            assert forgotten[0]
            assert forgotten[3], name
            assert not RULES[name].remembers or not forgotten[2], name
