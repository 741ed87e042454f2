"""Tables in READMEs that are written from classes, between two marker lines."""

import inspect
from collections.abc import Sequence


def summary(kind: type) -> str:
    """Return the first line of a class's docstring, as it may stand in a table."""
    return (inspect.getdoc(kind) or "").partition("\n")[0].replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    first, *rest = (f"| {' | '.join(cells)} |\n" for cells in (head, *rows))
    return first + "|" + "---|" * len(head) + "\n" + "".join(rest)


def between(text: str, first: str, last: str, body: str) -> str:
    """Return a Markdown text with `body` between its two marker lines."""
    before, _, rest = text.partition(first)
    return f"{before}{first}\n\n{body}\n{last}{rest.partition(last)[2]}"
