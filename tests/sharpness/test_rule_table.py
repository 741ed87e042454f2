"""The table of rules in the README, which is written from their classes."""

import re

from flatcal_dist.sharpness import FriendlySAM, FunctionalSAM, LookSAM, SharpnessAwareStep
from flatcal_dist.sharpness.rule_table import README, RULES, passes, refused, with_table
from tests.support.engines import make_engine
from tests.support.reference import RULES as COMPARED
from tests.support.reference import network_of, train


def test_the_readme_holds_the_table():
    text = README.read_text()
    assert with_table(text) == text, "write it by `python -m flatcal_dist.sharpness.rule_table`"


def test_every_rule_has_a_recommendation_and_is_compared_with_the_reference():
    text = README.read_text()
    advice = text.partition("Which rule to use:")[2].partition("options go with rules")[0]
    for kind in RULES.values():
        assert re.search(rf"`{kind.__name__}`", advice), kind
        assert any(type(rule) is kind for rule in COMPARED.values()), kind


def test_rules_remember_what_they_say():
    for name, rule in COMPARED.items():
        step = SharpnessAwareStep(make_engine("one", network_of(rule)), rule)
        train(step, 0, 1, numbers=[0])
        assert (step.memory is not None) == bool(rule and rule.remembers), name


def test_words():
    assert passes(LookSAM(every=5)) == "2 in every 5-th step, else 1"
    assert passes(FriendlySAM()) == "2"
    assert refused(FunctionalSAM()) == ["objectives over the whole batch", "`forward=`"]
