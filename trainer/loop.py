"""The training loop: the step in plain sight, and around it phases, validation, saving.

A step is a function of its number: which rows (plan.py), which caption, whether the prompt is dropped, which timestep and noise
(`lidit.diffusion.draw`), which learning rate and EMA decay. So a run that resumes at step n takes the same steps as one that
was never stopped: to the bit on as many ranks, to rounding on another number.

Shape notation: B samples of a microbatch, C H W of the latents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lidit.diffusion import loss_per_sample, objective_to_dict
from trainer.checkpoints.save import Checkpoints, Observe
from trainer.config import TrainConfig
from trainer.data.loader import Batches, BatchSlice
from trainer.data.tables import PhaseTable, Tables, describe
from trainer.engine.ema import EMA
from trainer.engine.engine import set_learning_rate
from trainer.engine.partitions import discard_gradients, squared_norm
from trainer.engine.ranks import Ranks
from trainer.engine.signals import Terminated, draining, terminated
from trainer.monitor.report import Meter, Report
from trainer.monitor.step_metrics import StepMetrics, Totals
from trainer.monitor.validation import Validation


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite; raised on all ranks together."""


@dataclass
class Progress:
    """Progress of a run. With the config, all that the next step depends on."""

    step: int = 0
    """Optimizer steps done, those that were skipped included."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite, so far."""
    skipped_in_row: int = 0
    """Consecutive skipped steps just before this one."""


@dataclass
class TrainState:
    """All that training steps change, and a checkpoint keeps."""

    engine: Any
    """DeepSpeed's: weights, masters, moments."""
    ema: EMA | None
    """Average of the weights, where the run keeps one."""
    progress: Progress
    """How far the run is."""


@dataclass
class Phase:
    """The current phase of the loop."""

    number: int
    end: int
    """The run's steps that are done when it ends."""
    grad_accum_steps: int
    """Microbatches of a step, on a rank."""
    table: PhaseTable
    batches: Batches
    meter: Meter
    validation: Validation | None


class Loop:
    """One rank's part of a run, from where it is to its end.

    Args:
        config: the run.
        ranks: who takes part.
        tables: of all phases.
        state: what the steps change.
        checkpoints: where it is saved.
        report: what is written down; rank 0 has it.
        asked_to_stop: whether this rank knows of a reason to end the run, saved, after this step; asked at every step.
        observe: told what begins.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        tables: Tables,
        state: TrainState,
        checkpoints: Checkpoints,
        report: Report | None,
        asked_to_stop: Callable[[], bool],
        observe: Observe,
    ):
        self.config, self.ranks, self.tables, self.model_config = (
            config,
            ranks,
            tables,
            tables.model_config(config.model),
        )
        self.engine, self.ema, self.progress = state.engine, state.ema, state.progress
        self.checkpoints, self.report, self.asked_to_stop, self.observe = checkpoints, report, asked_to_stop, observe
        self.last_step = min(config.total_steps, config.stop_after_steps or config.total_steps)
        self._saved_while_draining = False

    def run(self) -> bool:
        """Trains to the last step and saves. Returns False if the run was asked to stop before, or data are damaged.

        Raises:
            NotFinite: too many skipped steps in a row.
            SaveFailed: a checkpoint could not be written.
            Terminated: some rank got SIGTERM; the run is saved.
        """
        while self.progress.step < self.last_step:
            with self._phase() as phase:
                end = min(self.last_step, phase.end)
                while self.progress.step < end:
                    totals = self._train_step(phase)
                    if self._after_step(phase, totals):
                        return False
        return True

    # -- the step -----------------------------------------------------------------------------------------------------

    def _train_step(self, phase: Phase) -> Totals:
        """Takes one optimizer step, on `global_batch_size` samples over all ranks."""
        engine, objective, step = self.engine, phase.table.objective, self.progress.step
        metrics = StepMetrics(list(self.model_config.encoders), self.ranks.device)
        waited = phase.batches.wait_seconds

        # Forward and backward, microbatch by microbatch; gradients add up, and are averaged over ranks with the last one.
        for number in range(phase.grad_accum_steps):
            self.observe("data")
            batch = next(phase.batches)
            assert batch.timestep is not None and batch.noise is not None
            self.observe("forward")
            engine.set_gradient_accumulation_boundary(number == phase.grad_accum_steps - 1)
            noisy_latents = objective.add_noise(batch.latents, batch.noise, batch.timestep)  # B C H W
            prediction = engine(
                noisy_latents, batch.timestep, batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds
            )  # B C H W
            loss = loss_per_sample(objective, prediction, batch.latents, batch.noise, batch.timestep)  # B
            self.observe("backward")
            engine.backward(loss.mean() / phase.grad_accum_steps, scale_wrt_gas=False)
            metrics.add(batch, loss)

        # All-reduce loss and gradient norm first: ZeRO-3 does not detect NaN in bf16, so the loop skips such a step itself.
        self.observe("check")
        totals = metrics.all_reduce(
            self.ranks,
            squared_norm(engine),
            wait_seconds=phase.batches.wait_seconds - waited,
            stop=self.asked_to_stop(),
            terminated=terminated(),
            draining=draining(),
        )

        # Clip and step; or discard this step's gradients, on every rank.
        if totals.finite:
            self.observe("step")
            set_learning_rate(engine, self.config.optimizer.learning_rate_at(step, self.config.total_steps))
            engine.step()
            if self.ema is not None:
                self.ema.update(self.config.ema.decay_at(step))
            self.progress.skipped_in_row = 0
        else:
            discard_gradients(engine)
            self.progress.skipped_steps += 1
            self.progress.skipped_in_row += 1
        height, width = batch.latents.shape[2:]
        phase.meter.add(totals, (height, width), taken=totals.finite)
        self.progress.step += 1
        return totals

    # -- around it ----------------------------------------------------------------------------------------------------

    def _after_step(self, phase: Phase, totals: Totals) -> bool:
        """Logs, validates and saves when due. Returns whether the run stops here."""
        step, config = self.progress.step, self.config
        if not totals.finite:
            self._say_skipped(totals)
        last = step == self.last_step
        if step % config.metrics.every_steps == 0 or last or totals.stop:
            self._write_line(phase)
        if phase.validation is not None and (step % config.validation.every_steps == 0 or step == config.total_steps):
            self._validate(phase)
        drained = totals.draining and not self._saved_while_draining
        self._saved_while_draining = totals.draining
        if step % config.checkpoint.every_steps == 0 or last or totals.stop or totals.terminated or drained:
            self._save(phase)
        if totals.terminated and not last:
            raise Terminated(f"{totals.terminated} ranks got SIGTERM; the run is saved at step {step:,}")
        return totals.stop and not last

    @contextlib.contextmanager
    def _phase(self) -> Iterator[Phase]:
        """Opens the phase that the next step is in, its batches from that step on."""
        config, ranks, step = self.config, self.ranks, self.progress.step
        number, step_in_phase, images_seen = config.phase_at(step)
        phase, table = config.run_phases[number], self.tables.phase(number)
        microbatch_size, grad_accum_steps = phase.split(ranks.world_size)
        last_step = min(phase.steps, step_in_phase + self.last_step - step)
        instruction_tokens = {name: len(v.instruction_embeds) for name, v in table.features.encoders.items()}
        tflops = config.hardware.gpu_tflops if ranks.device.type == "cuda" else None
        meter = Meter(self.model_config, instruction_tokens, microbatch_size, ranks.world_size, tflops)
        validation = None
        if config.validation.every_steps:
            validation = Validation(table, config.validation, config.data, config.vae, microbatch_size, ranks)
        with Batches(
            table,
            config.data,
            config.seed,
            BatchSlice(microbatch_size, ranks.rank, ranks.world_size),
            range(step_in_phase, last_step),
            first_image=images_seen - step_in_phase * phase.global_batch_size,
            device=ranks.device,
        ) as batches:
            end = step + phase.steps - step_in_phase
            yield Phase(number, end, grad_accum_steps, table, batches, meter, validation)

    def _say_skipped(self, totals: Totals) -> None:
        why = f"the loss of {totals.bad_losses} samples" if totals.bad_losses else "the gradient"
        words = f"step {self.progress.step - 1:,}: {why} is not finite; no rank took the step"
        if self.report is not None:
            self.report.say(words)
        if self.progress.skipped_in_row >= self.config.optimizer.max_skipped_steps:
            raise NotFinite(
                f"{words}, the {self.progress.skipped_in_row}th in a row (optimizer.max_skipped_steps). The weights are those "
                f"before the first of them; the newest checkpoint is older. Lower the learning rate, or look at the data"
            )

    def _write_line(self, phase: Phase) -> None:
        if self.report is not None:
            step = self.progress.step
            learning_rate = self.config.optimizer.learning_rate_at(step - 1, self.config.total_steps)
            images_seen = self.config.phase_at(step)[2]
            values = {**phase.meter.line(), "learning_rate": learning_rate, "images_seen": images_seen}
            self.report.line(step, {**values, "phase": phase.number, "skipped_in_all": self.progress.skipped_steps})
        phase.meter.reset()

    def _validate(self, phase: Phase) -> None:
        assert phase.validation is not None
        self.observe("validate")
        values, picture = phase.validation(self.engine, self.ema)
        if self.report is not None:
            if values:
                self.report.validated(self.progress.step, values)
            if picture is not None:
                self.report.writer.write_image("samples", self.progress.step, picture)
        phase.meter.reset()

    def _save(self, phase: Phase) -> None:
        self.observe("save")
        if self.report is not None:
            self.report.writer.flush()  # before the save: a run resumed from this checkpoint has all lines up to it
        self.checkpoints.save(self.progress.step, self.engine, self.ema, self._state(phase))
        phase.meter.reset()

    def _state(self, phase: Phase) -> dict[str, Any]:
        """Returns the content of state.json: the run's state without its tensors."""
        return {
            **asdict(self.progress),
            "images_seen": self.config.phase_at(self.progress.step)[2],
            "world_size": self.ranks.world_size,
            "zero_stage": self.config.zero.stage,
            "config": self.config.to_dict(),
            "model": self.model_config.to_dict(),
            "objective": objective_to_dict(phase.table.objective),
            "table": describe(self.tables, phase.number, phase.table),
        }
