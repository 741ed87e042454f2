"""Going on from a checkpoint: which one, whether these ranks can, and how it is read."""

from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flatcal_dist import batch_sizes, inputs
from flatcal_dist.averaging.average import Average
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints import resharding
from flatcal_dist.config import Config
from flatcal_dist.data import Index, steps_per_epoch
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.files import write_text
from flatcal_dist.ranks.distributed import on_all_ranks, said_by_rank_0
from flatcal_dist.runs.directory import RunDirectory, RunError, State
from flatcal_dist.runs.environment import describe_environment
from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.tracking.tracker import read_metrics
from flatcal_dist.training.build import samples_per_perturbation


def find(
    directory: RunDirectory, config: Config, accelerator: Accelerator
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and remarks on damaged ones. Called by all ranks.

    Raises FailedTogether where these ranks cannot go on from it. One rank looks: every byte is
    read, and compared with the manifest.
    """

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
    """A run that had checkpoints and has no whole one must not begin again unless it is told to.

    The word for it holds for one start: a job that is requeued would say it again.
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
    was = f" (run.start_again={config.run.start_again} was for another start)"
    raise RunError(
        f"{directory.path} {lost}, and no checkpoint in {directory.checkpoints} is whole"
        + "".join(f"\n  {problem}" for problem in problems[:3])
        + "\nPut one back and give the same command again; or lose what was trained and begin at "
        f"step 0: run.start_again={starts}, which holds for the next start only"
        + was
        * (config.run.start_again is not None)
    )


def _not_again(directory: RunDirectory, config: Config, path: Path | None) -> list[str]:
    """A word for this very start that has no effect is not passed over in silence."""
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
    before, own = progress.world_size, samples_per_perturbation(config, ranks)
    if progress.samples_per_perturbation != own and not config.sharpness.allow_other_samples:
        raise RunError(
            f"{directory.path} perturbs with {progress.samples_per_perturbation} samples "
            f"({before} ranks), here it would be {own} ({ranks} ranks): in this scope that is "
            f"another algorithm. Go on with {before} ranks, begin another run, or say "
            "sharpness.allow_other_samples=true"
        )


def enter(
    directory: RunDirectory,
    config: Config,
    accelerator: Accelerator,
    train: Index | Stream,
    validation: Index,
    found: Path | None,
) -> tuple[State | None, list[str]]:
    """Claim the run directory, to go on from the checkpoint `found`; its state, and remarks.

    Rank 0 does, and keeps the state; other ranks get None. Raises RunError for a directory with a
    job in it, or of other data.
    """
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
        "train_order": inputs.promise(train),
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
    """What the order of a stream depends on besides the seed."""
    size = batch_sizes.micro_batch_size(config.data, world_size)
    return {"ranks": world_size, "workers": config.data.workers, "micro_batch_size": size}


def load(
    path: Path,
    step: SharpnessAwareStep,
    config: Config,
    accelerator: Accelerator,
    directory: RunDirectory,
    average: Average | None,
) -> list[str]:
    """Fill step and average from a checkpoint, cut anew where others wrote it; remarks on that.

    Called by all ranks. Raises FailedTogether for what cannot be cut anew.
    """
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
    return [f"the checkpoint, of {before}, was cut anew for {ranks} of {engine}"]


def _read(path: Path, number: int, step: SharpnessAwareStep) -> dict[str, Any]:
    """A part of a checkpoint. The objective goes on here, where all ranks share a refusal."""
    state = checkpoint.load_part(path, number)
    checkpoint.fill_objective(step, state.get("objective"), path)
    return state
