"""When a run does what: steps, epochs, saves, previews and file names, as pure functions. Imports no torch."""

from dataclasses import dataclass
from math import ceil
from typing import Literal

SaveKind = Literal["epoch", "step", "end", "stop", "best", "asked"]


@dataclass(frozen=True)
class Clock:
    """How micro-batches, updates (optimizer steps) and epochs follow each other.

    Accumulation never crosses an epoch's end, so an epoch has ceil(batches / accumulation) updates and the last one of
    an epoch may hold fewer micro-batches.
    """

    batches_per_epoch: int
    accumulation: int
    total_updates: int

    @property
    def updates_per_epoch(self) -> int:
        return ceil(self.batches_per_epoch / self.accumulation)

    @property
    def epochs(self) -> int:
        return ceil(self.total_updates / self.updates_per_epoch)

    def position(self, updates_done: int) -> tuple[int, int]:
        """(epoch from 1, index of its next micro-batch from 0), after so many updates."""
        finished, update = divmod(updates_done, self.updates_per_epoch)
        return finished + 1, update * self.accumulation

    def group_size(self, index: int) -> int:
        """How many micro-batches the update holds that micro-batch `index` of an epoch belongs to."""
        start = index - index % self.accumulation
        return min(self.accumulation, self.batches_per_epoch - start)

    def ends_update(self, index: int) -> bool:
        return (index + 1) % self.accumulation == 0 or index + 1 == self.batches_per_epoch

    def ends_epoch(self, updates_done: int) -> bool:
        return updates_done % self.updates_per_epoch == 0 or updates_done >= self.total_updates


def make_clock(batches_per_epoch: int, accumulation: int, max_train_steps: int, max_train_epochs: int | None) -> Clock:
    """The clock of a run; `max_train_epochs` overrides `max_train_steps`."""
    total = max_train_steps
    if max_train_epochs is not None:
        total = max_train_epochs * ceil(batches_per_epoch / accumulation)
    return Clock(batches_per_epoch, accumulation, total)


@dataclass(frozen=True)
class Save:
    """One moment at which weights, and perhaps a state, are written; `stem` has no extension."""

    kind: SaveKind
    stem: str
    state: bool
    expired_weights: tuple[str, ...] = ()
    expired_states: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavePlan:
    """What is saved when, under which names (sd-scripts' names and rolling deletion)."""

    output_name: str | None
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    last_n_epochs: int | None = None
    last_n_steps: int | None = None
    last_n_epochs_state: int | None = None
    last_n_steps_state: int | None = None
    save_state: bool = False
    save_state_on_train_end: bool = False

    def _epoch_stem(self, epoch: int) -> str:
        return f"{self.output_name or 'epoch'}-{epoch:06d}"

    def step_stem(self, step: int) -> str:
        return f"{self.output_name or 'at'}-step{step:08d}"

    @property
    def end_stem(self) -> str:
        return self.output_name or "last"

    def _expired_epoch(self, epoch: int, keep: int | None) -> tuple[str, ...]:
        if not keep or self.every_n_epochs is None:
            return ()
        old = epoch - self.every_n_epochs * keep
        return (self._epoch_stem(old),) if old > 0 else ()

    def _expired_step(self, step: int, keep: int | None) -> tuple[str, ...]:
        if not keep or self.every_n_steps is None:
            return ()
        old = step - keep - 1
        old -= old % self.every_n_steps
        return (self.step_stem(old),) if old > 0 else ()

    def due(self, updates_done: int, clock: Clock) -> tuple[Save, ...]:
        """The saves that follow update number `updates_done` (from 1), in order."""
        saves = []
        if self.every_n_steps and updates_done % self.every_n_steps == 0:
            saves.append(
                Save(
                    "step",
                    self.step_stem(updates_done),
                    self.save_state,
                    self._expired_step(updates_done, self.last_n_steps),
                    self._expired_step(updates_done, self.last_n_steps_state or self.last_n_steps),
                )
            )
        if self.every_n_epochs and updates_done % clock.updates_per_epoch == 0:
            epoch = updates_done // clock.updates_per_epoch
            if epoch % self.every_n_epochs == 0 and updates_done < clock.total_updates:
                saves.append(
                    Save(
                        "epoch",
                        self._epoch_stem(epoch),
                        self.save_state,
                        self._expired_epoch(epoch, self.last_n_epochs),
                        self._expired_epoch(epoch, self.last_n_epochs_state or self.last_n_epochs),
                    )
                )
        if updates_done >= clock.total_updates:
            saves.append(self.at_end())
        return tuple(saves)

    def at_end(self) -> Save:
        """What is written when there is nothing left to do."""
        return Save("end", self.end_stem, self.save_state or self.save_state_on_train_end)

    def on_stop(self, updates_done: int) -> Save:
        """What a run that is told to stop writes: always with a state."""
        return Save("stop", self.step_stem(updates_done), True)

    def on_request(self, updates_done: int) -> Save:
        """What is written when somebody asks for it in the middle of a run."""
        return Save("asked", self.step_stem(updates_done), True)

    @property
    def best(self) -> Save:
        """The weights with the lowest loss on held-out pictures so far: one file that is replaced."""
        return Save("best", f"{self.output_name}-best" if self.output_name else "best", False)


def epochs_between_saves(save_every_n_epochs: int | None, save_n_epoch_ratio: int | None, epochs: int) -> int | None:
    """`--save_every_n_epochs`, or what `--save_n_epoch_ratio` makes of the number of epochs (at least 1)."""
    return max(1, epochs // save_n_epoch_ratio) if save_n_epoch_ratio else save_every_n_epochs


@dataclass(frozen=True)
class PreviewPlan:
    """When previews are drawn; epochs win over steps, as in sd-scripts."""

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    at_first: bool = False

    def due(self, updates_done: int, clock: Clock) -> bool:
        if updates_done == 0:
            return self.at_first
        if self.every_n_epochs:
            return (
                clock.ends_epoch(updates_done)
                and ceil(updates_done / clock.updates_per_epoch) % self.every_n_epochs == 0
            )
        return bool(self.every_n_steps) and updates_done % (self.every_n_steps or 1) == 0


VALIDATION_TIMESTEPS = 4
"""At how many timesteps a validation looks at each picture."""


@dataclass(frozen=True)
class ValidationPlan:
    """When held-out pictures are looked at: after each epoch or every few, and after steps if asked for."""

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    has_pictures: bool = False

    def due(self, updates_done: int, clock: Clock) -> tuple[Literal["step", "epoch"], ...]:
        """What is due after so many updates; before the first one and after the last one, both are."""
        if not self.has_pictures:
            return ()
        if updates_done in (0, clock.total_updates):
            return ("step", "epoch") if self.every_n_steps else ("epoch",)
        found: list[Literal["step", "epoch"]] = []
        if self.every_n_steps and updates_done % self.every_n_steps == 0:
            found.append("step")
        epoch, within = divmod(updates_done, clock.updates_per_epoch)
        if within == 0 and epoch % (self.every_n_epochs or 1) == 0:
            found.append("epoch")
        return tuple(found)
