"""The real recipes, started as users start them: two processes under `accelerate launch`."""

import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.data import index_shard
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.tracking.tracker import read_metrics
from tests.support.launching import ROOT, command, digits, flatcal, interrupt, launch, run


@pytest.fixture(scope="session")
def data(digits_shards: Path) -> Path:
    return digits_shards


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(data, tmp_path / "digits"))


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> Path:
    """A CSAM run of two epochs, with everything that a run does at its end."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    done = launch(
        "imagenet_csam",
        *digits("csam", path, data, "train.epochs=2", "train.checkpoint_every_epochs=1"),
        "evaluate.at_end=true",
        "train.validate_every_epochs=1",
        "wandb.mode=offline",
        whole_report=True,
    )
    assert done.returncode == 0, done.stdout
    return path


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def test_a_run_leaves_what_the_contract_promises(finished):
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "report/index.html",
        "report/metrics.csv",
        "report/records.parquet",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "report/figures").glob("*.png"))
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        "step_00000012",
        "step_00000024",
    ]
    state = json.loads((finished / "state.json").read_text())
    assert (state["phase"], state["epoch"], state["step"]) == ("finished", 2, 24)
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["engine"] == "ddp"
    assert list((finished / "wandb").glob("offline-run-*/run-*.wandb")), "W&B's offline file"


def test_metrics_hold_the_keys_that_dashboards_use(finished):
    records = read_metrics(finished / "metrics.jsonl")
    steps = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in steps] == [12, 24]
    for key in ("train/perturbed_loss", "train/sharpness", "perf/images_per_second"):
        assert key in steps[0]
    metrics = json.loads((finished / "report/metrics.json").read_text())
    for key in ("accuracy", "nll", "ece", "signed_gap", "aurc", "temperature"):
        assert isinstance(metrics[key], float), key
    assert metrics["images"] == 997


def test_validation_from_sums_equals_the_report(finished):
    """Over two ranks, from binned sums, against one pass over all records: equal to rounding."""
    last = [r for r in read_metrics(finished / "metrics.jsonl") if "val/ece" in r][-1]
    metrics = json.loads((finished / "report/metrics.json").read_text())
    exact = ("accuracy", "nll", "brier", "ece", "signed_gap")
    entropy = ("mean_entropy", "mean_entropy_correct", "mean_entropy_wrong")
    for key in (*exact, *entropy):
        assert last[f"val/{key}"] == pytest.approx(metrics[key], abs=1e-12), key
    for key in ("auroc", "aurc", "augrc"):  # but these, which binning of confidence blurs
        assert last[f"val/{key}"] == pytest.approx(metrics[key], abs=2e-3), key
    # The report has them by epoch, and pictures of the most confident errors.
    assert metrics["training"]["epoch"] == [1, 2]
    assert metrics["training"]["auroc"][-1] == last["val/auroc"]
    assert len(list((finished / "report/errors").glob("*.jpg"))) == 24


def test_a_finished_run_is_not_run_again(finished, data):
    before = (finished / "model.safetensors").stat().st_mtime_ns
    overrides = ("train.epochs=2", "train.checkpoint_every_epochs=1")
    done = launch("imagenet_csam", *digits("csam", finished, data, *overrides))
    assert done.returncode == 0, done.stdout
    assert "finished already" in done.stdout
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(("recipe", "method"), [("sgd", "sgd"), ("sam", "sam"), ("csam", "csam")])
def test_two_ranks_with_half_the_batch_are_one_rank_with_all_of_it(recipe, method, data, tmp_path):
    """Scope global, fp32: 1e-5 relative to the largest weight after two epochs."""
    for processes in (1, 2):
        done = launch(
            f"imagenet_{recipe}",
            *digits(method, tmp_path / str(processes), data, "train.max_steps=24"),
            processes=processes,
        )
        assert done.returncode == 0, done.stdout
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    scale = max(float(w.abs().max()) for w in one.values())
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-5 * scale
    start = json.loads((tmp_path / "1/metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    assert start < 2.3, "and they have learned something"


def test_ctrl_c_keeps_what_was_done_and_the_same_command_goes_on(data, tmp_path):
    """Interrupted at some step, then resumed: the same bits as without the interruption."""
    arguments = ["train.epochs=15", "train.log_every_steps=1", "train.checkpoint_every_epochs=15"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    words = command("imagenet_csam", *digits("csam", broken, data, *arguments))
    log = broken / "metrics.jsonl"
    code, output = interrupt(words, lambda: log.exists() and log.read_text().count("\n") > 30)
    assert code != 0
    state = json.loads((broken / "state.json").read_text())
    assert state["phase"] == "preempted", output
    assert 30 < state["step"] < 180
    done = launch("imagenet_csam", *digits("csam", broken, data, *arguments))
    assert done.returncode == 0, done.stdout
    assert f"going on after step {state['step']}" in done.stdout
    assert launch("imagenet_csam", *digits("csam", whole, data, *arguments)).returncode == 0
    ours, theirs = weights(broken), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (
        {r["step"]: _untimed(r) for r in read_metrics(path / "metrics.jsonl")}
        for path in (broken, whole)
    )
    assert ours == theirs


def test_a_closed_terminal_ends_a_run_with_a_checkpoint(data, tmp_path):
    path = tmp_path / "run"
    words = command("imagenet_csam", *digits("csam", path, data, "train.epochs=1000"), processes=1)
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup
        os.execvp(words[0], words)
    until = time.monotonic() + 200
    log = path / "metrics.jsonl"
    while not (log.exists() and log.read_bytes()):
        assert time.monotonic() < until
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert time.monotonic() < until
        time.sleep(0.1)
    directory = RunDirectory(path)
    while directory.in_use():  # the launcher may be gone before its rank
        assert time.monotonic() < until
        time.sleep(0.1)
    state = directory.state()
    assert (state.phase, state.cause) == ("preempted", "SIGHUP")
    assert (path / f"checkpoints/step_{state.step:08d}").is_dir()


def _untimed(record: dict) -> dict:
    return {key: value for key, value in record.items() if not key.startswith("perf/")}


def test_a_finished_network_is_evaluated_alike_on_any_number_of_ranks(finished, data, tmp_path):
    """By its weights and by its last checkpoint, both in one job of two processes."""
    last = finished / "checkpoints/step_00000024"
    for processes, networks in ((1, [finished]), (2, [finished, last])):
        output = tmp_path / str(processes)
        done = launch(
            "evaluate", *networks, "--data", data, "--output", output, processes=processes
        )
        assert done.returncode == 0, done.stdout
    folders = ("1", "2/finished", "2/finished_step_00000024")
    one, *others = (Records.load(tmp_path / f / "records.parquet") for f in folders)
    assert len(one) == 997
    for records in (*others, Records.load(finished / "report/records.parquet")):
        assert np.array_equal(one.id, records.id)
        assert np.array_equal(one.before.nll, records.before.nll), "bit for bit"
        assert np.array_equal(one.after.log_confidence, records.after.log_confidence)


def refused(done, *words: str) -> None:
    assert done.returncode != 0
    for word in words:
        assert word in done.stdout, done.stdout


def test_a_missing_shard(own_data, tmp_path):
    (own_data / "digits-train-0002.tar").unlink()
    pattern = f"data.train={own_data}/digits-train-{{0000..0003}}.tar"
    prepare = "data.prepare=null"
    done = launch("imagenet_sam", *digits("sam", tmp_path / "run", own_data, pattern, prepare))
    refused(done, "digits-train-0002.tar", "no such shard")
    assert not (tmp_path / "run").exists()


def test_a_label_out_of_range(own_data, tmp_path):
    done = launch("imagenet_sam", *digits("sam", tmp_path / "run", own_data, "model.num_classes=9"))
    refused(done, "the label 9, outside 0..8", "model.num_classes")
    assert not (tmp_path / "run").exists()


def test_a_wrong_key(data, tmp_path):
    done = launch("imagenet_sam", *digits("sam", tmp_path / "run", data, "sharpness.roh=0.1"))
    refused(done, "sharpness.roh: no such key (on the command line); did you mean sharpness.rho?")
    assert done.stdout.count("no such key") == 1, "said once, not by every rank"


def test_a_run_directory_of_another_configuration(finished, data):
    kept = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    done = launch("imagenet_csam", *digits("csam", finished, data, "sharpness.rho=0.2"))
    refused(done, "another configuration", "sharpness.rho: the run has 0.05, now 0.2")
    assert kept == {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}


def test_a_batch_that_leaves_a_rank_with_nothing(data, tmp_path):
    done = launch(
        "imagenet_sam", *digits("sam", tmp_path / "run", data, "data.global_batch_size=1")
    )
    refused(done, "leaves a rank with 0 samples")
    assert not (tmp_path / "run").exists()


def test_evaluate_takes_a_run_or_a_model(finished):
    refused(flatcal("evaluate", finished, "--model", "mlp"), "evaluate takes a RUN, or --model")


def test_a_stale_index(own_data, tmp_path):
    with (own_data / "digits-train-0000.tar").open("ab") as file:
        file.write(bytes(512))
    prepare = "data.prepare=null"
    done = launch("imagenet_sam", *digits("sam", tmp_path / "run", own_data, prepare))
    refused(done, "digits-train-0000.tar", "flatcal index")


@pytest.mark.exhaustive
def test_a_launcher_that_starts_another_number_of_processes(data, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process, without a word."""
    arguments = digits("sam", tmp_path / "run", data)
    script = str(ROOT / "recipes/imagenet_sam.py")
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    done = run([*launcher, "--cpu", "--num_processes", "2", script, *arguments])
    refused(done, "asked for several processes and started one", "cpu_ddp.yaml")
    done = launch("imagenet_sam", *arguments, "run.world_size=3", processes=1)
    refused(done, "run.world_size=3, but 1 processes run")


def test_without_data_the_flagship_says_what_to_prepare(tmp_path):
    done = launch("imagenet_csam", processes=1, cwd=tmp_path)
    refused(done, "flatcal shard", "imagenet1k-train-0000.tar", "configs/digits/csam.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("imagenet/resnet50_csam", ()),
        pytest.param(
            "imagenet/vit_s16_sam", ("model.options={img_size: 64}",), marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_dry_run_needs_no_data(config, options, tmp_path):
    """Of small images: many processors are slow in bf16."""
    done = launch(
        "imagenet_csam",
        "--dry-run",
        "--config",
        ROOT / f"configs/{config}.yaml",
        "data.image_size=64",
        *options,
        processes=1,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    for words in ("a step takes", "parameters", "FLOP", "memory per rank", "nothing was written"):
        assert words in done.stdout
    assert "MiB of batches in shared memory here (1 ranks x 4 workers" in done.stdout
    assert not list(tmp_path.iterdir())


def test_print_config_is_loadable(tmp_path):
    first = launch("imagenet_csam", "--print-config", "sharpness.rho=0.2", processes=1)
    (tmp_path / "again.yaml").write_text(first.stdout)
    again = launch(
        "imagenet_sgd", "--print-config", "--config", tmp_path / "again.yaml", processes=1
    )
    assert "rho: 0.2" in first.stdout
    assert first.stdout == again.stdout


def test_image_folder_to_network_with_the_command(tmp_path):
    """Shards from a tree of JPEGs, a timm network trained on them, its weights evaluated."""
    generator = np.random.default_rng(0)
    for number in range(48):
        folder = tmp_path / f"tree/class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.JPEG")
    shards = tmp_path / "shards"
    for split in ("train", "validation"):
        done = flatcal("shard", tmp_path / "tree", shards, "--split", split)
        assert done.returncode == 0, done.stdout
    options = ["data.image_size=32", "model.num_classes=3", "model.name=resnet18"]
    done = launch(
        "imagenet_csam",
        "--config",
        ROOT / "configs/base/imagenet_resnet50.yaml",
        f"run.dir={tmp_path / 'run'}",
        f"data.train={shards}",
        f"data.validation={shards}",
        "data.global_batch_size=16",
        "data.micro_batch_size=4",
        "data.workers=0",
        "optimizer.learning_rate=0.01",
        "sharpness.rule=csam",
        "train.max_steps=4",
        "train.validate_every_epochs=null",
        "evaluate.at_end=false",
        "wandb.mode=disabled",
        *options,
    )
    assert done.returncode == 0, done.stdout
    words = ["evaluate", "--model", "resnet18", "--weights", tmp_path / "run/model.safetensors"]
    done = flatcal(*words, "--data", shards, "--output", tmp_path / "out", "--set", *options)
    assert done.returncode == 0, done.stdout
    again = json.loads((tmp_path / "out/metrics.json").read_text())
    assert again["images"] == 48


def test_index_command_indexes_shards_from_elsewhere(own_data):
    for sidecar in own_data.glob("*.index"):
        sidecar.unlink()
    done = flatcal("index", own_data)
    assert done.returncode == 0, done.stdout
    assert "6 shards indexed, 1,797 images" in done.stdout
    assert index_shard(own_data / "digits-train-0000.tar") == 200
