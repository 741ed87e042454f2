"""The self-check of a cluster: it holds where the step is right, and fails where it is broken."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import nn

from flatcal_dist.config import ConfigError, load
from flatcal_dist.verification import command
from flatcal_dist.verification.faults import refuse_fault
from tests.support import zoo
from tests.support.launching import launch
from tests.support.ranks import on_ranks

CSAM = Path(__file__).parents[2] / "configs/digits/csam.yaml"
NAMES = {
    "restore": "weights come back bit for bit",
    "norm": "length of the perturbation is rho (relative)",
    "sync": "equals one process (weights after a step)",
    "rng": "both passes see one function (loss difference at rho 0)",
    "batch_norm": "norm statistics count one clean pass",
    "autocast": "an outer autocast block hides nothing (share of loss rise)",
    "objective": "equals one process (weights after a step)",
    "memory": "the step after it, with what the rule remembers, too",
}
ASAM_EACH = ["sharpness.rule=asam", "sharpness.rho=0.5", "sharpness.scope=rank"]


def failing(rank: int, world_size: int, cases: list) -> list[tuple[int, list[str]]]:
    """How many invariants there are and which fail, for each (fault or None, overrides)."""
    from flatcal_dist.ranks import distributed
    from flatcal_dist.sharpness.engines.registry import ENGINES
    from flatcal_dist.verification.faults import FAULTS
    from flatcal_dist.verification.invariants import verify

    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in local.items()}
    outcome = []
    for fault, overrides in cases:
        config = load(CSAM, overrides)
        accelerator = distributed.start(config.train.engine, config.train.precision)
        engine = ENGINES[config.train.engine].engine_class()
        with FAULTS[fault](engine) if fault else nullcontext():
            rows = verify(config, accelerator)
        outcome.append((len(rows), [row.invariant for row in rows if not row.holds]))
    return outcome


def test_it_holds_and_each_fault_fails_by_name():
    """On one process; replicas that differ need two."""
    faults = [fault for fault in NAMES if fault not in ("sync", "memory")]
    right, *wrong = on_ranks(1, failing, [(fault, []) for fault in (None, *faults)])[0]
    assert right == (12, [])
    for fault, (_, failed) in zip(faults, wrong, strict=True):
        assert NAMES[fault] in failed, (fault, failed)


def test_two_ranks():
    each = ["sharpness.rule=sam", "sharpness.per_micro_batch=true", "sharpness.scope=rank"]
    cases = [(None, []), (None, ASAM_EACH), (None, each), ("sync", []), ("objective", ASAM_EACH)]
    for right, *others, sync, no_csam in on_ranks(2, failing, cases)[:1]:
        assert right == (12, [])
        assert others == [(11, []), (11, [])]
        assert NAMES["sync"] in sync[1]
        assert no_csam == (11, []), "CSAM's loss is not at stake in ASAM"


def test_rules_that_do_not_perturb_in_each_step_and_smoothed_labels():
    sam = "sharpness.rule=sam"
    overrides = (
        ["sharpness.rule=looksam", "sharpness.rho=0.1", "sharpness.every=2"],
        [sam, "sharpness.every=3", "optimizer.clip_norm=0.5"],
        [sam, "objective.name=label_smoothing"],
        [sam, "objective.name=label_smoothing", "objective.spread=others"],
        ["sharpness.rule=gsam", "sharpness.rho=0.1", "sharpness.alpha=0.7"],
        ["sharpness.rule=momentum_sam", "sharpness.rho=0.5", "sharpness.momentum=0.8"],
    )
    outcome = on_ranks(2, failing, [(None, each) for each in overrides])[0]
    assert outcome == [(12, []), (12, []), (11, []), (11, []), (11, []), (12, [])]


def test_objectives_that_pair_images_or_keep_a_history():
    sam = ["sharpness.rule=sam"]
    cases = [(None, [*sam, f"objective.name={name}"]) for name in ("cs_kd", "crl", "focal")]
    for outcome in on_ranks(2, failing, [*cases, ("norm", cases[0][1])]):
        *right, (_, wrong) = outcome
        assert [failed for _, failed in right] == [[]] * 3
        assert NAMES["norm"] in wrong


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(precision):
    half = [f"train.precision={precision}"]
    right, norm = on_ranks(2, failing, [(None, half), ("norm", half)])[0]
    assert right == (14, [])
    assert norm[1] == [NAMES["norm"]], "a tenth off, which the bounds of rounding would not see"


def test_a_perturbation_that_rounding_turns_away_is_seen():
    """At a small rho what is left of e in bf16 is long enough, but it is noise."""
    small = ["train.precision=bf16", "sharpness.rho=0.001"]
    [(_, failed)] = on_ranks(1, failing, [(None, small)])[0]
    assert "cosine between e and what is seen of it after rounding" in failed


def failing_with(rank: int, world_size: int, cases: list) -> list[tuple[int, list[str]]]:
    """As `failing`, with a network that reads buffers in its forward pass."""
    from flatcal_dist.training import build

    def with_odd_buffers(name, classes, channels, size, options):
        pixels = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 6))
        odd = [zoo.make(name) for name in ("renorm", "spectral norm, old", "starts as None")]
        return nn.Sequential(pixels, Mean(odd), nn.Linear(zoo.CLASSES, classes))

    with patch.object(build, "build", with_odd_buffers):
        return failing(rank, world_size, cases)


class Mean(nn.Module):
    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return sum(network(x) for network in self.networks) / len(self.networks)


def test_networks_whose_forward_pass_reads_buffers():
    """Each rank has buffers of its own, in the reference too."""
    each = ["sharpness.rule=sam", "sharpness.per_micro_batch=true", "sharpness.scope=rank"]
    assert on_ranks(2, failing_with, [(None, []), (None, each)])[0] == [(12, []), (11, [])]


def saves_slowly(rank: int, world_size: int, output: Path) -> tuple[int, bool]:
    """The exit code of this rank, and whether the table was there when it left."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in local.items()}
    save = command._save

    def slowly(*arguments) -> None:
        time.sleep(2)
        save(*arguments)

    words = ["verify_step", "--fault", "sync", "--output", str(output)]
    with patch.object(command, "_save", slowly), patch.object(sys, "argv", words):
        try:
            command.main()
        except SystemExit as end:
            return int(end.code or 0), output.exists()
    return 0, output.exists()


def test_no_rank_leaves_with_an_error_before_the_table_is_saved(tmp_path):
    """The launcher would end rank 0, which writes it."""
    assert on_ranks(2, saves_slowly, tmp_path / "table.json") == [(1, True)] * 2


def test_the_command_prints_saves_and_exits(tmp_path):
    for fault, code in (((), 0), (("--fault", "sync"), 1)):
        output = tmp_path / f"verification-{code}.json"
        done = launch("verify_step", "--output", output, *fault)
        assert done.returncode == code, done.stdout
        table = json.loads(output.read_text())
        assert table["holds"] is (code == 0)
        assert ("FAILS" in done.stdout) is (code == 1)
        assert NAMES["sync"] in done.stdout


@pytest.mark.parametrize(
    ("fault", "overrides", "message"),
    [
        ("objective", ["sharpness.rule=sam"], "use it with sharpness.rule=csam"),
        ("objective", ["sharpness.gamma=0.0"], "a sharpness.gamma above 0"),
        ("memory", [], "use it with a rule that does"),
        ("autocast", ["train.engine=zero2"], "use it with train.engine=ddp"),
    ],
)
def test_a_fault_that_the_configuration_cannot_have_is_refused(fault, overrides, message):
    with pytest.raises(ConfigError, match=message):
        refuse_fault(fault, load(CSAM, overrides))


def test_it_prints_the_configuration_and_offers_no_dry_run(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["verify_step.py", "--print-config", "sharpness.rho=0.2"])
    command.main()
    printed = capsys.readouterr().out
    assert "rho: 0.2" in printed
    assert "invariant" not in printed
    monkeypatch.setattr("sys.argv", ["verify_step.py", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code != 0


# Rules of 2023 and later

NEW = {
    "wsam": ["sharpness.gamma=0.8"],
    "friendly_sam": ["sharpness.sigma=0.8"],
    "ssam": [],
    "le_sam": ["sharpness.budget=0.05", "sharpness.rho=0.5"],
    "stale_sam": ["sharpness.rho=0.5"],
    "functional_sam": [],
    "sam": ["sharpness.select=norms"],
}
NEXT = ("wsam", "friendly_sam", "stale_sam")  # their second step is compared, too
MORE = (
    ["sharpness.rule=wsam", "sharpness.gamma=0.8", "sharpness.decouple=false"],
    ["sharpness.rule=sam", "sharpness.share=0.5"],
    ["sharpness.rule=functional_sam", "sharpness.scope=rank", "sharpness.per_micro_batch=true"],
    ["sharpness.rule=le_sam", "sharpness.budget=0.05", "sharpness.per_micro_batch=true"],
    ["sharpness.rule=le_sam", "sharpness.budget=0.05", "sharpness.scope=rank"],
)


def with_rule(name: str) -> list[str]:
    return [f"sharpness.rule={name}", *NEW[name]]


def test_rules_of_2023_and_later():
    cases = [(None, with_rule(name)) for name in NEW] + [(None, each) for each in MORE]
    outcome = on_ranks(2, failing, cases)[0]
    rows = [12 if name in NEXT else 11 for name in NEW] + [11, 11, 11, 11, 11]
    assert outcome == [(count, []) for count in rows]


OFTEN = ("friendly_sam",)  # one that remembers


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.exhaustive) for n in NEW]
)
def test_each_fault_is_found_with_rules_of_2023_and_later(name):
    named = dict(NAMES)
    if name == "stale_sam":
        named["sync"] = NAMES["memory"]  # there is nothing to perturb by in the first step
    own = {"objective": name == "functional_sam", "memory": name in ("friendly_sam", "stale_sam")}
    faults = [fault for fault in NAMES if own.get(fault, True)]
    outcome = on_ranks(2, failing, [(fault, with_rule(name)) for fault in faults])[0]
    for fault, (_, failed) in zip(faults, outcome, strict=True):
        assert named[fault] in failed, (fault, failed)
