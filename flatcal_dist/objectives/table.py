"""The table of objectives in this package's README.md, from their classes.

`python -m flatcal_dist.objectives.table` writes it. A test keeps both equal.
"""

from pathlib import Path

from flatcal_dist import markdown
from flatcal_dist.choices import found_in
from flatcal_dist.files import write_text
from flatcal_dist.objectives.base import Objective

README = Path(__file__).with_name("README.md")
FIRST = "<!-- objectives: python -m flatcal_dist.objectives.table -->"
LAST = "<!-- end of objectives -->"
OBJECTIVES = found_in("flatcal_dist.objectives", Objective)  # type: ignore[type-abstract]
HEAD = ("objective", "what it is", "labels", "needs", "not with")


def as_markdown() -> str:
    """Return the table of all objectives."""
    rows = [
        (
            f"`{kind.name}`: `{kind.__name__}`",
            markdown.summary(kind),
            "hard" if kind.hard_labels else "hard, soft",
            "; ".join(needed(kind)) or "-",
            "; ".join(refused(kind)) or "-",
        )
        for kind in OBJECTIVES.values()
    ]
    return markdown.table(HEAD, rows)


def with_table(text: str) -> str:
    """Return a Markdown text with the table between its marker lines."""
    return markdown.between(text, FIRST, LAST, as_markdown())


def needed(kind: type[Objective]) -> list[str]:
    """Return what an objective needs beside logits and labels."""
    found = []
    if kind.pairs == "any":
        found.append("pairs of images")
    elif kind.pairs == "same_class":
        found.append("pairs of images of a class")
    if kind.keeps_history:
        found.append("a history of each image, in checkpoints")
    if kind.whole_batch:
        found.append("the confidences of the whole batch, gathered in each pass")
    return found


def refused(kind: type[Objective]) -> list[str]:
    """Return what an objective cannot be combined with."""
    found = ["`csam`"] if kind.name != "cross_entropy" else []
    if kind.hard_labels:
        found.append("mixup, CutMix")
    if kind.pairs == "same_class":
        found.append("RegMixup")
    if kind.pairs == "same_class" or kind.keeps_history:
        found.append("streamed shards")
    if kind.keeps_history:
        found.append("rules with one pass")
    if kind.keeps_history or kind.whole_batch:
        found.append("`share` below 1")
    if kind.whole_batch:
        found.append("scopes other than `global`, `per_micro_batch`, `functional_sam`")
    return found


if __name__ == "__main__":
    write_text(README, with_table(README.read_text()))
    print(README)
