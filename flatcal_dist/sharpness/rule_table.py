"""The table of rules in this package's README.md, from the classes of the rules.

`python -m flatcal_dist.sharpness.rule_table` writes it. A test keeps both equal.
"""

from pathlib import Path

from flatcal_dist import markdown
from flatcal_dist.choices import found_in
from flatcal_dist.files import write_text
from flatcal_dist.sharpness.rules import Rule

README = Path(__file__).with_name("README.md")
FIRST = "<!-- rules: python -m flatcal_dist.sharpness.rule_table -->"
LAST = "<!-- end of rules -->"
HEAD = ("rule", "what it is", "passes", "copies", "scopes", "not with")
RULES = found_in("flatcal_dist.sharpness.rules", Rule)  # type: ignore[type-abstract]


def as_markdown() -> str:
    """Return the table of all rules."""
    return markdown.table(HEAD, [_row(kind) for kind in RULES.values()])


def with_table(text: str) -> str:
    """Return a Markdown text with the table between its marker lines."""
    return markdown.between(text, FIRST, LAST, as_markdown())


def _row(kind: type[Rule]) -> tuple[str, ...]:
    rule = kind()
    return (
        f"`{rule.name}`: `{kind.__name__}`", markdown.summary(kind), passes(rule), copies(rule),
        "`global`" if rule.combines else "all", "; ".join(refused(rule)) or "-",
    )  # fmt: skip


def passes(rule: Rule) -> str:
    """Return how many passes a step takes, in words."""
    if not rule.ascent_share:
        return "1"
    return "2" if rule.every == 1 else f"2 in every {rule.every}-th step, else 1"


def copies(rule: Rule) -> str:
    """Return how many copies of the weights the rule holds in its last pass, in words."""
    held = 1 + rule.keeps_ascent + rule.remembers
    return f"{held}, 1 in checkpoints" if rule.remembers else str(held)


def refused(rule: Rule) -> list[str]:
    """Return what the rule cannot be combined with."""
    found = []
    if rule.own_loss:
        found.append("other objectives, mixing")
    if rule.follows_outputs:
        found.append("objectives over the whole batch")
    if not rule.ascent_share:
        found.append("objectives with a history")
    if rule.own_loss or rule.follows_outputs:
        found.append("`forward=`")
    return found


if __name__ == "__main__":
    write_text(README, with_table(README.read_text()))
    print(README)
