"""A run from start to end, in the order in which things happen.

data -> network, engine, step -> enter the directory, resume -> steps -> weights -> report
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from flatcal_dist import inputs
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints.format import Progress
from flatcal_dist.config import Config
from flatcal_dist.data import Position, optimizer_steps
from flatcal_dist.data.order import sample_seed
from flatcal_dist.evaluation.running import held_validation, running_metrics
from flatcal_dist.ranks.distributed import FailedTogether, on_all_ranks
from flatcal_dist.runs.directory import Phase, RunDirectory
from flatcal_dist.sharpness import StepResult
from flatcal_dist.sharpness.engines.registry import ENGINES
from flatcal_dist.training import finishing, resuming
from flatcal_dist.training.build import samples_per_perturbation
from flatcal_dist.training.diagnosis import explain_divergence
from flatcal_dist.training.figures import Speed, measured_at, sharpness_figures
from flatcal_dist.training.optimizers import learning_rate
from flatcal_dist.training.resuming import Started
from flatcal_dist.training.setup import Setup, prepare
from flatcal_dist.training.stopping import StopRequest, deadline
from flatcal_dist.training.watchdog import Watchdog
from flatcal_dist.verification.traffic import counted

MAX_SKIPPED = 50  # steps in a row without a finite gradient: the run has diverged, and says so
MAX_SKIPPED_LAST = 8  # the same at the end of a run, which may be shorter


def run(
    config: Config,
    directory: RunDirectory,
    accelerator: Accelerator,
    watchdog: Watchdog,
    started: float,
) -> Phase:
    """Train, or continue training, evaluate and report. Returns the phase of the run at the end.

    Args:
        config: The configuration.
        directory: The run directory.
        accelerator: This rank among the others.
        watchdog: It is told of every step.
        started: When this process began, in seconds since 1970.

    Raises:
        FailedTogether: Some rank could not continue.
    """
    on_all_ranks(partial(directory.check, config))
    state = on_all_ranks(directory.state)
    if state is not None and state.phase == "finished":
        accelerator.print(
            f"{directory.path} is finished already{finishing.missing(config, directory)}"
        )
        return "finished"
    setup = prepare(config, directory, accelerator, watchdog)
    end, remark = deadline(config.train, started)
    if remark:
        accelerator.print(remark)
    return Trainer(setup, resuming.start(setup), watchdog, end).run()


class Trainer:
    """The loop over optimizer steps, and what happens between them.

    Args:
        setup: What the run is made of.
        started: Where this start of the run goes on.
        watchdog: It is told of every step.
        deadline: When to stop, in seconds since 1970; None for no such time.
    """

    def __init__(
        self, setup: Setup, started: Started, watchdog: Watchdog, deadline: float | None
    ) -> None:
        self.setup, self.watchdog, self.deadline = setup, watchdog, deadline
        self.config, self.directory, self.step = setup.config, setup.directory, setup.step
        self.accelerator, self.engine, self.main = setup.accelerator, setup.engine, setup.main
        self.average, self.batch_size = setup.average, setup.config.data.global_batch_size
        self.epoch_steps, self.total_steps = setup.epoch_steps, setup.total_steps
        self.state, self.saver = started.state, started.saver
        self.tracker, self.bad_samples = started.tracker, started.bad_samples
        self.done = self.saved = started.done  # steps; the step of the last checkpoint
        self.started = time.monotonic() - started.seconds
        self.skipped, self.skipped_in_a_row = started.skipped, 0  # steps without a finite gradient
        self.stopped_by: str | None = None
        self.validated: tuple[int, dict[str, float]] = (0, {})  # at which step, what
        self.traffic: dict[str, int] = {}
        self.rho = setup.config.sharpness.rho  # of the present step
        self.held = held_validation(setup.config, setup.validation, setup.accelerator)
        self.speed = Speed()
        self.rho = 0.0  # of the next step

    def run(self) -> Phase:
        """Train to the end or until asked to stop, then evaluate and report."""
        phase: Phase = "finished"
        try:
            if self.done < self.total_steps:
                phase = self._train()
            if phase == "finished":
                self.watchdog.rest()
                self._finish()
            self._record(phase)
        except KeyboardInterrupt as error:  # outside the steps: what is missing is done next time
            self.stopped_by = self.stopped_by or str(error)
            self._record("preempted")
            self.tracker.close(exit_code=1)
            raise
        except BaseException as error:
            if isinstance(error, FailedTogether):  # all ranks are here, so a save in flight can end
                with suppress(FailedTogether):
                    self.saver.finish()
            self.tracker.close(exit_code=1)
            raise
        self.tracker.close()
        if phase == "preempted":  # a rank that exits with 75 has the launcher end all others
            self.accelerator.wait_for_everyone()
        return phase

    def _train(self) -> Phase:
        """Take optimizer steps. Returns "finished", or "preempted" after a checkpoint."""
        config, device = self.config, self.accelerator.device
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        position = Position(*divmod(self.done, self.epoch_steps))
        same_class, pin_memory = self.step.loss.pairs == "same_class", device.type == "cuda"
        batches = inputs.training_batches(
            config, self.setup.train, position, rank, world_size, pin_memory, same_class, device
        )
        every = config.train.log_every_steps
        self.speed.begin()
        first = self.done + 1
        stop_file = self.directory.stop_file if self.main else None
        with StopRequest(stop_file, self.deadline) as request:
            for micro_batches in optimizer_steps(batches):
                self.speed.has_data()
                self._set_rates()
                self._set_random_state(self.done)
                replaced = [one for batch in micro_batches for one in batch.replaced]
                take = partial(
                    self.step,
                    [self.setup.on_device(batch) for batch in micro_batches],
                    at=self.done,
                    rho=self.rho,
                    samples=self.batch_size,
                    perturb=self._uses_rule(self.done),
                    progress=self.done / self.total_steps,
                    stop=request.asked,
                    measure=measured_at(self._perturbs, self.done, every, self.total_steps),
                    votes=(len(replaced), *self.saver.votes),
                )
                self.done += 1
                # By the third step DDP has arranged its buckets for good.
                result = self._count_traffic(take) if self.done == first + 2 else take()
                anywhere_replaced, written, failed = result.votes
                self.saver.agreed((written, failed))
                if anywhere_replaced:
                    self.bad_samples.add(replaced)
                self._after_step(result)
                self.watchdog.beat()
                if self._has_diverged():
                    self._set_random_state(self.done - 1)
                    explain_divergence(
                        self.step, take, len(micro_batches), self.done, self.skipped_in_a_row,
                        self.saved,
                    )  # fmt: skip
                if result.stop and self.done < self.total_steps:
                    self._stop(request)
                    return "preempted"
                self.speed.waits_for_data()
        self.saver.finish()
        return "finished"

    def _stop(self, request: StopRequest) -> None:
        """Write a checkpoint, unless steps are being skipped: the one before them is better."""
        if not self.skipped_in_a_row:
            self._checkpoint()
        self.saver.finish()
        reasons = gather_object([request.reason])
        self.stopped_by = next((reason for reason in reasons if reason), None)
        request.heeded()
        self.tracker.say(
            f"stopped by {self.stopped_by} after step {self.done}; the same command goes on from "
            "here"
        )

    def _has_diverged(self) -> bool:
        """Return whether so many steps were skipped that nothing is learned any more."""
        at_the_end = self.done == self.total_steps
        return self.skipped_in_a_row >= (MAX_SKIPPED_LAST if at_the_end else MAX_SKIPPED)

    def _set_random_state(self, step: int) -> None:
        """Seed dropout and the like by (seed, rank, step): there is nothing to save or restore."""
        seed = sample_seed(self.config.run.seed, self.accelerator.process_index, step)
        if self.accelerator.device.type == "cpu":
            # torch.manual_seed would note each time, with a traceback, how to seed GPUs later.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _count_traffic(self, take: Callable[[], StepResult]) -> StepResult:
        """Take a step, and count its collectives for the next record."""
        result, collectives, sent = counted(take)
        self.traffic = {
            "perf/collectives_per_step": collectives,
            "perf/collective_bytes_per_step": sent,
        }
        return result

    def _set_rates(self) -> None:
        """Set the learning rate and rho of this step, which follow from its number."""
        self.setup.schedule.step_update(self.done)
        rate = learning_rate(self.engine.optimizer)
        self.rho = self.config.sharpness.rho_at(rate / self.config.optimizer.learning_rate)

    def _uses_rule(self, step: int) -> bool:
        """Return whether the rule is used in the step of this number, counted from 0."""
        return self.config.sharpness.perturbs_in(step / self.epoch_steps)

    def _perturbs(self, step: int) -> bool:
        """Return whether the step of this number perturbs."""
        rule = self.step.rule
        return rule is not None and rule.perturbs_at(step) and self._uses_rule(step)

    def _after_step(self, result: StepResult) -> None:
        train = self.config.train
        self.skipped += result.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.average:
            self.average.update(self.done, result.skipped, self.epoch_steps, self.total_steps)
        self.speed.steps += 1
        if self.done % train.log_every_steps == 0 or self.done == self.total_steps:
            self._log(result)
        elif result.cosine is not None:  # the regular record's own step has no perturbation
            self.tracker.log(self.done, sharpness_figures(result, self.rho))
        epoch, left = divmod(self.done, self.epoch_steps)
        end = self.done == self.total_steps
        whole_epoch = left == 0
        if whole_epoch:
            self.step.end_epoch()
        paused = time.monotonic()
        every = train.validate_every_epochs
        validated = every is not None and (end or (whole_epoch and epoch % every == 0))
        if validated:
            self._validate(epoch)
        due = end or (whole_epoch and epoch % train.checkpoint_every_epochs == 0)
        due = due or (validated and train.keep_best is not None)
        if train.checkpoint_every_steps:
            due = due or self.done % train.checkpoint_every_steps == 0
        # While steps are skipped nothing new is worth keeping: the checkpoint before them is.
        if due and not self.skipped_in_a_row:
            self._checkpoint()
        self.speed.since += time.monotonic() - paused  # the speed is that of steps

    def _log(self, result: StepResult) -> None:
        """Log the figures of this step, which a resumed run repeats, and the speed of training."""
        speed = self.speed.read(self.batch_size)
        values: dict[str, float | None] = {
            "epoch": self.done / self.epoch_steps,
            "train/loss": result.loss,
            "optim/learning_rate": learning_rate(self.engine.optimizer),
            "optim/gradient_norm": result.gradient_norm,
            "optim/skipped_steps": self.skipped,
            "data/replaced": self.bad_samples.replaced,
            **speed,
            **self.traffic,
        }
        self.traffic = {}
        if self.config.train.precision == "fp16":
            values["optim/loss_scale"] = result.loss_scale
        self.tracker.log(self.done, values | sharpness_figures(result, self.rho))
        self._record("running")
        left = (self.total_steps - self.done) * speed["perf/step_seconds"]
        text = f"loss {result.loss:.4f}"
        self.tracker.show(self.done, text, speed["perf/images_per_second"], left)

    def _validate(self, epoch: int) -> None:
        self.engine.synchronize_buffers()
        with self._averaged():
            values = running_metrics(
                self.config, self.engine.inference, self.setup.validation, self.accelerator,
                self.held,
            )  # fmt: skip
        figures = {k: values[f"val/{k}"] for k in checkpoint.BEST if f"val/{k}" in values}
        self.validated = self.done, {k: v for k, v in figures.items() if math.isfinite(v)}
        self.tracker.log(self.done, {"epoch": epoch, **values})
        self.tracker.say(
            f"epoch {epoch}: accuracy {values['val/accuracy']:.4f}  NLL {values['val/nll']:.4f}  "
            f"ECE {values['val/ece']:.4f}  signed gap {values['val/signed_gap']:+.4f}"
        )

    def _averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the network has the weights of the average, if there is one."""
        return self.average.applied() if self.average else nullcontext()

    def _checkpoint(self) -> None:
        """Begin a checkpoint of this step, unless there is one. Training goes on meanwhile."""
        if self.saved == self.done:
            return
        self.saved = self.done
        self.engine.synchronize_buffers()
        if self.average:
            self.average.settle()
        self.tracker.sync()  # a run that goes on from here does not write these records again
        progress = Progress(
            step=self.done,
            samples_per_perturbation=samples_per_perturbation(
                self.config, self.accelerator.num_processes
            ),
            engine=self.config.train.engine,
            world_size=self.accelerator.num_processes,
            sharded=ENGINES[self.config.train.engine].sharded,
            seconds=time.monotonic() - self.started,
            skipped=self.skipped,
            validation=self.validated[1] if self.validated[0] == self.done else {},
            wandb_id=self.directory.wandb_id() if self.main else None,
        )
        self.saver.start(checkpoint.state_of(self.step, self.average), progress)
        self._record("running")

    def _finish(self) -> None:
        """Write the weights, evaluate them and report."""
        self.engine.synchronize_buffers()
        with self._averaged():
            finishing.export_and_report(
                self.config,
                self.directory,
                self.engine,
                self.setup.validation,
                self.accelerator,
                self.tracker,
                self.done,
                training_seconds=time.monotonic() - self.started,
            )

    def _record(self, phase: Phase) -> None:
        """Write the state of the run. Rank 0 does so, which alone has the state."""
        state = self.state
        if state is None:
            return
        if phase == "running" and self.directory.has_ended():
            return  # another rank has ended the run: its record stays
        state.phase, state.step = phase, self.done
        state.saved = max(checkpoint.found(self.directory.checkpoints), default=0)
        state.cause = self.stopped_by if phase == "preempted" else None
        state.epoch = self.done // self.epoch_steps
        state.seconds = round(time.monotonic() - self.started, 1)
        self.directory.write(state)
