"""Links, code and imports of the Markdown files; and loops of the READMEs, run as they stand."""

import ast
import os
import re
import textwrap
from pathlib import Path

import pytest
import torch

from flatcal_dist.sharpness import CSAM
from tests.documents.blocks import ROOT, Block, blocks, documents, without_blocks
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, far, make_batch, make_network, make_optimizer, reference

# What READMEs have told readers to import, of this version and earlier ones.
PUBLISHED = """
from flatcal_dist.calibration.calibrators import TemperatureScaling
from flatcal_dist.calibration.metrics import aurc, expected_calibration_error
from flatcal_dist.objectives import CRL, Focal, Targets
from flatcal_dist.sharpness import ASAM, CSAM, GSAM, SAM, LookSAM, MomentumSAM
from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.sharpness.zero import ZeroEngine, start_zero
"""
PYTHON = [
    block
    for file in documents()
    for block in blocks(file)
    if block.language == "python" and file.name == "README.md"
]


def name_of(block: Block) -> str:
    return f"{block.file.parent.relative_to(ROOT)}: {block.heading}"


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    text = without_blocks(file)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (file.parent / path).resolve() if path else file
        assert other.exists(), f"{target} does not exist"
        assert other.is_relative_to(ROOT), f"{target} lies outside of the repository"
        if anchor:
            assert anchor in anchors(other), f"{target}: there is no such heading"


def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a file."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(file), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("block", PYTHON, ids=name_of)
def test_python_compiles_and_its_imports_work(block: Block) -> None:
    run_imports(ast.parse(textwrap.dedent(block.text)))


def test_all_that_was_published_can_be_imported() -> None:
    run_imports(ast.parse(PUBLISHED))


def run_imports(module: ast.Module) -> None:
    imports = [node for node in ast.walk(module) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, type_ignores=[]), "README", "exec"), {})


LOOPS = [block for block in PYTHON if re.match(r"# An? .*loop\n", block.text)]
LOOPS += [block for block in blocks(ROOT / "README.md") if block.heading == "Your own loop"]


def test_the_readme_shows_a_loop() -> None:
    assert LOOPS[-1].file == ROOT / "README.md"
    assert len(LOOPS[-1].text.splitlines()) <= 14


@pytest.mark.parametrize("number", range(len(LOOPS)), ids=lambda i: LOOPS[i].text.splitlines()[0])
def test_a_loop_is_csam(number: int) -> None:
    """The very lines on four batches, against CSAM written out: on one process, and on two."""
    expected = reference(CSAM(rho=0.05, gamma=1.0), numbers=range(4))[0]
    alone = "engine = ReplicatedEngine(model" in LOOPS[number].text or "plain" in LOOPS[number].text
    full = on_ranks(1 if alone else 2, run_loop, LOOPS[number].text)[0]
    assert far(full, expected) < CLOSE


def run_loop(rank: int, world_size: int, text: str) -> dict[str, torch.Tensor]:
    network = make_network()
    optimizer = make_optimizer(network)
    batches = [
        tuple(t.tensor_split(world_size)[rank] for t in make_batch(number)) for number in range(4)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    names = {"model": network, "optimizer": optimizer, "loader": batches}
    names |= {"epochs": 1, "scheduler": schedule}
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    exec(textwrap.dedent(text), names)
    return names["step"].engine.full_weights()  # whole on rank 0
