"""The table of objectives in the README, which is written from their classes."""

import re

import pytest

from flatcal_dist.config import ConfigError, load
from flatcal_dist.objectives.table import OBJECTIVES, README, needed, refused, with_table


def test_the_readme_holds_the_table_and_a_recommendation_for_each():
    text = README.read_text()
    assert with_table(text) == text, "write it by `python -m flatcal_dist.objectives.table`"
    advice = text.partition("Which one to use:")[2].partition("`csam_loss`")[0]
    assert [name for name in OBJECTIVES if not re.search(f"`{name}`", advice)] == []


def test_what_the_table_says_is_refused_is_refused():
    words = {
        "`csam`": ["sharpness.rule=csam"],
        "mixup, CutMix": ["mixing.name=mixup"],
        "streamed shards": ["data.reader=streaming"],
        "rules with one pass": ["sharpness.rule=stale_sam"],
        "`share` below 1": ["sharpness.rule=sam", "sharpness.share=0.5"],
        "scopes other than `global`, `per_micro_batch`, `functional_sam`": [
            "sharpness.rule=sam", "sharpness.scope=rank",
        ],
    }  # fmt: skip
    for name, kind in OBJECTIVES.items():
        for told, overrides in words.items():
            both = [f"objective.name={name}", "train.epochs=200", *overrides]
            if told in refused(kind):
                with pytest.raises(ConfigError):
                    load(None, both)
            else:
                load(None, both)


def test_words():
    assert needed(OBJECTIVES["crl"]) == [
        "pairs of images", "a history of each image, in checkpoints"
    ]  # fmt: skip
    assert needed(OBJECTIVES["focal"]) == []
