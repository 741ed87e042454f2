r"""Submit a run or a study to SLURM, and the evaluation and comparison that follow it.

    python launch/submit.py --nodes 4 --time 24:00:00 --config configs/imagenet/resnet50_csam.yaml \
        data.train=/data/train data.validation=/data/validation run.dir=/runs/csam
    python launch/submit.py --study STUDY.yaml --compare

A job asks the run to stop before its time is over. It requeues itself if the run was preempted, at
most --max-restarts times. It runs a copy of this code, RUN/code, so that edits do not reach it.
RUN/slurm holds the script, the whole configuration and the log. --dry-run prints the scripts and
changes nothing. Options of a site can stand in a file, one on each line: @site.txt
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this code, wherever another copy is installed

from flatcal_dist import config as configuration  # noqa: E402
from flatcal_dist.arguments import whole_number  # noqa: E402
from flatcal_dist.errors import ConfigError  # noqa: E402
from flatcal_dist.files import read_bytes, write_json, write_text  # noqa: E402
from flatcal_dist.printing import never_fail  # noqa: E402
from flatcal_dist.runs.directory import RunDirectory, RunError  # noqa: E402
from flatcal_dist.runs.environment import code_version  # noqa: E402
from flatcal_dist.studies.elements import Element, elements  # noqa: E402
from flatcal_dist.studies.file import load_study  # noqa: E402
from flatcal_dist.urls import hide  # noqa: E402

if TYPE_CHECKING:
    from flatcal_dist.config import Config

CODE = ("flatcal_dist", "recipes", "configs", "launch", "pyproject.toml")


class SubmitError(RuntimeError):
    """Something cannot be submitted. The message says why."""


@dataclass(frozen=True)
class Job:
    """What is submitted: one run, or the unfinished runs of a study.

    Attributes:
        name: The name of the job.
        directory: The directory of the run, or of the study. It holds code/ and slurm/.
        config: The configuration of the run, or the one that all runs of the study start from.
        runs: All run directories, of finished runs too.
        elements: The unfinished runs of a study.
    """

    name: str
    directory: Path
    config: "Config"
    runs: Sequence[Path]
    elements: Sequence[Element] = ()

    @property
    def slurm(self) -> Path:
        return self.directory / "slurm"


def main() -> None:
    never_fail()
    try:
        arguments = _parser().parse_intermixed_args()
    except UnicodeDecodeError as error:
        files = ", ".join(word for word in sys.argv[1:] if word.startswith("@"))
        sys.exit(f"error: {files}: expected a text file in UTF-8 with an option a line ({error})")
    try:
        _refuse_short(arguments)
        _refuse_absent(arguments)
        job = _study(arguments) if arguments.study else _run(arguments)
        scripts = render(job, arguments)
        if arguments.dry_run:
            for name, text in scripts.items():
                print(f"# {job.slurm / name}\n{text}")
            return
        _refuse_queued(job)
        write(job, scripts)
        submit(job, list(scripts))
    except (SubmitError, RunError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _run(arguments: argparse.Namespace) -> Job:
    config = configuration.load(arguments.config, arguments.overrides)
    ranks = arguments.nodes * arguments.ranks_per_node
    if config.run.world_size not in (None, ranks):
        raise ConfigError(
            f"run.world_size={config.run.world_size}, but {arguments.nodes} nodes with "
            f"{arguments.ranks_per_node} ranks are {ranks}"
        )
    if config.run.dir is None:
        raise SubmitError("what is to run? Name --config FILE, --study FILE or run.dir=DIRECTORY")
    directory = _directory(config.run.dir)
    run = config.run.model_copy(update={"dir": str(directory), "world_size": ranks})
    if _finished(directory):
        raise SubmitError(f"{directory} is finished already; name another run.dir")
    return Job(directory.name, directory, config.model_copy(update={"run": run}), [directory])


def _study(arguments: argparse.Namespace) -> Job:
    if arguments.config:
        raise SubmitError("--config is for one run: the file of a study names its `base`")
    study = load_study(arguments.study)
    directory = _directory(study.directory)
    found = [
        _in_directory(element, directory / element.name)
        for element in elements(study, arguments.overrides)
    ]
    missing = [element for element in found if not _finished(element.run)]
    if not missing:
        raise SubmitError(f"all {len(found)} runs of {directory} are finished")
    base, runs = configuration.load(study.base), [element.run for element in found]
    return Job(study.name, directory, base, runs, missing)


def _in_directory(element: Element, run: Path) -> Element:
    own = element.config.run.model_copy(update={"dir": str(run)})
    return replace(element, run=run, config=element.config.model_copy(update={"run": own}))


def _refuse_short(arguments: argparse.Namespace) -> None:
    """Raise SubmitError for a job that is told to stop as it starts: it would requeue for ever."""
    limit = _seconds(arguments.time)
    if limit and limit <= arguments.signal_seconds:  # none and 0 are no limit
        raise SubmitError(
            f"--time {arguments.time} is no more than the {arguments.signal_seconds} s before its "
            "end in which the run is to stop (--signal-seconds): ask for more, or for fewer"
        )


def _refuse_absent(arguments: argparse.Namespace) -> None:
    """Raise SubmitError for what only the job would notice, or what would change its script."""
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    if arguments.recipe not in recipes:
        raise SubmitError(f"--recipe {arguments.recipe}: expected one of {', '.join(recipes)}")
    arguments.python = Path(os.path.abspath(arguments.python.expanduser()))  # noqa: PTH100
    for path in (arguments.python, arguments.python.parent / "python"):
        # --dry-run may be for another machine. The job calls `python`, from this directory.
        if not arguments.dry_run and not (path.is_file() and os.access(path, os.X_OK)):
            raise SubmitError(f"--python {arguments.python}: there is no program {path}")
    if os.pathsep in str(arguments.python):
        raise SubmitError(f"--python {arguments.python}: PATH takes no directory with a colon")
    lines = {"--time": [arguments.time], "--time-after": [arguments.time_after]}
    for option, values in (lines | {"--sbatch": arguments.sbatch}).items():
        for value in values:
            if not value.isprintable():
                raise SubmitError(
                    f"{option} {value!r}: a line break or another control character would become "
                    "lines of the job's script"
                )
    if arguments.evaluate is not None and hide(arguments.evaluate) != arguments.evaluate:
        raise SubmitError(
            f"--evaluate {hide(arguments.evaluate)!r} holds credentials, which everybody on the "
            "machine could read in the job's script and in its list of processes: name the data as "
            "the run's data.validation, which is kept in a private file"
        )


def _seconds(time: str) -> int | None:
    """Return the seconds of --time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None without a number."""
    days, _, rest = time.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [days or "0", *parts]) or len(parts) > 3:
        return None  # UNLIMITED, or sbatch refuses it
    numbers = [*map(int, parts), 0, 0]
    if days or len(parts) == 3:
        return int(days or 0) * 86400 + numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    return numbers[0] * 60 + numbers[1]


def _finished(run: Path) -> bool:
    state = RunDirectory(run).state()
    return state is not None and state.phase == "finished"


def _directory(name: str | Path) -> Path:
    path = Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100  links stay as written
    if any(letter.isspace() or letter in "%\\'\"#" for letter in str(path)):
        raise SubmitError(f"{path}: SLURM takes no blanks, quotes, %, # or \\ in the name of a log")
    if ":" in str(path) or not str(path).isprintable():
        raise SubmitError(
            f"{str(path)!r}: expected a directory without a colon, which separates the directories "
            "of PYTHONPATH (the job would run other code than its copy), and without control "
            "characters"
        )
    return path


def render(job: Job, arguments: argparse.Namespace) -> dict[str, str]:
    """Return the scripts to submit by name, in their order: train.sh, evaluate.sh, compare.sh."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "launch"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    code, array = job.directory / "code", ",".join(str(e.index) for e in job.elements)
    if array and arguments.parallel:
        array += f"%{arguments.parallel}"
    engine = job.config.train.engine
    values = vars(arguments) | {
        "chdir": _directory(Path.cwd()),
        "log": job.slurm / ("%A_%a.out" if array else "%j.out"),
        "gpus_per_node": 0 if arguments.cpu else arguments.ranks_per_node,
        "setup": _setup(arguments.setup) if arguments.setup else "",
        "bin": arguments.python.parent,
        "code": code,
        "run": job.directory,
        "arguments": job.slurm,
        "array": array,
        "accelerate": code
        / f"configs/accelerate/{'cpu' if arguments.cpu else 'cluster'}_{engine}.yaml",
    }
    template = environment.get_template("slurm.sh.j2")

    def script(kind: str, words: Sequence[str], **changed: object) -> str:
        name = job.name if kind == "train" else f"{job.name}-{kind}"
        return template.render(values | {"kind": kind, "name": name, "words": words} | changed)

    recipe, config = code / f"recipes/{arguments.recipe}.py", str(job.slurm / "config.yaml")
    scripts = {"train.sh": script("train", [] if array else ["--config", config], script=recipe)}
    after = {"launcher": "srun", "nodes": 1, "time": arguments.time_after}
    if arguments.evaluate is not None:
        recipe = code / "recipes/evaluate.py"
        words = _split(arguments.evaluate)
        scripts["evaluate.sh"] = script("evaluate", words, script=recipe, **after)
    if arguments.compare is not None:
        runs = [*job.runs, *map(_directory, arguments.compare)]
        words = [*map(str, runs), "--output", str(job.directory / "comparison")]
        alone = {"ranks_per_node": 1, "gpus_per_node": 0, "array": ""}
        log = {"log": job.slurm / "%j.out"}
        scripts["compare.sh"] = script("compare", words, **after, **alone, **log)
    return scripts


def _setup(file: Path) -> str:
    try:
        return read_bytes(file).decode().strip()
    except (OSError, ValueError) as error:
        raise SubmitError(
            f"--setup {file} cannot be read ({error}): expected a text file of shell lines"
        ) from None


def _split(evaluate: str) -> list[str]:
    try:
        return shlex.split(evaluate)
    except ValueError as error:
        raise SubmitError(
            f"--evaluate {evaluate!r}: {str(error).lower()}; expected options as a shell reads them"
        ) from None


def write(job: Job, scripts: dict[str, str]) -> None:
    """Write what the job needs into its directory: code, configuration, scripts, arguments."""
    if not job.elements:
        RunDirectory(job.directory).check(job.config)
    try:
        job.slurm.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SubmitError(
            f"no directory can be made as {job.slurm} ({error.strerror}): name another run.dir, or "
            "mend the permissions"
        ) from None
    if (job.directory / "code").exists():
        print(f"{job.directory / 'code'} is kept as it is; delete it to run the present code")
    else:
        copy_code(job.directory / "code")
    if job.elements:
        for element in job.elements:
            configuration.write(element.config, job.slurm / f"{element.index}.yaml")
            write_text(job.slurm / f"{element.index}.run", f"{element.run}\n")
    else:
        configuration.write(job.config, job.slurm / "config.yaml")
    for name, text in scripts.items():
        write_text(job.slurm / name, text)


def copy_code(destination: Path) -> None:
    """Copy the files of this program as they are, and record the commit that they come from."""
    temporary = destination.with_name(f".code.{os.getpid()}")
    for name in CODE:
        source, target = ROOT / name, temporary / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    write_json(temporary / "snapshot.json", code_version())
    temporary.rename(destination)


def submit(job: Job, scripts: Sequence[str]) -> None:
    """Submit each script, to start when the one before it has ended well."""
    previous = None
    for name in scripts:
        options = []
        if previous is not None:
            each = job.elements and name == "evaluate.sh"  # as soon as its run is done
            options = [
                f"--dependency={'aftercorr' if each else 'afterok'}:{previous}",
                "--kill-on-invalid-dep=yes",
            ]
        number = _sbatch([*options, str(job.slurm / name)], previous)
        if previous is None:
            for run, suffix in [(e.run, f"_{e.index}") for e in job.elements] or [
                (job.directory, "")
            ]:
                (run / "slurm").mkdir(parents=True, exist_ok=True)
                write_text(run / "slurm/job", f"{number}{suffix}\n")
        after = f", after {previous}" if previous else ""
        print(f"job {number}: {job.slurm / name}{after}")
        previous = number
    print(f"logs: {job.slurm}; state: flatcal status {' '.join(map(str, job.runs[:3]))}")


def _sbatch(words: Sequence[str], submitted: str | None) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise SubmitError(
            "there is no sbatch here: submit from a login node of the cluster; --dry-run prints "
            "what would be submitted"
        ) from None
    if done.returncode:
        also = f"; job {submitted} is submitted already" if submitted else ""
        raise SubmitError(f"sbatch {words[-1]}: {done.stderr.strip()}{also}")
    # On some sites sbatch prints a greeting before the answer, which is JOB or JOB;CLUSTER.
    numbers = re.findall(r"^(\d+)(?:;\S+)?$", done.stdout, re.MULTILINE)
    if not numbers:
        raise SubmitError(
            f"sbatch {words[-1]} ended well and gave no job number, but {done.stdout.strip()!r}: "
            "look with squeue whether it was submitted"
        )
    return numbers[-1]


def _refuse_queued(job: Job) -> None:
    """Raise SubmitError for a run that is queued: a second job would wait, and then fail."""
    for run in [element.run for element in job.elements] or [job.directory]:
        if not shutil.which("squeue"):
            return
        if (number := RunDirectory(run).job()) is None:
            continue
        words = ["squeue", "--noheader", "--format=%T", "--jobs", number]
        found = subprocess.run(words, capture_output=True, text=True)  # an old number is an error
        if found.returncode == 0 and found.stdout.strip():
            raise SubmitError(
                f"{run} is in the queue: job {words[-1]}, {found.stdout.split()[0].lower()}; wait "
                f"for it, or scancel {words[-1]}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )  # fmt: skip
    add = parser.add_argument
    add("--config", type=Path, action="append", metavar="FILE", help="one run; later files win")
    add("--study", type=Path, metavar="FILE", help="a study: a job array with all of its runs")
    add("--recipe", default="imagenet_csam", help="any recipe runs any configuration")
    add("--launcher", choices=("srun", "accelerate", "torchrun", "deepspeed"), default="srun",
        help="what starts the ranks; srun starts each of them as one task")  # fmt: skip
    add("--nodes", type=whole_number(), default=1)
    add("--ranks-per-node", type=whole_number(), default=8, metavar="N", help="and GPUs of a node")
    add("--cpu", action="store_true", help="ask for no GPUs")
    add("--cpus-per-rank", type=whole_number(), default=8, metavar="N")
    add("--time", default="24:00:00", help="the time limit of one job, after which it is requeued")
    add("--signal-seconds", type=whole_number(), default=300, metavar="S",
        help="when to stop before the limit; SLURM may be a minute early")  # fmt: skip
    add("--max-restarts", type=whole_number(0), default=20, metavar="N")
    add("--parallel", type=whole_number(), metavar="N", help="how many runs of a study run at once")
    add("--evaluate", nargs="?", const="", metavar="OPTIONS",
        help="then run flatcal evaluate with these options, in quotes")  # fmt: skip
    add("--compare", nargs="*", metavar="RUN", help="then run flatcal compare, with these runs too")
    add("--time-after", default="02:00:00", metavar="TIME", help="the time limit of these two")
    add("--python", type=Path, default=Path(sys.executable), help="the Python to run with")
    add("--setup", type=Path, metavar="FILE", help="shell lines to begin with, such as modules")
    add("--sbatch", action="append", default=[], metavar="OPTION",
        help="an option for sbatch, such as --sbatch=--partition=gpu; may be repeated")  # fmt: skip
    add("--dry-run", action="store_true", help="print the scripts and change nothing")
    add("overrides", nargs="*", metavar="key.sub=value")
    return parser


if __name__ == "__main__":
    main()
