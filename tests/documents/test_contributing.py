"""Each page of CONTRIBUTING.md, followed in a copy of the package: its blocks work as shown."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.documents.blocks import ROOT, Block, blocks

PLACE = re.compile(r"# (\S+\.py)(?:, (above|at the beginning of|at the end of) (\w+))?")
TEST = re.compile(r"# (tests/\S+)\.py")
PAGES: dict[str, list[Block]] = {}
for _block in blocks(ROOT / "CONTRIBUTING.md"):
    if _block.language == "python":
        PAGES.setdefault(_block.heading, []).append(_block)


def put(block: Block, root: Path) -> Path:
    """Write a block where its first line says; return the file."""
    first, _, text = block.text.partition("\n")
    place = PLACE.fullmatch(first)
    assert place, f"{first!r} names no file, or no place in it"
    file, where, name = root / place[1], place[2], place[3]
    if where is None:
        assert not file.exists(), f"{place[1]} is there already: say where in it the block goes"
        file.write_text(text)
        return file
    lines = file.read_text().splitlines(keepends=True)
    at = line_of(ast.parse("".join(lines)), where, name)
    file.write_text("".join([*lines[:at], text, *(["\n\n"] * (where == "above")), *lines[at:]]))
    return file


def line_of(module: ast.Module, where: str, name: str) -> int:
    """Return how many lines of a module stand before the place."""
    [node] = [node for node in module.body if name in names_of(node)]
    if where == "above":
        decorators = getattr(node, "decorator_list", [])
        return min(part.lineno for part in (node, *decorators)) - 1
    if where == "at the end of":
        assert isinstance(node.value, ast.Tuple), f"{name} is no tuple of entries"
        return node.value.end_lineno - 1
    body = node.body[ast.get_docstring(node) is not None :]
    return body[0].lineno - 1


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def python(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, which it imports the package from."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_all_additions_have_a_page() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    linked = re.findall(r"^\| \[(\w+(?: \w+)?)\]\(#(\S+)\)", text, re.MULTILINE)
    assert len(linked) == 8
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"## (.*)", text)}
    assert {anchor for _, anchor in linked} <= headings
    assert len(PAGES) == 7, "all but that of an engine have code"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in which every page was followed, and its tests were run."""
    root = tmp_path_factory.mktemp("followed")
    for name in ("flatcal_dist", "tests", "configs", "recipes"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    files = {page: [put(block, root) for block in own] for page, own in PAGES.items()}
    python(root, "-m", "flatcal_dist.calibration.report.model").check_returncode()
    tests = [str(file) for own in files.values() for file in own if is_test(file)]
    done = python(
        root, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--junitxml=results.xml",
        *tests, "tests/calibration/test_model.py",
    )  # fmt: skip
    (root / "output").write_text(done.stdout + done.stderr)
    return root


def is_test(file: Path) -> bool:
    return file.name.startswith("test_")


@pytest.mark.parametrize("page", PAGES)
def test_the_example_works(page: str, followed: Path) -> None:
    """Its own test passed, and its file is lint-free."""
    [test] = [match[1] for block in PAGES[page] if (match := TEST.match(block.text))]
    cases = ElementTree.parse(followed / "results.xml").iter("testcase")
    own = [case for case in cases if case.get("classname") == test.replace("/", ".")]
    assert own, (followed / "output").read_text()
    assert not any(list(case) for case in own), (followed / "output").read_text()
    files = {followed / block.text.split()[1].rstrip(",") for block in PAGES[page]}
    lint = ["check", "--isolated", "--select", "E,F,UP,B", "--line-length", "100"]
    done = python(followed, "-m", "ruff", *lint, *map(str, files))
    assert done.returncode == 0, done.stdout


def test_the_schema_is_that_of_the_new_metric(followed: Path) -> None:
    """And the tests of the schema passed, with it."""
    schema = "flatcal_dist/calibration/report/metrics.schema.json"
    assert "spiegelhalter_z" in (followed / schema).read_text()
    assert " failed" not in (followed / "output").read_text().splitlines()[-1]


def test_the_new_rule_holds_its_invariants(followed: Path) -> None:
    done = python(followed, "recipes/verify_step.py", "sharpness.rule=pnorm_sam")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((followed / "verification.json").read_text())["invariants"]
    assert rows[0]["invariant"].startswith("equals one process")


def test_nothing_of_the_original_was_imported(followed: Path) -> None:
    done = python(followed, "-c", "import flatcal_dist; print(flatcal_dist.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(followed)
