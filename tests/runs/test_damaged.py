"""Run directories that were damaged or tampered with: many ways, always the same ones.

Whatever lies in one, it is read without a traceback or a hang, nothing outside of it is touched,
nothing that it holds is run, an older whole checkpoint is used where there is one, and other runs
are shown all the same.
"""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.config import Config, RunConfig
from flatcal_dist.ranks.distributed import meant_for_people
from flatcal_dist.runs import directory as run_directory
from flatcal_dist.runs import status
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.tracking import wandb_sync as syncing
from flatcal_dist.tracking.tracker import Tracker, read_metrics
from flatcal_dist.training import bad_samples
from tests.checkpoints.test_format import save

SECONDS = 20  # in which one directory has to be read
TEXTS = (
    b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff\xfe\x00", b"\x00" * 64, b"[" * 100_000,
    b'{"a":' * 100_000, b'{"step": NaN}', b'{"step": 1e999}', b'{"step": ' + b"9" * 5000 + b"}",
    b'{"phase": "\\ud800"}', b'{"phase": ["running"]}', b'{"step": "7"}', b'{"step": true}',
    b"- &a [x]\n- [*a, *a]\n", b"run: [1]\n", b"\x1b[2J\x07", "é\u2028".encode(),
    b'{"step": 1, "train/loss": "x", "epoch": 1e-308, "val/nll": [1]}\n' * 3,
)  # fmt: skip


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """What belongs to somebody else."""
    path = tmp_path_factory.mktemp("outside")
    (path / "precious").mkdir()
    (path / "precious/thesis.tex").write_text("years of work")
    (path / "letter").write_text("dear all")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of seven steps with checkpoints of 3 and 7."""
    path = tmp_path_factory.mktemp("whole") / "run"
    config = Config(run=RunConfig(dir=str(path)), wandb={"mode": "disabled"})
    directory = RunDirectory(path)
    state = directory.open(config, {"decoder": "pil 1", "host": "here"})
    save(directory.checkpoints, 3)
    save(directory.checkpoints, 7)
    tracker = Tracker(config, path, 7, 0, active=True)
    for step in range(1, 8):
        tracker.log(step, {"train/loss": 1 / step, "epoch": step / 4, "val/nll": 1.0})
    tracker.close()
    directory.wandb_id_file.write_text("abcd1234")
    directory.bad_samples_file.write_text('{"step": 2}\n')
    state.phase, state.step, state.saved = "preempted", 7, 7
    directory.write(state)
    directory.lock.close()
    # The same in fewer lines, which are read many times.
    directory.config_file.write_text(f"run: {{dir: {path}}}\nwandb: {{mode: disabled}}\n")
    return path


def sign(path: Path) -> None:
    """Let the manifest agree with what lies there."""
    manifest = {
        file.name: {"size": file.stat().st_size,
                    "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in (path / "progress.json", path / "state_00000.pt")
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))


def any_file(run: Path, outside: Path, chance: random.Random) -> str:
    """One file is something else. Returns its name."""
    files = sorted(file for file in run.rglob("*") if file.is_file() and not file.is_symlink())
    file = chance.choice(files)
    content = file.read_bytes()
    file.unlink()
    way = chance.randrange(10)
    if way < 5:
        file.write_bytes(chance.choice(TEXTS))
    elif way == 5:
        file.write_bytes(content[: chance.randrange(len(content) + 1)])
    elif way == 6:
        at = chance.randrange(len(content) or 1)
        file.write_bytes(content[:at] + chance.randbytes(3) + content[at + 3 :])
    elif way == 7:
        chance.choice([file.mkdir, lambda: os.mkfifo(file), lambda: None])()
    else:
        targets = ["/dev/zero", "/dev/null", str(outside / "letter"), str(outside / "precious"),
                   str(file), "/nowhere/at/all", "/proc/self/mem"]  # fmt: skip
        file.symlink_to(chance.choice(targets))
    return str(file.relative_to(run))


class Code:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, ("/tmp/run-by-a-checkpoint",)


def in_newest(run: Path, outside: Path, chance: random.Random) -> str:
    """The newest checkpoint is tampered with, so that sizes and hashes are right."""
    path = run / "checkpoints/step_00000007"
    progress, state = json.loads((path / "progress.json").read_text()), path / "state_00000.pt"
    way = chance.randrange(7)
    if way == 0:
        key = chance.choice([*progress])
        wrong = [None, "x", -1, 1.5, [], {"a": "b"}, True, 10**30, float("nan")]
        progress[key] = chance.choice([v for v in wrong if v != progress[key]])
        if key in ("samples_per_perturbation", "wandb_id", "engine", "seconds", "sharded"):
            progress["step"] = 8
    elif way == 1:
        content = torch.load(state, weights_only=True)
        name = chance.choice([*content["arrangement"]["pieces"]])
        content["engine"]["weights"][name].view(-1)[0] = float("nan")
        torch.save(content, state)
    elif way == 2:
        wrong = [[], {"engine": 1}, {"engine": {}, "arrangement": {}}, torch.ones(2), {"a": Code()}]
        torch.save(chance.choice(wrong), state)
    elif way == 3:
        state.write_bytes(chance.choice([pickle.dumps(Code()), b"PK\x03\x04", *TEXTS[:9]]))
    (path / "progress.json").write_text(json.dumps(progress))
    sign(path)
    manifest = json.loads((path / "manifest.json").read_text())
    if way == 4:
        os.mkfifo(path / "pipe")
        names = ["../../../outside", "/dev/zero", "/etc/hostname", "pipe", "../step_00000003",
                 "/proc/self/mem", ".", "", "a\0b", "x" * 300, "state_00001.pt"]  # fmt: skip
        manifest[chance.choice(names)] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    elif way == 5:
        name = chance.choice([*manifest])
        wrong = [None, 5, [], {}, {"size": "1", "sha256": 5}, {"size": 1e300, "sha256": None}]
        manifest[name] = chance.choice(wrong)
    elif way == 6:
        (path / "progress.json").write_bytes(chance.choice(TEXTS[:10]))
        digest = hashlib.sha256((path / "progress.json").read_bytes()).hexdigest()
        size = (path / "progress.json").stat().st_size
        manifest["progress.json"] = {"size": size, "sha256": digest}
    if way in (4, 5, 6):
        (path / "manifest.json").write_text(json.dumps(manifest))
    return "checkpoints/step_00000007"


def links(run: Path, outside: Path, chance: random.Random) -> str:
    """Names that we write to or remove point to what is not ours; leftovers of killed writes."""
    places = [".lock", "metrics.jsonl", "bad_samples.jsonl", "wandb_id", "state.json",
              "checkpoints/damaged_step_00000007", "checkpoints/.step_00000009.abcd",
              "checkpoints/step_00000009", ".state.0123abcd.json", ".config.0123abcd.yaml",
              "environment.json", "config.private.yaml", "wandb", "report"]  # fmt: skip
    place = run / chance.choice(places)
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(outside / chance.choice(["precious", "letter", "nothing"]))
    if "damaged" in place.name:
        (run / "checkpoints/step_00000007/manifest.json").write_text("{")
    return str(place.relative_to(run))


@contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"still reading after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def attempt(work: Callable, *arguments: object) -> object:
    """What it returns, or None where it refuses in words meant for people."""
    try:
        return work(*arguments)
    except Exception as error:
        if not meant_for_people(error):
            raise
        says(error)
    return None


def says(error: Exception, *words: object) -> None:
    """What every message has to satisfy, and one of these words."""
    assert "weights_only" not in str(error)
    assert len(str(error)) < 10_000
    assert not words or any(str(word) in str(error) for word in words), error


def everything(run: Path, config: Config) -> tuple[Path | None, list[str]] | None:
    """All that reads or enters a run directory, in the order of a start; the checkpoint found."""
    directory = RunDirectory(run)
    attempt(directory.check, config)
    attempt(directory.state)
    attempt(directory.check_data, {"train_data": "a" * 64}, "pil 1")
    directory.in_use()
    try:
        attempt(directory.claim)
        found = attempt(checkpoint.newest, directory.checkpoints)
        if found is not None:
            attempt(checkpoint.clean, directory.checkpoints, found[0])
            if found[0] is not None:
                assert "engine" in checkpoint.load_part(found[0], 0)
        for read in (read_metrics, bad_samples._read):
            try:
                file = (
                    directory.metrics_file if read is read_metrics else directory.bad_samples_file
                )
                read(file)
            except (OSError, ValueError) as error:
                says(error, file.name)
        tracker = attempt(Tracker, config, run, 9, 0, True)
        if tracker is not None:
            tracker.log(8, {"train/loss": 0.1})
            tracker.close()
        attempt(directory.open, config, {})
        try:
            syncing.sync([run], dry_run=True)
        except (ValueError, RuntimeError) as error:
            says(error, run)
        return found
    finally:
        if directory.lock is not None:
            directory.lock.close()


def shown(runs: list[Path]) -> list[status.Status]:
    found = status.status(runs)
    status.print_status(found, Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), width=120))
    json.dumps([vars(one) for one in found], allow_nan=False)
    return found


def tree(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("times", [1, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("damage", "count"), [(any_file, 30), (in_newest, 25), (links, 15)])
def test_damaged_run_directories_are_read_in_words(
    damage, count, times, whole, outside, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run_directory, "LOCK_PATIENCE", 0.2)
    config = Config(run=RunConfig(dir=str(whole)), wandb={"mode": "disabled"})
    before = tree(outside)
    for number in range(1, times * count):
        run = tmp_path / (f"run {number}" if number % 10 else f"run {number} [/b]\n\x1b")
        shutil.copytree(whole, run)
        what = damage(run, outside, random.Random(number))
        said = f"{damage.__name__} {number}: {what}"
        with in_time():
            try:
                assert [one.phase for one in shown([run, whole])][1] == "preempted"
                found = everything(run, config)
            except Exception as error:
                raise AssertionError(said) from error
        if damage is in_newest and found is not None:  # None: of another version, as it seems
            path, problems = found
            assert path == run / "checkpoints/step_00000003", said
            assert "step_00000007" in problems[0]
        assert tree(outside) == before, said
        shutil.rmtree(run)
    assert not Path("/tmp/run-by-a-checkpoint").exists()
    assert "Traceback" not in "".join(capsys.readouterr())
