"""Every command that a README shows is run here on small inputs, or listed with the reason why not.

A command runs in a directory that holds what readers have when they get there: the code, three
small runs of the digits, a file of scores. Words in capitals stand for such things, and options
that make it small are added at its end. A command that no rule knows fails its test.
"""

import re
import shlex
import sys
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest

from flatcal_dist.data import prepare_digits
from tests.documents.blocks import ROOT, blocks, documents
from tests.support.launching import digits, launch, run, script

RUNS = ("runs/mine", "runs/other", "runs/third")
SMALL_STUDY = """
base: {base}
directory: runs/{name}
set: {{train.max_steps: 2, data.train: {data}, data.validation: {data}, wandb.mode: disabled}}
grid: {{run.seed: [0]}}
"""

# What cannot run here, and why. The first pattern that is found in a command counts.
NOT_RUN = {
    r"^\./launch/(test|quickstart)\.sh": "installs 6 GB; tests/launch run the two halves of it",
    r"^\.ci/run|^pre-commit ": "runs all tests, or changes the hooks of the repository",
    r"^(pip|git|apt-get|apt|uv) |-m pip ": "needs the network",
    r"^(srun|sbatch|salloc|squeue) ": "needs SLURM; tests/slurm run jobs on a cluster of their own",
    r"ADDRESS": "several machines; tests/ranks/test_two_nodes.py runs both launchers",
    r"accelerate/(node|cluster)_": "GPUs; the same with configs/accelerate/cpu_* is tested",
    r"ILSVRC|data/imagenet|imagenet1k": "ImageNet's archives; tests/data/test_archives.py",
    r"configs/imagenet|recipes/imagenet_\w+\.py(?!.*configs/digits)": "trains on ImageNet",
    r"=imagenet|imagenet_\w+=|timm:|torchvision:": "ImageNet, or weights from the network",
    r"https?://|s3://|gs://|hf://": "needs the network; tests/data/test_streaming.py has a server",
    r"timm_train\.py": "timm's train.py is not in its package; tests/recipes/test_timm_loop.py",
    r"flatcal sync|--push|wandb ": "needs an account of W&B; tests/tracking have a server",
    r"cifar-?1|tiny-imagenet|CIFAR-|\.npz data/": "needs a download",
}
# Options that make a command small, at its end.
SMALLER = {
    r"recipes/imagenet_\w+\.py": "train.max_steps=4 wandb.mode=disabled",
    r"launch/submit\.py": "--dry-run",
    r"benchmarks/step_overhead\.py": "--network resnet18 --image-size 32 --batch 2 --rounds 1",
    r"benchmarks/checkpoint\.py": "--network resnet18 --rounds 1",
    r"benchmarks/loader\.py": "--images 80 --rounds 1 --workers 0",
    r"benchmarks/small_images\.py": "--images 300 --rounds 1",
    r"benchmarks/report\.py": "--images 300 --classes 10",
    r"benchmarks/interval_coverage\.py(?!.*--logits)": "--images 200 --draws 2 --resamples 20",
    r"benchmarks/interval_coverage\.py.*--logits": "--images 60 --draws 2 --resamples 20",
}
# From day to day, other tests run these loops, and one benchmark stands for all.
RARELY = (
    r"recipes/loops/(fabric|deepspeed|accelerate)|benchmarks/(report|loader|step|interval)|--budget"
)


def commands() -> list[tuple[str, str]]:
    """Return each command once, with the first file that shows it."""
    found: dict[str, str] = {}
    for file in documents():
        for block in blocks(file):
            if block.language in ("bash", "sh", "shell", "console"):
                for line in block.text.replace("\\\n", " ").splitlines():
                    words = without_comment(line)
                    if words:
                        found.setdefault(words, str(file.relative_to(ROOT)))
    return [(file, command) for command, file in found.items()]


def without_comment(line: str) -> str:
    return " ".join(re.sub(r"(^|\s)#.*$", "", line).removeprefix("$ ").split())


COMMANDS = commands()


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the code, three runs, and files to name on the command line."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("configs", "recipes", "launch", "benchmarks", "tests"):
        (place / name).symlink_to(ROOT / name)
    data = prepare_digits(place / "data/digits")
    for seed, name in enumerate(RUNS):
        options = ("train.max_steps=4", f"run.seed={seed}", "model.options.drop_rate=0.1")
        small = ("model.options.width=64", "evaluate.at_end=true")
        done = launch(
            "imagenet_csam", *digits("csam", place / name, data, *options, *small),
            "train.checkpoint_every_steps=4", processes=1, cwd=place,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(60, 4)), np.arange(60) % 4
    np.savez(place / "scores.npz", logits=logits, labels=labels)
    base = ROOT / "configs/digits/sgd.yaml"
    for name in ("STUDY", "SUBMITTED"):  # what has run to its end is not submitted
        (place / f"{name}.yaml").write_text(SMALL_STUDY.format(base=base, data=data, name=name))
    (place / "flatcal.py").write_text("from flatcal_dist.cli import main\nmain()\n")
    return place


NUMBERS = count()


def filled(command: str) -> list[str]:
    """Return the words of a command, with what stands in this place for words in capitals."""
    command = command.replace("accelerate launch ...", "accelerate launch").replace(" ...", "")
    command = re.sub(r"\[[^\]]*\]", "", command)  # usage: what may be left out
    # A place of results is never that of another command.
    new = f"out/{next(NUMBERS)}"
    command = re.sub(r"(?<=--output )\S+|\bDIR\b|(?<=run\.dir=)\S+", new, command)
    command = re.sub(r"(?<=step_)\d+", "00000004", command)
    study = "SUBMITTED.yaml" if "submit.py" in command else "STUDY.yaml"
    command = re.sub(r"\b(configs/studies/\w+|STUDY|FILE|study)\.yaml", study, command)
    command = re.sub(r"(?<=--checkpoint )STEP", "4", command)
    command = re.sub(r"\b(logits|scores|FILE|SCORES)\.(npz|csv|parquet|pt)", "scores.npz", command)
    runs = chain(RUNS, RUNS)
    command = re.sub(r"(?<![\w/])(RUN|/scratch/\w+)\b", lambda _: next(runs), command)
    command = re.sub(r"\bSHARDS\b", "data/digits", command)
    command = re.sub(r"\bFILE\b", f"{new}.file", command)
    small = next((more for at, more in SMALLER.items() if re.search(at, command)), "")
    if " --json" not in command and "benchmarks/" in command:
        small += f" --json {new}.json" if "interval_coverage" not in command else ""
    return shlex.split(f"{command} {small}")


@pytest.mark.parametrize(
    ("file", "command"),
    [
        pytest.param(*one, marks=pytest.mark.exhaustive if re.search(RARELY, one[1]) else ())
        for one in COMMANDS
        if reason(one[1]) is None
    ],
    ids=lambda one: one,
)
def test_a_command_of_a_readme_runs(file: str, command: str, place: Path) -> None:
    words = filled(command)
    (place / "out").mkdir(exist_ok=True)
    done = perform(words, place)
    assert done.returncode == 0, f"{file}: {shlex.join(words)}\n{done.stdout[-6000:]}"


def perform(words: list[str], place: Path):
    """Run a command: those that only start Python in a process that has imported torch already."""
    program, *rest = words
    if program == "flatcal":
        return script(place / "flatcal.py", *rest, cwd=place)
    if program == "python" and rest[0].endswith(".py"):
        return script(place / rest[0], *rest[1:], cwd=place, seconds=600)
    if program == "python":
        return run([sys.executable, *rest], place)
    if program == "accelerate" and rest[0] == "launch":
        at = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        config = rest[rest.index("--config_file") + 1] if "--config_file" in rest else "cpu_ddp"
        recipe = str(Path("..", rest[at]).with_suffix(""))
        return launch(recipe, *rest[at + 1 :], launcher=Path(config).stem, cwd=place)
    pytest.fail(f"no rule says how {shlex.join(words)!r} is run; add one here, or list it")


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_the_list_of_what_is_not_run_holds_patterns_only(pattern: str) -> None:
    """A pattern that finds everything would let every command pass."""
    everyday = ("flatcal report RUN", "python recipes/loops/plain_pytorch.py", "new_tool --now")
    assert not any(re.search(pattern, command) for command in everyday)


def test_an_unknown_command_would_be_noticed(place: Path) -> None:
    assert reason("new_tool --now") is None
    with pytest.raises(pytest.fail.Exception, match="no rule says how"):
        perform(["new_tool", "--now"], place)


def test_there_are_commands() -> None:
    assert len([file for file, _ in COMMANDS if file == "README.md"]) >= 5
