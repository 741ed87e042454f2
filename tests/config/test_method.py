"""The name of a method: all that distinguishes it, and no number that is a setting."""

import pytest

from flatcal_dist.config import load, method_of
from flatcal_dist.config.identity import chosen_values, fingerprint


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "sgd"),
        ("optimizer.name=adamw", "adamw"),
        ("objective.name=cross_entropy mixing.name=none", "sgd"),
        ("sharpness.rule=sam sharpness.rho=0.2", "sam"),
        ("sharpness.rule=csam sharpness.gamma=2", "csam"),
        ("sharpness.rule=sam average.name=swa average.start=0.5", "sam+swa"),
        ("sharpness.rule=sam sharpness.select=norms", "sam[select=norms]"),
        ("sharpness.rule=sam sharpness.share=0.25 sharpness.every=2", "sam[every=2,share=0.25]"),
        ("sharpness.rule=looksam sharpness.every=5", "looksam"),
        ("sharpness.rule=looksam sharpness.every=10", "looksam[every=10]"),
        ("sharpness.rule=csam sharpness.start_epoch=80", "csam[start_epoch=80]"),
        ("sharpness.rule=sam sharpness.scope=rank", "sam[scope=rank]"),
        ("sharpness.rule=sam sharpness.scope=4", "sam[scope=4]"),
        ("sharpness.rule=sam sharpness.per_micro_batch=true", "sam[per_micro_batch=yes]"),
        ("sharpness.rule=sam sharpness.allow_other_samples=true", "sam"),
        ("sharpness.rule=sam sharpness.rho_schedule=learning_rate",
         "sam[rho_schedule=learning_rate]"),
        ("average.name=swa average.norm_statistics=average", "sgd+swa[norm_statistics=average]"),
        ("objective.name=lp_norm objective.p=2", "sgd+lp_norm[p=2]"),
        ("sharpness.rule=wsam", "wsam"),
        ("sharpness.rule=wsam sharpness.decouple=false", "wsam[decouple=no]"),
        ("objective.name=mmce objective.form=plain", "sgd+mmce[form=plain]"),
        ("objective.name=mmce objective.accumulation=second_pass", "sgd+mmce"),
        ("mixing.name=regmixup mixing.alpha=20", "sgd+regmixup"),
        ("sharpness.rule=sam objective.name=crl average.name=ema mixing.name=regmixup",
         "sam+crl+ema+regmixup"),
    ],
)  # fmt: skip
def test_a_name_holds_what_distinguishes_a_method(words, name):
    assert method_of(load(None, words.split())) == name


def test_defaults_that_are_written_out_change_neither_name_nor_fingerprint():
    """So that a command finds its run after an update that brings new keys."""
    short = load(None, ["sharpness.rule=sam"])
    long = load(None, ["sharpness.rule=sam", "sharpness.select=all", "sharpness.share=1"])
    assert fingerprint(short) == fingerprint(long)
    chosen = {name: values for name, values in chosen_values(long).items() if name != "sharpness"}
    assert chosen_values(long)["sharpness"] == {"rule": "sam"}
    assert all(list(values) == ["name"] for values in chosen.values()), chosen
    assert method_of(short) == method_of(long)


@pytest.mark.parametrize(
    "word", ["sharpness.rho=0.1", "train.epochs=91", "objective.name=focal", "data.mean=[0,0,0]"]
)
def test_what_is_computed_changes_the_fingerprint(word):
    rule = "sharpness.rule=sam"
    assert fingerprint(load(None, [rule])) != fingerprint(load(None, [rule, word]))


def test_the_size_of_a_micro_batch_counts_where_each_has_its_perturbation():
    """Two runs with other numbers of samples per perturbation are not one run, nor one method."""
    rule, micro = ["sharpness.rule=sam"], "data.micro_batch_size=16"
    assert fingerprint(load(None, [*rule, micro])) == fingerprint(load(None, rule))
    each = [*rule, "sharpness.per_micro_batch=true"]
    assert (
        len({fingerprint(load(None, [*each, *more])) for more in ([], [micro], [f"{micro}0"])}) == 3
    )
    assert method_of(load(None, [*rule, micro])) == "sam"
    name = method_of(load(None, [*each, micro]))
    assert name == "sam[per_micro_batch=yes,micro_batch_size=16]"
