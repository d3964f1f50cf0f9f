"""The one training loop: batch -> latents and conditioning -> noise -> prediction -> loss -> update.

What happens between updates stands in library.training.events. Nothing about files, flags or families stands here.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from library.console import bar, say
from library.data.loader import Batch
from library.errors import UserError
from library.global_draws import seed_global_generators
from library.to_device import to_device
from library.training.coordinates import Coordinates
from library.training.denoising import Denoising
from library.training.events import Events
from library.training.interrupt import Interrupt
from library.training.noise import draw_timesteps
from library.training.optimizers import BuiltOptimizer
from library.training.rate_control import RateControl
from library.training.readings import Reading, Readings
from library.training.requests import Requests
from library.training.rounding import RoundedParameters
from library.training.steps import Clock
from library.training.text import FrozenText

_KEY, _SIGNAL = 130, 143
_WISHES = ("told/key", "told/signal", "told/save", "told/stop")


class Batches(Protocol):
    """What gives the batches of an epoch, counted from 1, from a global micro-batch on, until it is closed."""

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]: ...
    def close(self) -> None: ...


class NonFiniteLossError(Exception):
    """The loss or the gradient of an update is NaN or infinite; what was saved before is fine."""


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of a run.

    Attributes:
        max_grad_norm: gradients longer than this are shortened; 0 leaves them alone.
        loss_scale: on for float16 only.
        scale_weight_norms: what a module adds is shrunk to this norm after each update; None leaves it alone.
        text_encoder_steps, embedding_steps: after so many updates the text encoders' part and the vectors of new
            tokens are frozen; None never.
        text_memo_bytes: of the memo of captions, once text encoders are frozen.
        log_norms: log norms of gradients and weights per block.
    """

    seed: int
    clock: Clock
    max_grad_norm: float
    loss_scale: bool = False
    scale_weight_norms: float | None = None
    text_encoder_steps: int | None = None
    embedding_steps: int | None = None
    text_memo_bytes: int = 0
    log_norms: bool = False


@dataclass(frozen=True)
class Learner:
    """What turns gradients into changed weights: the optimizer, its rates, and 16-bit weights' masters if there are."""

    built: BuiltOptimizer
    rates: RateControl
    rounded: RoundedParameters | None = None

    def evaluating(self) -> AbstractContextManager[None]:
        """A context in which the weights are those to look at and to save; afterwards they are as before."""
        return self.rounded.evaluating(self.built) if self.rounded else self.built.evaluating()

    def freeze(self, parameters: Sequence[torch.Tensor]) -> None:
        """These are trained no more: what goes on being trained sees them as files hold them."""
        if self.rounded:
            self.rounded.freeze(self.built, parameters)
        else:
            self.built.freeze(parameters)


@dataclass(frozen=True)
class _Made:
    """What an update was made of: its batches and rates, by the names of the log."""

    group: tuple[Batch, ...]
    rates: dict[str, float]


def _unseen(**_: object) -> None:
    """Shows nothing of a reading."""


class Loop:
    """State of a run that lives from update to update; `run` goes on until the end or until told to stop.

    Attributes:
        stopped, stopped_early: why `run` returned before the last step: told to, or nothing was to be gained.
        is_saved: what was done is in files, although the loader can't go on.
        is_whole: weights and optimizer are those after `updates_done` updates, not in the middle of one.
    """

    def __init__(
        self,
        settings: LoopSettings,
        denoising: Denoising,
        learner: Learner,
        loader: Batches,
        events: Events,
        interrupt: Interrupt,
        requests: Requests | None = None,
        updates_done: int = 0,
    ) -> None:
        self.settings, self.denoising, self.trainable = settings, denoising, denoising.trainable
        self.learner, self.loader, self.events = learner, loader, events
        self.processes, self.interrupt, self.requests = denoising.processes, interrupt, requests
        self.updates_done = updates_done
        self.stopped = self.stopped_early = False
        self.is_whole, self.is_saved = True, False
        self._exit_code = 0
        self._save_wanted = False
        self._parameters = learner.rounded.masters if learner.rounded else self.trainable.parameters()
        self._readings = Readings(self.processes.device)
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=settings.loss_scale)

    def run(self) -> int:
        """Train to the end or until an early stop (returns 0), or save and return 130/143 when told to stop.

        Raises:
            NonFiniteLossError: with the pictures and timesteps of the update; nothing is saved after it.
        """
        clock = self.settings.clock
        self.interrupt.defer()
        self._freeze(self.updates_done - 1)
        if self.updates_done == 0:
            self.events.draw(0)
        if not self.events.has_looked(self.updates_done) and self.events.look(self.updates_done):
            self._stop_early()
            self.events.save_all([self.events.saves.at_end()], self.updates_done)
        with bar("steps", clock.total_updates, self.updates_done) as progress:
            while self.updates_done < clock.total_updates and not self.stopped:
                epoch, index = clock.position(self.updates_done)
                self.trainable.before_epoch()
                group: list[Batch] = []
                for batch in self._batches(epoch, index):
                    group.append(batch)
                    if not clock.ends_update(batch.index):
                        continue
                    self._update(group)
                    group = []
                    for reading in self._readings.ready():
                        self._read(reading, progress.set_postfix)
                    progress.update()
                    self._after_update(progress.set_postfix)
                    if self.stopped or self.updates_done >= clock.total_updates:
                        break
        return self._exit_code

    def _batches(self, epoch: int, index: int) -> Iterator[Batch]:
        """The loader's batches. Where it can't go on, weights and state are saved as after a stop."""
        try:
            yield from self.loader.epoch(epoch, index)
        except UserError:
            self.catch_up()
            if self.updates_done and self.processes.is_main:
                self.events.save_all([self.events.saves.on_stop(self.updates_done)], self.updates_done)
                self.is_saved = True
                say(
                    f"the work up to step {self.updates_done} is saved; with other pictures, start from its files "
                    "(--network_weights, --weights)"
                )
            raise

    def catch_up(self) -> None:
        """Look at all numbers so far, before something is saved.

        Raises:
            NonFiniteLossError: an update was broken.
        """
        for reading in self._readings.all():
            self._read(reading, _unseen)

    def _update(self, group: Sequence[Batch]) -> None:
        """One optimizer step over a group of micro-batches. What it shows is put into the readings."""
        settings, learner = self.settings, self.learner
        self._freeze(self.updates_done)
        loss = torch.zeros((), device=self.processes.device)
        for batch in group:
            loss = loss + self._micro_step(batch, len(group))
            if learner.rounded:
                learner.rounded.accumulate()
        if learner.rounded:
            learner.rounded.before_step()
        has_samples = any(batch.positions for batch in group)
        summed = self.processes.sum_gradients(self._parameters, [loss, *self._wishes()], has_samples)
        values: dict[str, torch.Tensor | float] = dict(zip(("loss", *_WISHES), summed, strict=True))
        if not self._readings.are_late and not np.isfinite(float(summed[0])):
            raise self._not_finite("loss", float(summed[0]), group, self.updates_done + 1)
        learner.rates.before_update(self.updates_done)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if gradients:
            self.scaler.unscale_(learner.built.optimizer)
        values["norm/grad_norm"] = self._clip(gradients, group)
        if settings.log_norms:
            with learner.rounded.showing_gradients() if learner.rounded else nullcontext():
                values |= self.trainable.block_norms("gradient")
        self.is_whole = False
        if gradients:
            self.scaler.step(learner.built.optimizer)
            self.scaler.update()
        learner.built.optimizer.zero_grad(set_to_none=True)
        if learner.rounded:
            learner.rounded.after_step(self.updates_done)
        learner.rates.after_update()
        self.trainable.after_update()
        if settings.scale_weight_norms is not None:
            values |= self.trainable.limit_norms(settings.scale_weight_norms, self.processes.device)
        if settings.log_norms:
            values |= self.trainable.block_norms("weight")
        self.updates_done += 1
        self.is_whole = True
        self._readings.put(self.updates_done, values, _Made(tuple(group), self._rates()))

    def _freeze(self, updates: int) -> None:
        """What is trained for so many updates at most stays as it is from now on."""
        settings, trainable = self.settings, self.trainable
        trained = trainable.trains_text_encoder
        parts = (
            (settings.text_encoder_steps, trainable.freeze_text_encoders, "the text encoders are"),
            (settings.embedding_steps, trainable.freeze_embeddings, "the new tokens' vectors are"),
        )
        for steps, freeze, what in parts:
            if steps is None or updates < steps:
                continue
            before = trainable.trains_text_encoder, trainable.frozen_groups
            freeze()
            if before == (trainable.trains_text_encoder, trainable.frozen_groups):
                continue
            groups = zip(trainable.descriptions, trainable.groups, strict=True)
            frozen = [group["params"] for name, group in groups if name in trainable.frozen_groups - before[1]]
            self.learner.freeze([parameter for some in frozen for parameter in some])
            say(f"{what} trained no more, after step {steps}")
        if trained and not trainable.trains_text_encoder:
            memo, device = settings.text_memo_bytes, self.processes.device
            self.denoising.encode = FrozenText(self.denoising.encode, trainable, memo, device)

    def _micro_step(self, batch: Batch, group_size: int) -> torch.Tensor:
        """Forward and backward of this process's samples; returns their part of the update's loss, 0-d."""
        clock, seed = self.settings.clock, self.settings.seed
        seed_global_generators(seed, batch.epoch * clock.batches_per_epoch + batch.index)
        if not batch.positions:
            return self.scaler.scale(torch.zeros((), device=self.processes.device)) * 0.0
        at = Coordinates(seed, batch.epoch, batch.index, batch.positions)
        self.trainable.before_micro_step(at)
        losses = self.denoising.losses(batch, at)
        weighted = losses * to_device(batch.loss_weights, losses.device)
        loss = weighted.sum() / (batch.global_size * group_size)
        scaled = self.scaler.scale(loss)
        if scaled.requires_grad:
            scaled.backward()
        return loss.detach()

    def _wishes(self) -> list[float]:
        """What this process was told since the last update, in the order of `_WISHES`."""
        told = self.interrupt.exit_code
        asked = self.requests.poll() if self.requests and self.processes.is_main else None
        return [float(told == _KEY), float(told == _SIGNAL), float(asked == "save"), float(asked == "stop")]

    def _clip(self, gradients: Sequence[torch.Tensor], group: Sequence[Batch]) -> torch.Tensor:
        """Clip the gradients; returns their norm, 0-d. With a loss scaler, non-finite ones skip the update."""
        if not gradients:
            return torch.zeros((), device=self.processes.device)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not self.settings.loss_scale and not self._readings.are_late and not bool(torch.isfinite(norm)):
            raise self._not_finite("gradient", float(norm), group, self.updates_done + 1)
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.settings.max_grad_norm, norm)
        return norm

    def _rates(self) -> dict[str, float]:
        """The learning rates of the update just made, as they are logged."""
        names = self.trainable.descriptions
        frozen = self.trainable.frozen_groups
        rates = {f"lr/{name}": rate for name, rate in zip(names, self.learner.rates.rates(), strict=True)}
        steps = self.learner.built.step_sizes() or {}
        found = rates | {f"lr/d*lr/{name}": step for name, step in steps.items()}
        return {key: 0.0 if key.rpartition("/")[2] in frozen else value for key, value in found.items()}

    def _read(self, reading: Reading, show: Callable[..., None]) -> None:
        """Look at the numbers of an update: whether they are numbers, what was wished, and what is logged."""
        values, made = dict(reading.values), reading.about
        loss = values.pop("loss")
        by_key, by_signal, save, stop = (values.pop(name) for name in _WISHES)
        if not np.isfinite(loss):
            raise self._not_finite("loss", loss, made.group, reading.update)
        norm = values["norm/grad_norm"]
        if not self.settings.loss_scale and not np.isfinite(norm):
            raise self._not_finite("gradient", norm, made.group, reading.update)
        if by_key or by_signal or stop:
            self.stopped = True
            self._exit_code = _SIGNAL if by_signal else _KEY if by_key else 0
        self._save_wanted = self._save_wanted or bool(save)
        self.events.log(reading.update, loss, made.rates, values)
        show(loss=f"{loss:.4f}", avr_loss=f"{self.events.average.average:.4f}", refresh=False)

    def _not_finite(self, what: str, value: float, group: Sequence[Batch], update: int) -> NonFiniteLossError:
        lines = []
        for batch in group:
            at = Coordinates(self.settings.seed, batch.epoch, batch.index, batch.positions)
            timesteps = draw_timesteps(at, self.denoising.noise).tolist()
            lines += [f"{name} at timestep {t}" for name, t in zip(batch.names, timesteps, strict=True)]
        return NonFiniteLossError(
            f"the {what} of step {update} is {value}; its pictures: {', '.join(lines)}. "
            "The weights before this step were fine and files saved so far are kept; "
            "try a lower --learning_rate, or --mixed_precision bf16 or no"
        )

    def _after_update(self, show: Callable[..., None]) -> None:
        """Saves, previews and validations that are due. Before them, every number so far is looked at."""
        done, events = self.updates_done, self.events
        if not (events.are_due(done) or self.stopped or self._save_wanted):
            return
        for reading in self._readings.all():
            self._read(reading, show)
        finished = done >= self.settings.clock.total_updates
        told = self.stopped and not finished
        if not told and events.look(done) and not finished:
            self._stop_early()
        saves = list(events.saves.due(done, self.settings.clock))
        if self.stopped_early:
            saves.append(events.saves.at_end())
        asked = (told or self._save_wanted) and not finished and not self.stopped_early
        if asked and not any(save.kind == "step" and save.state for save in saves):
            wanted = events.saves.on_stop(done) if told else events.saves.on_request(done)
            due = [
                replace(save, state=True, expired_states=save.expired_states if save.state else ())
                for save in saves
                if save.kind == "step"
            ]
            saves = [save for save in saves if save.kind != "step"] + (due or [wanted])
        self._save_wanted = False
        events.save_all(saves, done)
        if finished:
            self.stopped, self._exit_code = False, 0
        if not told:
            events.draw(done)
        self.processes.wait()

    def _stop_early(self) -> None:
        """The loss on held-out pictures has long stopped falling: the end, as if all steps were done."""
        say(
            f"stopping early at step {self.updates_done} of {self.settings.clock.total_updates}: no better for too long"
        )
        self.stopped = self.stopped_early = True
