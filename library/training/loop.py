"""The one training loop: batch -> latents and conditioning -> noise -> prediction -> loss -> update.

Saves, previews and logging are due or not due after an update. Nothing about files, flags or families stands here.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from library.console import bar, say, warn
from library.data.loader import Batch
from library.errors import UserError
from library.global_draws import seed_global_generators
from library.training.denoising import Denoising
from library.training.interrupt import Interrupt
from library.training.objective import Coordinates, draw_timesteps
from library.training.schedules import Curve, learning_rate
from library.training.steps import Clock, PreviewPlan, Save, SavePlan, ValidationPlan
from library.training.tracking import LossAverage, Tracker


class Batches(Protocol):
    """What gives the batches of an epoch, counted from 1, from a global micro-batch on, until it is closed."""

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]: ...
    def close(self) -> None: ...


class NonFiniteLossError(Exception):
    """The loss or the gradient of an update is NaN or infinite; nothing was changed by it."""


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of a run. `loss_scale` is on for float16 only."""

    seed: int
    clock: Clock
    schedule: str
    curve: Curve
    max_grad_norm: float
    loss_scale: bool = False


@dataclass(frozen=True)
class Events:
    """What happens between updates: `save` writes (on the main process), `preview` draws; both get the updates done.
    `validate` gives the loss on held-out pictures; every process calls it."""

    saves: SavePlan
    save: Callable[[Save, int], Any]
    previews: PreviewPlan
    preview: Callable[[int], None] | None
    tracker: Tracker
    validations: ValidationPlan
    validate: Callable[[], float] | None


class Loop:
    """State of a run that lives from update to update; `run` goes on until the end or until told to stop."""

    def __init__(
        self,
        settings: LoopSettings,
        denoising: Denoising,
        optimizer: torch.optim.Optimizer,
        loader: Batches,
        events: Events,
        interrupt: Interrupt,
        average: LossAverage,
        updates_done: int = 0,
    ) -> None:
        self.settings, self.denoising, self.trainable = settings, denoising, denoising.trainable
        self.optimizer, self.loader, self.events = optimizer, loader, events
        self.processes, self.interrupt, self.average = denoising.processes, interrupt, average
        self.updates_done = updates_done
        self._parameters = self.trainable.parameters()
        self._base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=settings.loss_scale)

    def run(self) -> int:
        """Train to the end (returns 0), or save and return 130/143 when told to stop.

        Raises:
            NonFiniteLossError: with the pictures and timesteps of the update; the weights are those before it.
        """
        clock = self.settings.clock
        self.interrupt.defer()
        if self.updates_done == 0:
            self._preview()
            self._validate()
        with bar("steps", clock.total_updates, self.updates_done) as progress:
            while self.updates_done < clock.total_updates:
                epoch, index = clock.position(self.updates_done)
                self.trainable.before_epoch()
                group: list[Batch] = []
                for batch in self._batches(epoch, index):
                    group.append(batch)
                    if not clock.ends_update(batch.index):
                        continue
                    loss, stop = self._update(group)
                    group = []
                    progress.set_postfix(loss=f"{loss:.4f}", avr_loss=f"{self.average.average:.4f}", refresh=False)
                    progress.update()
                    if self._after_update(stop):
                        return stop
                    if self.updates_done >= clock.total_updates:
                        break
        return 0

    def _batches(self, epoch: int, index: int) -> Iterator[Batch]:
        """The loader's batches. Where it can't go on, weights and state are saved as after a stop."""
        try:
            yield from self.loader.epoch(epoch, index)
        except UserError:
            if self.updates_done and self.processes.is_main:
                self.events.save(self.events.saves.on_stop(self.updates_done), self.updates_done)
                say(f"the work up to step {self.updates_done} is saved; with other pictures, --network_weights goes on")
            raise

    def _update(self, group: Sequence[Batch]) -> tuple[float, int]:
        """One optimizer step over a group of micro-batches; returns its loss and the exit code of a stop, or 0."""
        loss = 0.0
        for batch in group:
            loss += self._micro_step(batch, len(group))
        gradients = [parameter.grad for parameter in self._parameters]
        told = self.interrupt.exit_code
        loss, by_key, by_signal = self.processes.sum_with_flags(
            gradients, self._parameters, [loss, float(told == 130), float(told == 143)]
        )
        if not np.isfinite(loss):
            raise self._not_finite("loss", loss, group)
        stop = 143 if by_signal else 130 if by_key else 0
        for parameter_group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            parameter_group["lr"] = learning_rate(self.settings.schedule, base, self.settings.curve, self.updates_done)
        self.scaler.unscale_(self.optimizer)
        self._clip(group)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates_done += 1
        self._log(loss)
        return loss, stop

    def _micro_step(self, batch: Batch, group_size: int) -> float:
        """Forward and backward of this process's samples; returns their part of the update's loss."""
        clock, seed = self.settings.clock, self.settings.seed
        seed_global_generators(seed, batch.epoch * clock.batches_per_epoch + batch.index)
        if not batch.positions:
            return 0.0
        at = Coordinates(seed, batch.epoch, batch.index, batch.positions)
        self.trainable.before_micro_step(at)
        losses = self.denoising.losses(batch, at)
        weighted = losses * batch.loss_weights.to(losses.device)
        loss = weighted.sum() / (batch.global_size * group_size)
        self.scaler.scale(loss).backward()
        return float(loss.detach())

    def _clip(self, group: Sequence[Batch]) -> None:
        """Clip the gradients; with a loss scaler, non-finite ones skip the update, otherwise they end the run."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not self.settings.loss_scale and not torch.isfinite(norm):
            raise self._not_finite("gradient", float(norm), group)
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.settings.max_grad_norm, norm)

    def _not_finite(self, what: str, value: float, group: Sequence[Batch]) -> NonFiniteLossError:
        lines = []
        for batch in group:
            at = Coordinates(self.settings.seed, batch.epoch, batch.index, batch.positions)
            timesteps = draw_timesteps(at, self.denoising.noise).tolist()
            lines += [f"{name} at timestep {t}" for name, t in zip(batch.names, timesteps, strict=True)]
        return NonFiniteLossError(
            f"the {what} of step {self.updates_done + 1} is {value}; its pictures: {', '.join(lines)}. "
            "The weights before this step were fine and files saved so far are kept; "
            "try a lower --learning_rate, or --mixed_precision bf16 or no"
        )

    def _log(self, loss: float) -> None:
        average = self.average.add(self.updates_done, loss)
        values = {"loss/current": loss, "loss/average": average}
        for name, group in zip(self.trainable.descriptions, self.optimizer.param_groups, strict=True):
            values[f"lr/{name}"] = float(group["lr"])
        self.events.tracker.log(values, self.updates_done)
        if self.settings.clock.ends_epoch(self.updates_done):
            epoch = -(-self.updates_done // self.settings.clock.updates_per_epoch)
            self.events.tracker.log({"loss/epoch_average": average}, epoch)

    def _after_update(self, stop: int) -> bool:
        """Saves and previews that are due; True if the run must stop now."""
        saves = list(self.events.saves.due(self.updates_done, self.settings.clock))
        finished = self.updates_done >= self.settings.clock.total_updates
        if stop and not finished and not any(save.kind == "step" and save.state for save in saves):
            saves = [save for save in saves if save.kind != "step"] + [self.events.saves.on_stop(self.updates_done)]
        if self.processes.is_main:
            for save in saves:
                self.events.save(save, self.updates_done)
        if not stop:
            self._preview()
            self._validate()
        self.processes.wait()
        return bool(stop) and not finished

    def _preview(self) -> None:
        """Previews, if due and if this process draws them. A failed one is no reason to lose a run."""
        draw = self.events.preview
        if draw is None or not self.events.previews.due(self.updates_done, self.settings.clock):
            return
        self.trainable.train(False)
        self.trainable.set_multiplier(1.0)
        try:
            with torch.no_grad():
                draw(self.updates_done)
        except (RuntimeError, ValueError, OSError) as fault:
            warn(f"previews at step {self.updates_done} failed, training goes on: {fault}")
        finally:
            self.trainable.train(True)

    def _validate(self) -> None:
        """The loss on held-out pictures, if due, logged beside the training's average."""
        clock, validate = self.settings.clock, self.events.validate
        due = self.events.validations.due(self.updates_done, clock)
        if validate is None or not due:
            return
        loss = validate()
        divergence = loss - self.average.average
        said = f" (training {self.average.average:.4f})" if self.updates_done else ""
        say(f"validation at step {self.updates_done}: loss {loss:.4f}{said}")
        for kind in due:
            values = {f"loss/validation/{kind}_average": loss, f"loss/validation/{kind}_divergence": divergence}
            if self.updates_done == 0:
                del values[f"loss/validation/{kind}_divergence"]
            at = self.updates_done if kind == "step" else -(-self.updates_done // clock.updates_per_epoch)
            self.events.tracker.log(values, at)
