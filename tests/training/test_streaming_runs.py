"""Runs that stream their training shards over http, as users start them."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from flatcal_dist import inputs
from flatcal_dist.config import load
from flatcal_dist.ranks.distributed import FailedTogether
from flatcal_dist.tracking.tracker import read_metrics
from tests.support.launching import command, digits, interrupt, launch, run
from tests.support.web import Web, serving


@pytest.fixture(scope="module")
def shards(digits_shards: Path) -> Path:
    return digits_shards


@pytest.fixture
def web(shards):
    with serving(shards) as served:
        yield served


def streamed(web: Web, path: Path, *overrides: str) -> list[str]:
    """The digits with CSAM, training and validation shards both on the web."""
    return digits(
        "csam",
        path / "run",
        f"{web.url}/",
        "data.prepare=null",
        "data.reader=auto",
        f"data.cache={path / 'cache'}",
        "data.workers=1",
        "data.shuffle_buffer=100",
        "data.micro_batch_size=16",
        "data.stall_timeout=1.0",
        "optimizer.learning_rate=0.5",
        *overrides,
    )


def test_csam_over_http_on_two_ranks_ends_with_the_report(shards, tmp_path):
    """40 steps, so into the fourth epoch, over a line that stalls and breaks; one bad image."""
    with serving(shutil.copytree(shards, tmp_path / "origin")) as web:
        key = damage(web.directory / "digits-train-0001.tar")
        (web.directory / "digits-train.sha256").unlink()  # which would find that, too
        csam_over_http(web, tmp_path, key)


def damage(shard: Path) -> str:
    """Break the header of the second image; its key."""
    with tarfile.open(shard) as tar:
        member = [m for m in tar if m.name.endswith(".png")][1]
    with shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(8))
    return member.name.removesuffix(".png")


def csam_over_http(web: Web, tmp_path: Path, bad: str) -> None:
    web.script = {
        "digits-train-0000.tar": ["500", "cut"],
        "digits-train-0002.tar": ["stall"],
        "digits-validation-0001.tar": ["reset"],
    }
    overrides = ["train.max_steps=40", "evaluate.at_end=true", "train.log_every_steps=10"]
    done = launch("imagenet_csam", *streamed(web, tmp_path, *overrides))
    assert done.returncode == 0, done.stdout
    assert not any(web.script.values()), "all of that happened"
    assert "streaming reader, 4 shards, 800 images an epoch" in done.stdout
    assert "only with as many ranks and workers" in done.stdout
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["train_order"].startswith("streaming reader, 4 shards")
    metrics = json.loads((tmp_path / "run/report/metrics.json").read_text())
    assert metrics["images"] == 997
    assert metrics["accuracy"] > 0.5, "chance is 0.1"
    losses = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in losses] == [10, 20, 30, 40]
    assert losses[-1]["train/loss"] < losses[0]["train/loss"] - 0.3
    assert all(r["train/sharpness"] > 0 for r in losses)
    entries = (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()
    found = [json.loads(entry) for entry in entries]
    assert {(e["shard"], e["key"]) for e in found} == {(f"{web.url}/digits-train-0001.tar", bad)}
    assert 3 <= len(found) <= 4, "once an epoch"
    assert all("cannot be decoded" in e["reason"] and e["replaced_by"] != bad for e in found)
    for shard in ("digits-train-0000.tar", "digits-train-0001.tar"):
        served = [first for name, first in web.requests if name == shard]
        assert len(served) <= 3, "kept, and not downloaded again in the next epochs"
    assert (tmp_path / "run/report/index.html").stat().st_size > 0


@pytest.mark.exhaustive
def test_a_shard_that_is_not_there_ends_all_ranks(web, tmp_path):
    """One rank meets it; none hangs, and the run directory keeps the cause."""
    web.always["digits-train-0003.tar"] = "404"
    done = launch("imagenet_csam", *streamed(web, tmp_path, "train.max_steps=30"))
    assert done.returncode != 0
    said = f"{web.url}/digits-train-0003.tar: the server answered 404"
    assert said in done.stdout, done.stdout
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert state["phase"] == "failed"
    assert said in state["cause"]


def test_indexed_from_urls_is_the_indexed_reader(web, shards, tmp_path):
    """Downloaded, then indexed: the same images in the same order as from the directory itself."""
    PartialState(cpu=True)
    words = streamed(web, tmp_path, "data.reader=indexed")
    words = [word for word in words if "shuffle_buffer" not in word]  # of the other reader
    config = load(words[1], words[2:])
    accelerator = PartialState()
    inputs.download(config.data, accelerator, "train", "validation")
    local = load(words[1], [*words[2:], f"data.train={shards}"])
    for split in ("train", "validation"):
        assert web.count(f"digits-{split}-0000.tar") == 1
    trains = [inputs.open_training(c.data, 10) for c in (config, local)]
    assert trains[0].keys() == trains[1].keys()
    assert all(trains[0].read(i) == trains[1].read(i) for i in range(0, 800, 37))
    with pytest.raises(FailedTogether, match=r"name a directory for them, data\.cache"):
        inputs.download(load(words[1], [*words[2:], "data.cache=null"]).data, accelerator, "train")


@pytest.mark.exhaustive
def test_interrupted_inside_an_epoch_the_run_goes_on_bit_for_bit(web, tmp_path):
    """On as many ranks and workers as before, which is what is promised."""
    arguments = ["train.epochs=20", "train.log_every_steps=1", "train.checkpoint_every_epochs=20"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    words = command("imagenet_csam", *streamed(web, broken, *arguments))
    log = broken / "run/metrics.jsonl"
    code, output = interrupt(words, lambda: log.exists() and log.read_text().count("\n") > 30)
    assert code != 0
    state = json.loads((broken / "run/state.json").read_text())
    assert state["phase"] == "preempted", output
    assert 30 < state["step"] < 240
    assert state["step"] % 12, "inside of an epoch"
    shutil.copytree(broken / "run", tmp_path / "other")
    with_others = [f"run.dir={tmp_path / 'other'}", "data.workers=2", "train.log_every_steps=12"]
    done = run([*words, *with_others])
    assert done.returncode == 0, done.stdout
    assert "some of its images come twice" in done.stdout
    done = run(words)
    assert done.returncode == 0, done.stdout
    assert "some of its images come twice" not in done.stdout
    assert launch("imagenet_csam", *streamed(web, whole, *arguments)).returncode == 0
    ours, theirs = (load_file(path / "run/model.safetensors") for path in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
