"""The last ten lines of a launch that failed hold the reason, whatever failed and wherever."""

import os
import tempfile
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.support.launching import ROOT, _as_launched, _as_script, command, digits, run
from tests.support.ranks import FORKING

CONFIG = ROOT / "configs/accelerate/cpu_ddp.yaml"
SCRIPT = str(ROOT / "recipes/imagenet_sam.py")


@pytest.fixture(scope="module")
def data(digits_shards: Path) -> Path:
    return digits_shards


def summary(folder: Path, per_rank: list[list[str]]) -> tuple[list[str], str]:
    """The last ten lines that torchrun, and Accelerate through it, would end with; and the output.

    Ranks are forked with the variables that torchrun gives them; what they leave in their error
    files is shown by torchrun's own class. It lists the ranks that failed by themselves.
    """
    environments = _as_launched(CONFIG, len(per_rank))
    output = folder / "output"
    files = [folder / f"error{rank}.json" for rank in range(len(per_rank))]
    ranks = []
    for words, own, file in zip(per_rank, environments, files, strict=True):
        own = os.environ | own | {"TORCHELASTIC_ERROR_FILE": str(file)}
        process = FORKING.Process(
            target=_as_script, args=(SCRIPT, words, own, output, folder, True)
        )
        process.start()
        ranks.append(process)
    failed = {}
    try:
        while not failed:
            for rank, process in enumerate(ranks):
                process.join(0.1)
                if process.exitcode:
                    failed[rank] = process
        code = {rank: (process.pid, process.exitcode) for rank, process in failed.items()}
    finally:
        for process in ranks:
            process.terminate()
            process.join(20)
            process.kill()
    failures = {r: ProcessFailure(r, pid, c, str(files[r])) for r, (pid, c) in code.items()}
    text = f"Traceback ...\n{ChildFailedError(SCRIPT, failures)}"
    return text.splitlines()[-10:], output.read_text()


def both(*words: str) -> list[list[str]]:
    return [list(words), list(words)]


def missing_shards(run_dir, data):
    return both(*digits("sam", run_dir, data, "data.prepare=null", f"data.train={data}/none.tar"))


def wrong_key(run_dir, data):
    return both(*digits("sam", run_dir, data, "sharpness.roh=1"))


def wrong_key_on_one_rank(run_dir, data):
    right = digits("sam", run_dir, data)
    return [right, [*right, "sharpness.roh=1"]]


def missing_file_on_one_rank(run_dir, data):
    right = digits("sam", run_dir, data)
    return [right, ["--config", str(run_dir / "nowhere.yaml"), *right[2:]]]


def wrong_option(run_dir, data):
    return both("--no-such-option")


def step_that_cannot_be_built(run_dir, data):
    return both(*digits("sam", run_dir, data, "sharpness.scope=3"))


def damaged_image(run_dir, data):
    """Found by a worker of a loader; more than one bad image is not allowed here."""
    options = ("data.workers=1", "data.max_bad_samples=0", "data.max_pixels=1")
    return both(*digits("sam", run_dir, data, *options))


def network_that_cannot_be_built(run_dir, data):
    return both(*digits("sam", run_dir, data, "model.options.width=-4"))


FAILURES = [
    (wrong_key, "did you mean sharpness.rho?"),
    (wrong_key_on_one_rank, "rank 1: sharpness.roh: no such key"),
    (missing_file_on_one_rank, "rank 1: cannot read the configuration"),
    (wrong_option, "unrecognized arguments: --no-such-option"),
    (missing_shards, "data.train"),
    (step_that_cannot_be_built, "scope 3"),
    (damaged_image, "Check the shards with `flatcal validate`"),
    (network_that_cannot_be_built, "width=-4"),
]


@pytest.mark.parametrize(("failure", "told"), FAILURES, ids=lambda x: getattr(x, "__name__", ""))
def test_the_summary_of_the_launcher_ends_with_the_reason(failure, told, data, tmp_path):
    lines, output = summary(tmp_path, failure(tmp_path / "run", data))
    assert told in "\n".join(lines), (lines, output)
    assert told in output.replace("error on rank 1:", "rank 1:")
    assert "Traceback" not in output


def test_accelerate_ends_with_the_reason(tmp_path):
    """Through torchrun's summary; with one process, after Accelerate's own traceback."""
    words = command("imagenet_sam", "--config", str(ROOT / "configs/digits/sam.yaml"), "a.b=1")
    done = run(words, tmp_path)
    assert done.returncode
    assert "a: no such key" in "\n".join(done.stdout.splitlines()[-10:]), done.stdout


@pytest.mark.exhaustive
def test_accelerate_with_one_process_ends_with_the_reason(tmp_path):
    words = command("imagenet_sam", "--config", str(ROOT / "configs/digits/sam.yaml"), "a.b=1")
    script = words.index("2") + 1
    alone = [*words[:3], "--cpu", "--num_processes", "1", *words[script:]]
    done = run(alone, tmp_path)
    assert "CalledProcessError" in done.stdout
    assert "a: no such key" in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.exhaustive
def test_torchrun_ends_with_the_reason(tmp_path):
    words = command("imagenet_sam", "--config", str(ROOT / "configs/digits/sam.yaml"), "a.b=1")
    script = words.index("2") + 1
    torchrun = [words[0], "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = run([*torchrun, *words[script:]], Path(tempfile.gettempdir()))
    assert "a: no such key" in "\n".join(done.stdout.splitlines()[-10:]), done.stdout
