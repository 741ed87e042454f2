"""Going on from the newest whole checkpoint: who may, and how it is read."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flatcal_dist import batch_sizes, inputs
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints import resharding
from flatcal_dist.checkpoints.saving import Saver
from flatcal_dist.config import Config
from flatcal_dist.data import steps_per_epoch
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.files import write_text
from flatcal_dist.ranks.distributed import on_all_ranks, said_by_rank_0
from flatcal_dist.runs.directory import RunDirectory, RunError, State
from flatcal_dist.runs.environment import describe_environment
from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.tracking.tracker import Tracker, read_metrics
from flatcal_dist.training.bad_samples import BadSamples
from flatcal_dist.training.build import samples_per_perturbation
from flatcal_dist.training.setup import Setup


@dataclass(frozen=True)
class Started:
    """One start of a run, which has entered its directory and is where training goes on.

    Attributes:
        state: The state to record, on rank 0; None on other ranks.
        saver: It writes checkpoints.
        tracker: It writes metrics.jsonl, and speaks to the person who watches.
        bad_samples: The list of images that were replaced.
        done: How many steps were taken before.
        seconds: How long they took, over all starts.
        skipped: How many of these steps had no finite gradient.
    """

    state: State | None
    saver: Saver
    tracker: Tracker
    bad_samples: BadSamples
    done: int = 0
    seconds: float = 0.0
    skipped: int = 0


def start(setup: Setup) -> Started:
    """Enter the run directory, and fill step and average from its newest whole checkpoint, if any.

    Called by all ranks. Raises FailedTogether where the run cannot go on in this directory.
    """
    config, directory, accelerator = setup.config, setup.directory, setup.accelerator

    def claim() -> None:
        if setup.main:
            directory.claim()

    on_all_ranks(claim)
    path, remarks = find(setup)
    state, entry_remarks = on_all_ranks(lambda: enter(setup, path))
    directory.enter()
    saver = Saver(
        directory.checkpoints,
        accelerator.process_index,
        accelerator.num_processes,
        config.train.keep_checkpoints,
        config.train.keep_best,
    )
    done, seconds, skipped = 0, 0.0, 0
    if path is not None:
        remarks += load(path, setup)
        progress = checkpoint.load_progress(path)
        done, seconds, skipped = progress.step, progress.seconds, progress.skipped
    tracker = Tracker(config, directory.path, setup.total_steps, done, setup.main)
    try:
        _announce(setup, tracker, done, [*remarks, *entry_remarks])
        bad_samples = BadSamples(
            directory.bad_samples_file,
            setup.train,
            setup.epoch_steps,
            config.data.max_bad_samples,
            done,
            setup.main,
            tracker.say,
        )
    except BaseException:
        tracker.close(exit_code=1)
        raise
    return Started(state, saver, tracker, bad_samples, done, seconds, skipped)


def _announce(setup: Setup, tracker: Tracker, done: int, remarks: list[str]) -> None:
    for remark in remarks:
        tracker.say(remark)
    at = f", going on after step {done}" if done else ""
    tracker.say(f"run directory: {setup.directory.path}{at}")
    tracker.say(inputs.promise(setup.train, setup.config.data.reader))
    ranks = setup.accelerator.num_processes
    tracker.say(batch_sizes.batch_arithmetic(setup.config, ranks, len(setup.train)))


def find(setup: Setup) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, or None, and remarks on damaged ones.

    Called by all ranks. One rank reads every byte, and compares it with the manifest. Raises
    FailedTogether where these ranks cannot go on from the checkpoint.
    """
    config, directory, accelerator = setup.config, setup.directory, setup.accelerator

    def look() -> tuple[Path | None, list[str]]:
        path, problems = checkpoint.newest(directory.checkpoints)
        if path is not None:
            _refuse_other_samples(directory, config, accelerator.num_processes, path)
        else:
            _refuse_lost(directory, config, problems)
        remarks = [f"passed over a checkpoint: {problem}" for problem in problems]
        return path, remarks + _not_again(directory, config, path)

    none: tuple[Path | None, list[str]] = (None, [])
    return said_by_rank_0(on_all_ranks(lambda: look() if accelerator.is_main_process else none))


def _refuse_lost(directory: RunDirectory, config: Config, problems: list[str]) -> None:
    """Raise RunError if a run had checkpoints and has no whole one, unless it may begin again.

    The permission holds for one start: a job that is requeued would give it again.
    """
    state = directory.state()
    saved = max([*checkpoint.found(directory.checkpoints), state.saved if state else 0])
    logged = state is None and any(
        record.get("step") for record in read_metrics(directory.metrics_file)
    )
    if not saved and not logged:
        return
    starts = state.restarts + 1 if state else 1
    if config.run.start_again == starts:
        return
    lost = f"had a checkpoint of step {saved}" if saved else "has records of steps in metrics.jsonl"
    again = config.run.start_again
    was = "" if again is None else f" (run.start_again={again} was for another start)"
    raise RunError(
        f"{directory.path} {lost}, and no checkpoint in {directory.checkpoints} is whole"
        + "".join(f"\n  {problem}" for problem in problems[:3])
        + "\nPut one back and give the same command again; or lose what was trained and begin at "
        f"step 0: run.start_again={starts}, which holds for the next start only{was}"
    )


def _not_again(directory: RunDirectory, config: Config, path: Path | None) -> list[str]:
    """Return a remark if the permission to begin again is for this start and has no effect."""
    state = directory.state()
    starts = state.restarts + 1 if state else 1
    if path is None or config.run.start_again != starts:
        return []
    return [
        f"run.start_again={starts} has no effect: {path} is whole, so the run goes on from it. To "
        "begin at step 0, name another run.dir"
    ]


def _refuse_other_samples(directory: RunDirectory, config: Config, ranks: int, path: Path) -> None:
    progress = checkpoint.load_progress(path)
    before, now = progress.world_size, samples_per_perturbation(config, ranks)
    if progress.samples_per_perturbation != now and not config.sharpness.allow_other_samples:
        raise RunError(
            f"{directory.path} perturbs with {progress.samples_per_perturbation} samples "
            f"({before} ranks), here it would be {now} ({ranks} ranks): in this scope that is "
            f"another algorithm. Go on with {before} ranks, begin another run, or say "
            "sharpness.allow_other_samples=true"
        )


def enter(setup: Setup, found: Path | None) -> tuple[State | None, list[str]]:
    """Claim the run directory, to go on from the checkpoint `found`. Return its state, and remarks.

    Rank 0 does this and keeps the state; other ranks get None. Raises RunError for a directory that
    another job uses, or of a run with other data.
    """
    config, directory, accelerator = setup.config, setup.directory, setup.accelerator
    train, validation = setup.train, setup.validation
    if not accelerator.is_main_process:
        return None, []
    identities = {"train_data": train.identity, "validation_data": validation.identity}
    environment = describe_environment(config.data.decoder)
    directory.check_data(identities, environment["decoder"])
    environment |= {
        "engine": config.train.engine,
        "precision": config.train.precision,
        "world_size": accelerator.num_processes,
        "device": str(accelerator.device.type),
        "train_order": inputs.promise(train, config.data.reader),
        "readers": _readers(config, accelerator.num_processes),
        **identities,
    }
    before = directory.environment().get("readers", environment["readers"])
    state = directory.open(config, environment)
    checkpoint.clean(directory.checkpoints, found)
    state.saved = max(checkpoint.found(directory.checkpoints), default=0)
    directory.write(state)
    if not isinstance(train, Stream) or found is None or before == environment["readers"]:
        return state, []
    if checkpoint.load_progress(found).step % steps_per_epoch(
        len(train), config.data.global_batch_size
    ):
        return state, [
            "going on inside of an epoch with other ranks, workers or micro-batches than before: "
            "some of its images come twice, others not at all"
        ]
    return state, []


def _readers(config: Config, world_size: int) -> dict[str, int]:
    """Return what the order of a stream depends on besides the seed."""
    size = batch_sizes.micro_batch_size(config.data, world_size)
    return {"ranks": world_size, "workers": config.data.workers, "micro_batch_size": size}


def load(path: Path, setup: Setup) -> list[str]:
    """Fill step and average from a checkpoint, and return remarks.

    A checkpoint of another engine or number of ranks is cut for these ranks. Called by all ranks.
    Raises FailedTogether for a checkpoint that cannot be cut so.
    """
    config, directory, accelerator = setup.config, setup.directory, setup.accelerator
    step, average = setup.step, setup.average
    progress = checkpoint.load_progress(path)
    rank, ranks, engine = accelerator.process_index, accelerator.num_processes, config.train.engine
    if rank == 0 and progress.wandb_id and directory.wandb_id() is None:
        write_text(directory.wandb_id_file, progress.wandb_id)
    if progress.engine == engine and (not progress.sharded or progress.world_size == ranks):
        number = rank if progress.sharded else 0
        state = on_all_ranks(partial(_read, path, number, step))
        checkpoint.fill(step, state, average)
        return []
    resharding.load(path, step, progress, average)
    before = f"{progress.world_size} ranks of {progress.engine}"
    return [f"the checkpoint, of {before}, was cut for {ranks} ranks of {engine}"]


def _read(path: Path, number: int, step: SharpnessAwareStep) -> dict[str, Any]:
    """Read a part of a checkpoint, and fill the objective here, where all ranks share a refusal."""
    state = checkpoint.load_part(path, number)
    checkpoint.fill_objective(step, state.get("objective"), path)
    return state
