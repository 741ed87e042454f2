"""W&B as a sink: its files hold what metrics.jsonl holds, and nothing it does reaches training."""

import http.server
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from flatcal_dist import cli
from flatcal_dist import config as configuration
from flatcal_dist.config import Config
from flatcal_dist.tracking import wandb_sync as sync
from flatcal_dist.tracking.tracker import Tracker, read_metrics
from flatcal_dist.tracking.wandb_files import history, read_records, segments

WAIT = 90  # seconds, for what takes two on an idle machine


@pytest.fixture
def run(tmp_path):
    """A run directory without training: its configuration, and records by Tracker."""

    def make(name: str, **wandb: object) -> tuple[Config, Path]:
        path = tmp_path / name
        path.mkdir()
        config = Config.model_validate({"wandb": {"finish_seconds": 60.0} | wandb})
        (path / "config.yaml").write_text(configuration.to_yaml(config))
        (path / "environment.json").write_text(json.dumps({"code": {"commit": "abc"}}))
        return config, path

    return make


def log(config: Config, path: Path, steps: range, phase: str) -> None:
    tracker = Tracker(config, path, 6, steps.start, active=True)
    for step in steps:
        tracker.log(step, {"train/loss": 1 / step, "perf/step_seconds": time.monotonic()})
        if step % 2 == 0:
            tracker.log(step, {"val/accuracy": 0.9 - abs(step - 4) / 10, "val/nll": float("nan")})
    write_state(path, phase, steps[-1])
    tracker.close()


def write_state(path: Path, phase: str, step: int) -> None:
    (path / "state.json").write_text(json.dumps({"phase": phase, "step": step}))


def write_report(path: Path) -> None:
    (path / "report").mkdir()
    row = {"low": 0.0, "high": 0.5, "count": 3, "mean_confidence": 0.4, "accuracy": 1 / 3}
    empty = {"low": 0.5, "high": 1.0, "count": 0, "mean_confidence": None, "accuracy": None}
    metrics = {"bins": [row, empty], "after_temperature": {"bins": [empty, row]}}
    (path / "report/metrics.json").write_text(json.dumps(metrics))


def kept(values: dict) -> dict:
    """What must not depend on restarts; the paths of files name the run and the row."""
    return {
        key: value
        for key, value in values.items()
        if not key.startswith(("_", "perf/")) and not key.endswith("path")
    }


def rows(path: Path) -> dict[int, dict]:
    """By step, what its last rows say."""
    found: dict[int, dict] = {}
    for file in segments(path):
        for row in history(file):
            found.setdefault(row["step"], {}).update(kept(row))
    return found


def summary(path: Path) -> dict:
    """Of the last segment, which is what the server keeps."""
    found = {}
    for record in read_records(segments(path)[-1]):
        for item in record.summary.update:
            found[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.history.item:  # what is logged goes into the summary
            found[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return kept(found)


def metrics_defined(file: Path) -> set[tuple]:
    found = [record.metric for record in read_records(file) if record.HasField("metric")]
    return {(m.name, m.glob_name, m.step_metric, m.options.hidden) for m in found}


def tables(path: Path) -> dict[str, dict]:
    return {
        file.name.rsplit("_", 2)[0]: json.loads(file.read_text())
        for file in sorted((path / "wandb").glob("*/files/media/table/**/*.json"))
    }


def test_an_interrupted_run_is_in_wandb_what_the_uninterrupted_one_is(run):
    """Killed after step 5, its checkpoint at 3: steps 4 and 5 come again, with their last rows."""
    config, whole = run("whole", group="study")
    write_report(whole)
    log(config, whole, range(1, 7), "finished")
    config, parts = run("parts", group="study")
    log(config, parts, range(1, 6), "running")
    write_report(parts)
    log(config, parts, range(4, 7), "finished")
    assert (len(segments(whole)), len(segments(parts))) == (1, 2)

    assert rows(parts) == rows(whole)
    truth: dict[int, dict] = {}
    for record in read_metrics(whole / "metrics.jsonl"):
        values = {k: v for k, v in kept(record).items() if v is not None}
        truth.setdefault(record["step"], {}).update(values)
    written = rows(whole)
    for step, values in truth.items():
        assert values.items() <= written[step].items()

    steps = [row["_step"] for file in segments(parts) for row in history(file)]
    assert steps == list(range(len(steps))), "W&B drops what does not grow"
    assert summary(parts) == summary(whole)
    assert summary(parts)["best/accuracy"] == 0.9
    assert summary(parts)["best/accuracy_step"] == 4
    assert [metrics_defined(file) for file in segments(parts)] == [
        metrics_defined(segments(whole)[0])
    ] * 2
    assert ("", "*", "step", False) in metrics_defined(segments(whole)[0])
    assert tables(parts) == tables(whole)
    assert len(tables(whole)) == 2, "before and after temperature scaling"

    started = [r.run for file in segments(parts) for r in read_records(file) if r.HasField("run")]
    assert {r.run_id for r in started} == {(parts / "wandb_id").read_text()}
    assert {r.run_group for r in started} == {"study"}
    sent = {item.key: json.loads(item.value_json) for item in started[0].config.update}
    assert sent["environment"]["code"] == {"commit": "abc"}
    assert sent["train"] == config.model_dump()["train"]
    artifacts = [r.request.log_artifact.artifact.type for r in read_records(segments(parts)[1])]
    artifacts += [r.artifact.type for r in read_records(segments(parts)[1])]
    assert "report" in artifacts


@pytest.mark.exhaustive
def test_checkpoints_become_artifacts_when_asked_for(run):
    for asked in (True, False):
        config, path = run(f"asked_{asked}", log_checkpoints=asked)
        (path / "checkpoints/step_00000003").mkdir(parents=True)
        (path / "checkpoints/step_00000003/state_00000.pt").write_bytes(b"weights")
        (path / "checkpoints/.step_00000006.ab").mkdir()  # being written: none yet
        log(config, path, range(1, 7), "finished")
        found = [r.artifact for r in read_records(segments(path)[0]) if r.HasField("artifact")]
        found += [
            r.request.log_artifact.artifact
            for r in read_records(segments(path)[0])
            if r.request.HasField("log_artifact")
        ]
        artifacts = [
            (a.type, set(a.aliases), [(c.path, c.size) for c in a.manifest.contents]) for a in found
        ]
        expected = ("checkpoint", {"step_00000003", "latest"}, [("state_00000.pt", 7)])
        assert artifacts == ([expected] if asked else [])


@pytest.mark.exhaustive
def test_wandb_killed_in_the_middle_is_said_once_and_made_up_for(run, capfd):
    config, path = run("killed")
    tracker = Tracker(config, path, 100, 0, active=True)
    tracker.log(1, {"train/loss": 1.0})
    core = wait_for(lambda: children(tracker.wandb.process.pid))
    wait_for(lambda: segments(path))
    for process in core:
        os.kill(process, signal.SIGKILL)
    step = 1
    deadline = time.monotonic() + WAIT
    while tracker.wandb is not None and time.monotonic() < deadline:
        step += 1
        tracker.log(step, {"train/loss": 1 / step})
        time.sleep(0.1)
    last = step + 3
    for later in range(step + 1, last + 1):
        tracker.log(later, {"train/loss": 1 / later})
    write_state(path, "preempted", last)
    tracker.close()
    assert capfd.readouterr().out.count("W&B is left out from here on") == 1
    assert [r["step"] for r in read_metrics(path / "metrics.jsonl")] == list(range(1, last + 1))

    sync.complete(path)
    found = {row["step"]: row["train/loss"] for file in segments(path) for row in history(file)}
    assert found == {n: 1 / n for n in range(1, last + 1)}
    assert sync.lines_sent(path) == sync.lines_wanted(path), "and nothing is written twice"


@pytest.mark.exhaustive
@pytest.mark.parametrize("answer", ["500", "nothing"])
def test_a_server_that_fails_costs_a_bounded_time_at_the_end(run, answer, monkeypatch, capfd):
    with fake_server(answer) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        config, path = run("served", mode="online", finish_seconds=8.0)
        started = time.monotonic()
        tracker = Tracker(config, path, 100, 0, active=True)
        for step in range(1, 50):
            tracker.log(step, {"train/loss": 1 / step})
        assert time.monotonic() - started < 10, "training does not wait for it"
        write_state(path, "finished", 49)
        closing = time.monotonic()
        process = tracker.wandb.process
        tracker.close()
        assert time.monotonic() - closing < 8 + 5 + 10
        assert process.poll() is not None
    assert len(read_metrics(path / "metrics.jsonl")) == 49
    assert "W&B" in capfd.readouterr().out
    monkeypatch.delenv("WANDB_BASE_URL")
    if sync.lines_sent(path) < sync.lines_wanted(path):
        sync.complete(path)
    assert sorted({row["step"] for file in segments(path) for row in history(file)}) == list(
        range(1, 50)
    )


def test_sync_gives_up_on_a_server_that_says_nothing_and_keeps_the_logs(run, monkeypatch, capfd):
    config, path = run("offline", mode="offline")
    log(config, path, range(1, 4), "finished")
    with fake_server("nothing") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        with pytest.raises(RuntimeError, match=r"W&B did not take .*offline; .* tries again"):
            sync.sync([path], minutes=0.1)
    assert "not sent within 0.1 minutes (--minutes)" in capfd.readouterr().err
    assert sync.lines_sent(path) == sync.lines_wanted(path)


@pytest.mark.exhaustive
def test_what_a_damaged_log_lost_is_said_and_can_be_made_up_for(run, capfd):
    config, path = run("damaged", mode="offline")
    log(config, path, range(1, 3), "preempted")
    log(config, path, range(3, 5), "finished")
    assert sync.lines_lost(path) == 0
    segments(path)[0].write_bytes(b"")
    sync.sync([path], dry_run=True)
    assert "3 records before the last one sent stand in no log" in capfd.readouterr().err
    (path / "wandb").rename(path / "aside")  # as it says
    sync.complete(path)
    assert sync.lines_lost(path) == 0
    assert sync.lines_sent(path) == sync.lines_wanted(path)


class fake_server:
    """A W&B server on 127.0.0.1 that answers every request with 500, or takes it and is silent."""

    def __init__(self, answer: str) -> None:
        over = self.over = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                if answer == "nothing":
                    over.wait(WAIT)
                    self.close_connection = True
                else:
                    super().handle_one_request()

            def do_POST(self) -> None:
                self.send_error(500)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def children(process: int) -> list[int]:
    done = subprocess.run(
        ["ps", "--no-headers", "-o", "pid", "--ppid", str(process)], capture_output=True, text=True
    )
    return [int(word) for word in done.stdout.split()]


def wait_for(found):
    deadline = time.monotonic() + WAIT
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


@pytest.mark.parametrize("minutes", ["nan", "0", "-1", "x", "1e9"])
def test_minutes_that_are_none_are_refused_with_what_was_expected(minutes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sync", str(tmp_path), f"--minutes={minutes}"])
    assert f"{minutes!r} is not a number of minutes" in capsys.readouterr().err
