"""The self-check of a cluster: it holds where the step is right, and fails where it is broken."""

import json

import pytest

from tests.launching import launch

NAMES = {
    "restore": "weights come back",
    "norm": "length of the perturbation",
    "sync": "equals one process",
    "rng": "both passes see one function",
    "batch_norm": "norm statistics",
    "autocast": "autocast",
}


def verify(path, *arguments, processes=2):
    output = path / "verification.json"
    done = launch("verify_step", "--output", output, *arguments, processes=processes)
    table = json.loads(output.read_text()) if output.exists() else None
    return done, table


@pytest.mark.parametrize(
    "overrides",
    [
        ["sharpness.rule=csam"],
        ["sharpness.rule=asam", "sharpness.rho=0.5", "sharpness.scope=rank"],
        pytest.param(
            ["sharpness.rule=sam", "sharpness.per_micro_batch=true", "sharpness.scope=rank"],
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(["sharpness.rule=sam", "train.precision=bf16"], marks=pytest.mark.exhaustive),
    ],
    ids=lambda overrides: " ".join(o.split(".")[1] for o in overrides),
)
def test_it_holds(tmp_path, overrides):
    done, table = verify(tmp_path, *overrides)
    assert done.returncode == 0, done.stdout
    assert table["holds"]
    assert len(table["invariants"]) == 9
    assert "holds" in done.stdout


@pytest.mark.parametrize("fault", NAMES)
def test_a_fault_is_seen_and_named(tmp_path, fault):
    """On one process, where that can show it: replicas that differ need two."""
    done, table = verify(tmp_path, "--fault", fault, processes=2 if fault == "sync" else 1)
    assert done.returncode == 1, done.stdout
    failed = [row["invariant"] for row in table["invariants"] if not row["holds"]]
    assert any(NAMES[fault] in invariant for invariant in failed), failed
    assert "FAILS" in done.stdout
