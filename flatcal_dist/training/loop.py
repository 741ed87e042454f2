"""A run from start to end, in the order in which things happen.

claim the directory -> data -> network, engine, step -> resume -> steps -> weights -> report
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from flatcal_dist import batch_sizes, inputs
from flatcal_dist.averaging.average import Average
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints.format import Progress
from flatcal_dist.checkpoints.saving import Saver
from flatcal_dist.config import Config
from flatcal_dist.data import Index, Position, optimizer_steps, steps_per_epoch
from flatcal_dist.data.order import sample_seed
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.evaluation import reporting as evaluation
from flatcal_dist.ranks.distributed import FailedTogether, on_all_ranks
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.sharpness import SharpnessAwareStep, StepResult
from flatcal_dist.sharpness.engines.registry import ENGINES
from flatcal_dist.tracking.tracker import Tracker
from flatcal_dist.training import finishing, resuming
from flatcal_dist.training import stopping as preemption
from flatcal_dist.training.bad_samples import BadSamples
from flatcal_dist.training.build import build_step, samples_per_perturbation
from flatcal_dist.training.diagnosis import explain_divergence
from flatcal_dist.training.figures import Speed, measured_at, sharpness_figures
from flatcal_dist.training.objectives import refuse_unfit
from flatcal_dist.training.on_device import OnDevice, statistics_inputs
from flatcal_dist.training.optimizers import build_schedule
from flatcal_dist.training.stopping import StopRequest
from flatcal_dist.training.watchdog import Watchdog
from flatcal_dist.verification.traffic import counted

MAX_SKIPPED = 50  # steps in a row without a finite gradient: the run has diverged, and says so


def run(
    config: Config,
    directory: RunDirectory,
    accelerator: Accelerator,
    watchdog: Watchdog,
    started: float,
) -> str:
    """Train, or go on training; evaluate; report. Returns the run's phase at the end.

    started: when this process began, in seconds since 1970.
    """
    on_all_ranks(partial(directory.check, config))
    state = on_all_ranks(directory.state)
    if state is not None and state.phase == "finished":
        accelerator.print(
            f"{directory.path} is finished already{finishing.missing(config, directory)}"
        )
        return "finished"
    on_all_ranks(lambda: accelerator.is_main_process and inputs.prepare(config.data))
    inputs.download(config.data, accelerator, "train", "validation", alive=watchdog.beat)
    classes = config.model.num_classes
    train, validation = on_all_ranks(
        lambda: (
            inputs.open_training(config.data, classes),
            inputs.open_index(config.data, "validation", classes),
        )
    )
    on_all_ranks(partial(inputs.check_classes, config.data))
    inputs.agree_on_decoder(config.data)
    objective = on_all_ranks(config.objective.build)
    on_all_ranks(partial(refuse_unfit, objective, config, train, accelerator.num_processes))
    batch_sizes.check_room(config)
    step = build_step(config, accelerator)
    trainer = Trainer(config, directory, accelerator, train, validation, step)
    trainer.watchdog = watchdog
    trainer.deadline, remark = preemption.deadline(config.train, started)
    if remark:
        accelerator.print(remark)
    return trainer.run()


class Trainer:
    """The loop over optimizer steps, and what happens between them."""

    watchdog: Watchdog
    deadline: float | None

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        accelerator: Accelerator,
        train: Index | Stream,
        validation: Index,
        step: SharpnessAwareStep,
    ) -> None:
        self.config, self.directory, self.accelerator = config, directory, accelerator
        self.train, self.validation, self.step = train, validation, step
        self.engine = step.engine
        self.batch_size = config.data.global_batch_size
        self.epoch_steps = steps_per_epoch(len(train), self.batch_size)
        self.total_steps = config.train.max_steps or config.train.epochs * self.epoch_steps
        self.schedule = build_schedule(
            config, self.engine.optimizer, self.total_steps, self.epoch_steps
        )
        self.on_device = OnDevice(config, accelerator.device)
        step.loss.begin(len(train), accelerator.device)
        self.main = accelerator.is_main_process
        self.samples_per_perturbation = samples_per_perturbation(config, accelerator.num_processes)
        self.average: Average | None = None
        if (rule := config.average.build()) is not None:
            anew = rule.norm_statistics == "reestimate"
            batches = partial(statistics_inputs, config, train, accelerator, self.on_device)
            self.average = Average(step.engine, rule, batches if anew else None)
        self.skipped = self.skipped_in_a_row = 0  # steps without a finite gradient, all and last
        self.stopped_by: str | None = None
        self.saved = 0  # the step of the last checkpoint
        self.validated: tuple[int, dict[str, float]] = (0, {})  # at which step, what
        self.traffic: dict[str, int] = {}

    def run(self) -> str:
        """Enter the run directory, train to the end or until asked to stop, evaluate and report."""
        on_all_ranks(lambda: self.main and self.directory.claim())
        found, remarks = resuming.find(self.directory, self.config, self.accelerator)
        self.state, entry_remarks = on_all_ranks(
            lambda: resuming.enter(
                self.directory, self.config, self.accelerator, self.train, self.validation, found
            )
        )
        self.directory.entered = True
        self.done, self.seconds = 0, 0.0
        self.saver = Saver(
            self.directory.checkpoints,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.config.train.keep_checkpoints,
            self.config.train.keep_best,
        )
        if found is not None:
            remarks += resuming.load(
                found, self.step, self.config, self.accelerator, self.directory, self.average
            )
            progress = checkpoint.load_progress(found)
            self.done, self.seconds, self.saved = progress.step, progress.seconds, progress.step
            self.skipped = progress.skipped
        self.started = time.monotonic() - self.seconds
        self.tracker = Tracker(
            self.config, self.directory.path, self.total_steps, self.done, self.main
        )
        try:
            self._announce([*remarks, *entry_remarks])
            self.bad_samples = BadSamples(
                self.directory.bad_samples_file,
                self.train,
                self.epoch_steps,
                self.config.data.max_bad_samples,
                self.done,
                self.main,
                self.tracker.say,
            )
            phase = self._train() if self.done < self.total_steps else "finished"
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
            if isinstance(error, FailedTogether):  # all ranks are here: a save under way can end
                with suppress(FailedTogether):
                    self.saver.finish()
            self.tracker.close(exit_code=1)
            raise
        self.tracker.close()
        return phase

    def _train(self) -> str:
        """Optimizer steps from `done` on. Returns "finished", or "preempted" after a checkpoint."""
        config, device = self.config, self.accelerator.device
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        position = Position(*divmod(self.done, self.epoch_steps))
        same_class, pin_memory = self.step.loss.pairs == "same_class", device.type == "cuda"
        batches = inputs.training_batches(
            config, self.train, position, rank, world_size, pin_memory, same_class
        )
        every = config.train.log_every_steps
        self.speed = Speed()
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
                    [self.on_device(batch) for batch in micro_batches],
                    at=self.done,
                    rho=self.rho,
                    samples=self.batch_size,
                    stop=request.asked,
                    measure=measured_at(self.step.rule, self.done, every, self.total_steps),
                    votes=(len(replaced), *self.saver.votes),
                )
                self.done += 1
                # By the third step DDP has arranged its buckets for good.
                result = self._count_traffic(take) if self.done == first + 2 else take()
                anywhere_replaced, *saved = result.votes
                self.saver.agreed(saved)
                if anywhere_replaced:
                    self.bad_samples.add(replaced)
                self._after_step(result)
                self.watchdog.beat()
                if self.skipped_in_a_row == MAX_SKIPPED:
                    self._set_random_state(self.done - 1)
                    explain_divergence(
                        self.step, take, len(micro_batches), self.done, MAX_SKIPPED, self.saved
                    )
                if result.stop and self.done < self.total_steps:
                    self._stop(request)
                    return "preempted"
                self.speed.waits_for_data()
        self.saver.finish()
        return "finished"

    def _stop(self, request: StopRequest) -> None:
        """With a checkpoint, unless steps are being skipped: then the one before them is better."""
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

    def _set_random_state(self, step: int) -> None:
        """Dropout and the like follow from (seed, rank, step): nothing to save or restore."""
        rank = self.accelerator.process_index
        torch.manual_seed(sample_seed(self.config.run.seed, rank, step))

    def _count_traffic(self, take: Callable[[], StepResult]) -> StepResult:
        """Take a step, and count its collectives for the next record."""
        result, collectives, sent = counted(take)
        self.traffic = {
            "perf/collectives_per_step": collectives,
            "perf/collective_bytes_per_step": sent,
        }
        return result

    def _set_rates(self) -> None:
        """Learning rate and rho of this step, both functions of its number."""
        self.schedule.step_update(self.done)
        rate = self.engine.optimizer.param_groups[0]["lr"]
        self.rho = self.config.sharpness.rho_at(rate / self.config.optimizer.learning_rate)

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
        validated = every and (end or (whole_epoch and epoch % every == 0))
        if validated:
            self._validate(epoch)
        due = end or (whole_epoch and epoch % train.checkpoint_every_epochs == 0)
        due = due or (validated and train.keep_best is not None)
        if train.checkpoint_every_steps:
            due = due or self.done % train.checkpoint_every_steps == 0
        # While steps are skipped nothing new is worth keeping: the checkpoint before them is.
        if due and not self.skipped_in_a_row:
            self._checkpoint()
        self.speed.since += time.monotonic() - paused  # it is that of steps

    def _log(self, result: StepResult) -> None:
        """This step's own figures, which a resumed run repeats, and the speed since the last."""
        speed = self.speed.read(self.batch_size)
        values = {
            "epoch": self.done / self.epoch_steps,
            "train/loss": result.loss,
            "optim/learning_rate": self.engine.optimizer.param_groups[0]["lr"],
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
            values = evaluation.running_metrics(
                self.config, self.engine.inference, self.validation, self.accelerator
            )
        figures = {key: values[f"val/{key}"] for key in checkpoint.BEST}
        self.validated = self.done, {k: v for k, v in figures.items() if math.isfinite(v)}
        self.tracker.log(self.done, {"epoch": epoch, **values})
        self.tracker.say(
            f"epoch {epoch}: accuracy {values['val/accuracy']:.4f}  NLL {values['val/nll']:.4f}  "
            f"ECE {values['val/ece']:.4f}  signed gap {values['val/signed_gap']:+.4f}"
        )

    def _averaged(self) -> AbstractContextManager[None]:
        """Around what is evaluated or given away: with the average's weights, if there is one."""
        return self.average.applied() if self.average else nullcontext()

    def _checkpoint(self) -> None:
        """Of this step, once. Goes on while it is being written."""
        if self.saved == self.done:
            return
        self.saved = self.done
        self.engine.synchronize_buffers()
        if self.average:
            self.average.settle()
        self.tracker.sync()  # what a run that goes on from here does not write again
        progress = Progress(
            step=self.done,
            samples_per_perturbation=self.samples_per_perturbation,
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
        """The weights to use, and what they are worth."""
        self.engine.synchronize_buffers()
        with self._averaged():
            finishing.export_and_report(
                self.config,
                self.directory,
                self.engine,
                self.validation,
                self.accelerator,
                self.tracker,
                self.done,
                training_seconds=time.monotonic() - self.started,
            )

    def _announce(self, remarks: list[str]) -> None:
        say = self.tracker.say
        for remark in remarks:
            say(remark)
        at = f", going on after step {self.done}" if self.done else ""
        say(f"run directory: {self.directory.path}{at}")
        say(inputs.promise(self.train))
        ranks = self.accelerator.num_processes
        say(batch_sizes.batch_arithmetic(self.config, ranks, len(self.train)))

    def _record(self, phase: str) -> None:
        if self.main:
            if phase == "running" and self.directory.has_ended():
                return  # another rank has ended the run: its word stays
            self.state.phase, self.state.step = phase, self.done
            self.state.saved = max(checkpoint.found(self.directory.checkpoints), default=0)
            self.state.cause = self.stopped_by if phase == "preempted" else None
            self.state.epoch = self.done // self.epoch_steps
            self.state.seconds = round(time.monotonic() - self.started, 1)
            self.directory.write(self.state)
