"""The findings of `flatcal validate`, for people and for programs.

An error would stop a run, lose samples or mislabel them. A warning is worth a look.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatcal_dist.data.shards.walk import WARNINGS, Problem

EXAMPLES = 5  # examples of each finding that are kept


@dataclass
class Finding:
    """All problems of one kind."""

    kind: str
    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)  # shard, key, text

    @property
    def severity(self) -> str:
        return "warning" if self.kind in WARNINGS else "error"


@dataclass
class Validation:
    """All findings, and what was examined."""

    shards: int = 0
    images: int = 0
    bytes: int = 0  # bytes of the images
    decoded: int = 0  # images
    checksums: int = 0  # shards whose recorded SHA-256 was compared
    labels: Counter = field(default_factory=Counter)  # images by label
    findings: dict[str, Finding] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, shard: Path | str, problem: Problem) -> None:
        """Count a problem of a shard, and keep it if it is one of the first examples."""
        finding = self.findings.setdefault(problem.kind, Finding(problem.kind))
        finding.count += problem.count
        if len(finding.examples) < EXAMPLES:
            text = problem.text.removeprefix(f"{shard}: ")
            example = {"shard": str(shard), "key": problem.key, "text": text}
            finding.examples.append(example)

    @property
    def errors(self) -> int:
        return sum(f.count for f in self.findings.values() if f.severity == "error")

    def sorted(self) -> list[Finding]:
        """Return all findings, the worst first."""
        return sorted(self.findings.values(), key=lambda f: (f.severity, -f.count, f.kind))

    def to_json(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        simple = ("shards", "images", "bytes", "decoded", "checksums", "notes")
        return {
            **{name: getattr(self, name) for name in simple},
            "errors": self.errors,
            "labels": {str(label): count for label, count in sorted(self.labels.items())},
            "findings": [{"severity": f.severity, **vars(f)} for f in self.sorted()],
        }


def print_validation(found: Validation, console: Console) -> None:
    """Print the findings as a table, the worst first, and what was examined."""
    if found.findings:
        table = Table(title="Findings", title_justify="left", expand=True)
        for name in ("finding", "severity", "count"):
            table.add_column(name, justify="right" if name == "count" else "left", no_wrap=True)
        table.add_column("first examples: shard, key, what", ratio=1, overflow="fold")
        for finding in found.sorted():
            lines = [
                " ".join(filter(None, (Path(e["shard"]).name, e["key"], e["text"].split(". ")[0])))
                for e in finding.examples[:3]
            ]
            table.add_row(
                Text(finding.kind), finding.severity, f"{finding.count:,}", Text("\n".join(lines))
            )
        console.print(table)
    counts = found.labels.values()
    console.print(
        f"{found.shards} shards, {found.images:,} whole samples ({found.bytes / 1e9:.2f} GB of "
        f"images), {len(counts)} classes of {min(counts, default=0):,} to "
        f"{max(counts, default=0):,}; {found.decoded:,} decoded, {found.checksums} checksums "
        "compared.",
        highlight=False,
    )
    for note in found.notes:
        console.print(note, highlight=False)
    warned = sum(f.count for f in found.findings.values()) - found.errors
    console.print(
        f"{found.errors:,} errors, {warned:,} warnings.", style="red" if found.errors else "green"
    )
