"""The code blocks of a Markdown file."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the heading above it."""

    file: Path
    language: str
    text: str
    heading: str


def blocks(file: Path) -> list[Block]:
    """Return the fenced blocks of a file, in their order."""
    text = file.read_text()
    found = []
    for match in FENCE.finditer(text):
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text[: match.start()]), re.MULTILINE)
        found.append(Block(file, match[1], match[2], headings[-1] if headings else ""))
    return found


def documents() -> list[Path]:
    """Return all Markdown files of the repository that a user reads."""
    found = []
    for path in sorted(ROOT.rglob("*.md")):
        hidden = any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        made = path.relative_to(ROOT).parts[0] in ("build", "runs", "data", "quickstart", "wandb")
        if not hidden and not (made and len(path.relative_to(ROOT).parts) > 1):
            found.append(path)
    return found


def without_blocks(file: Path) -> str:
    """Return the text of a Markdown file without its fenced blocks."""
    return FENCE.sub("", file.read_text())
