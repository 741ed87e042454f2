"""Runs on data with damaged images: replaced, listed, counted, stopped beyond the limit."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flatcal_dist.batch_sizes import batch_arithmetic
from flatcal_dist.config import load
from flatcal_dist.data import DataError, expand, load_index
from flatcal_dist.data.order import epoch_order, substitutes
from flatcal_dist.data.shards.index import Index
from flatcal_dist.tracking.tracker import read_metrics
from tests.support.launching import digits, launch

WINDOW = 65536
STEPS = 12  # per epoch of 800 images in batches of 64
OPTIONS = ("mixing.name=mixup_cutmix", "mixing.mixup_alpha=0.4", "train.max_steps=30",
           "train.log_every_steps=1", "train.checkpoint_every_epochs=1")  # fmt: skip


@pytest.fixture(scope="module")
def shards(digits_shards: Path, tmp_path_factory) -> Path:
    """A copy, which `bad` changes."""
    return Path(shutil.copytree(digits_shards, tmp_path_factory.mktemp("data") / "digits"))


@pytest.fixture(scope="module")
def index(shards) -> Index:
    return load_index(expand(str(shards / "digits-train-*.tar")))


@pytest.fixture(scope="module")
def bad(shards, index) -> list[int]:
    """Two images that epoch 0 visits, and one that only epoch 1 does; damaged."""
    first, second = (epoch_order(index.lengths, 0, epoch, WINDOW).tolist() for epoch in (0, 1))
    seen = 64 * STEPS
    left_over = next(sample for sample in first[seen:] if sample in second[:seen])
    chosen = [first[0], first[100], left_over]
    for sample in chosen:
        shard, start = index.shards[index.shard[sample]], int(index.offset[sample])
        content = bytearray(shard.read_bytes())
        content[start + 40 : start + 60] = bytes(20)
        shard.write_bytes(content)
    return chosen


def expected(index: Index, bad: list[int], steps: int) -> list[dict]:
    """The list by its definition, one step after the other."""
    entries = []
    for step in range(steps):
        epoch, place = divmod(step, STEPS)
        order = epoch_order(index.lengths, 0, epoch, WINDOW)
        for sample in sorted(order[64 * place : 64 * place + 64].tolist()):
            if sample in bad:
                by = next(s for s in substitutes(0, epoch, sample, 800) if s not in bad)
                entries.append(
                    {
                        "step": step + 1,
                        "epoch": epoch,
                        "shard": str(index.shards[index.shard[sample]]),
                        "key": index.key(sample),
                        "replaced_by": index.key(by),
                    }
                )
    return entries


def listed(run: Path) -> list[dict]:
    entries = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert all("not those that were indexed" in entry.pop("reason") for entry in entries)
    return entries


def test_replaced_listed_stopped_and_resumed(shards, index, bad, tmp_path):
    whole = tmp_path / "whole"
    arguments = ("sam", whole, shards, *OPTIONS)
    done = launch("imagenet_sam", *digits(*arguments), processes=1)
    assert done.returncode == 0, done.stdout
    assert listed(whole) == expected(index, bad, 30)
    assert done.stdout.count("replaced: cannot be used") == 3, "each image is said once"

    run = tmp_path / "run"
    arguments = ("sam", run, shards, *OPTIONS)
    done = launch("imagenet_sam", *digits(*arguments, "data.max_bad_samples=2"))
    assert done.returncode != 0
    assert "3 different images" in done.stdout
    assert "more than data.max_bad_samples=2" in done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert len(said) == 1, "by one rank; the launcher's summary repeats it"
    state = json.loads((run / "state.json").read_text())
    assert state["phase"] == "failed"
    assert index.key(bad[2]) in state["cause"]
    ended = next(e["step"] for e in expected(index, bad, 30) if e["key"] == index.key(bad[2]))
    assert listed(run) == expected(index, bad, ended)
    assert ended > STEPS

    with (run / "bad_samples.jsonl").open("a") as file:
        file.write('{"step": 13, "ep')  # as if it had been killed while it wrote
    done = launch("imagenet_sam", *digits(*arguments, "data.max_bad_samples=3"))
    assert done.returncode == 0, done.stdout
    assert f"going on after step {STEPS}" in done.stdout
    assert (run / "bad_samples.jsonl").read_bytes() == (whole / "bad_samples.jsonl").read_bytes()

    one, two = (load_file(path / "model.safetensors") for path in (whole, run))
    scale = max(float(w.abs().max()) for w in one.values())
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-5 * scale
    one, two = (
        {r["step"]: r["data/replaced"] for r in read_metrics(p / "metrics.jsonl")}
        for p in (whole, run)
    )
    counts = [sum(e["step"] <= step for e in expected(index, bad, 30)) for step in range(1, 31)]
    assert one == two == dict(enumerate(counts, start=1))


def test_zero_stops_at_the_first(shards, bad, tmp_path):
    run = tmp_path / "zero"
    done = launch(
        "imagenet_sam", *digits("sam", run, shards, "data.max_bad_samples=0"), processes=1
    )
    assert done.returncode != 0
    assert "1 different images" in done.stdout
    assert json.loads((run / "bad_samples.jsonl").read_text())["step"] == 1


def test_odd_micro_batches_are_refused_with_mixing():
    config = load(None, ["mixing.name=mixup", "data.global_batch_size=66"])
    with pytest.raises(
        DataError, match=r"66 images on 2 ranks in 1 micro-batches .* multiple of 4"
    ):
        batch_arithmetic(config, 2, None)
    assert "2 ranks" in batch_arithmetic(load(None, ["data.global_batch_size=66"]), 2, None)
    assert "2 ranks" in batch_arithmetic(load(None, ["mixing.name=mixup"]), 2, None)


def test_evaluation_replaces_nothing(shards, tmp_path):
    own = Path(shutil.copytree(shards, tmp_path / "digits"))
    shard = own / "digits-validation-0001.tar"
    content = bytearray(shard.read_bytes())
    start = content.find(b"\x89PNG")
    content[start + 20 : start + 60] = bytes(40)
    shard.write_bytes(content)
    done = launch(
        "imagenet_sam",
        *digits("sam", tmp_path / "run", own, "train.epochs=1"),
        "train.validate_every_epochs=1",
    )
    assert done.returncode != 0
    assert f"{shard}: the image of sample 'digits_" in done.stdout
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert state["phase"] == "failed"
    assert "digits-validation-0001.tar" in state["cause"]
