"""What happens between updates: numbers are logged, files saved, previews drawn, held-out pictures looked at.

Whatever is disturbed by it (train or eval, the weights of schedule-free optimizers) is put back bit for bit. When
something is due is told by library.training.steps; how it is done, by the callables that a run puts in.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from library.console import say, warn
from library.training.steps import Clock, PreviewPlan, Save, SavePlan, ValidationPlan
from library.training.tracking import LossAverage, Tracker
from library.training.trainable import Trainable
from library.training.validation import ValidationResult
from library.training.watch import Watch


@dataclass
class Events:
    """The plans of a run, and what carries them out.

    Attributes:
        save: writes (called on the main process only), with the updates done.
        preview: draws (None on other processes, or without prompts).
        validate: the loss on held-out pictures; every process calls it.
        news: a line to say after an update, if there is one; None for never.
        saved: (updates done, stem) of each file so far.
        first: updates that count as done where the run began (`--initial_step`): nothing was trained before.
        evaluating: a context in which the weights are those that a file would hold.
    """

    clock: Clock
    trainable: Trainable
    is_main: bool
    saves: SavePlan
    save: Callable[[Save, int], Any]
    previews: PreviewPlan
    preview: Callable[[int], None] | None
    validations: ValidationPlan
    validate: Callable[[], ValidationResult] | None
    tracker: Tracker
    average: LossAverage
    watch: Watch
    evaluating: Callable[[], AbstractContextManager[None]]
    saved: list[tuple[int, str]] = field(default_factory=list)
    news: Callable[[], str | None] | None = None
    first: int = 0

    def are_due(self, updates_done: int) -> bool:
        """Whether anything but logging follows this update."""
        return bool(
            self.saves.due(updates_done, self.clock)
            or self.previews.due(updates_done, self.clock)
            or self.validations.due(updates_done, self.clock)
        )

    def log(self, update: int, loss: float, rates: Mapping[str, float], more: Mapping[str, float]) -> None:
        """The numbers of one update, and at an epoch's end its average."""
        if self.news and (line := self.news()):
            say(line)
        average = self.average.add(update, loss)
        self.watch.trained(update, loss)
        smoothed = {"loss/smoothed": self.watch.smoothed}
        self.tracker.log({"loss/current": loss, "loss/average": average, **smoothed, **rates, **more}, update)
        if self.clock.ends_epoch(update):
            epoch = -(-update // self.clock.updates_per_epoch)
            self.tracker.log({"loss/epoch_average": average}, epoch)

    def save_all(self, saves: Sequence[Save], updates_done: int) -> None:
        """Write what is due, on the main process."""
        for save in saves if self.is_main else ():
            self.saved[:] = [one for one in self.saved if one[1] != save.stem] + [(updates_done, save.stem)]
            self.save(save, updates_done)

    def draw(self, updates_done: int) -> None:
        """Previews, if due and if this process draws them. A failed one is no reason to lose a run."""
        if self.preview is None or not self.previews.due(updates_done, self.clock):
            return
        self.trainable.train(False)
        self.trainable.set_multiplier(1.0)
        try:
            with torch.no_grad(), self.evaluating():
                self.preview(updates_done)
        except (RuntimeError, ValueError, OSError) as fault:
            warn(f"previews at step {updates_done} failed, training goes on: {fault}")
        finally:
            self.trainable.train(True)

    def has_looked(self, updates_done: int) -> bool:
        """Whether nothing is to be looked at where a run starts or goes on: not due, or done before it stopped."""
        due = self.validate is not None and self.validations.due(updates_done, self.clock)
        return not due or self.watch.knows(updates_done if updates_done > self.first else 0)

    def look(self, updates_done: int) -> bool:
        """The loss on held-out pictures, if due: logged, told, the best weights kept. True if it is time to stop."""
        due = self.validations.due(updates_done, self.clock)
        if self.validate is None or not due:
            return False
        with self.evaluating():
            result = self.validate()
        is_trained = updates_done > self.first
        verdict = self.watch.validated(updates_done if is_trained else 0, result.loss)
        said = f" (training {self.average.average:.4f})" if is_trained else ""
        best = ", the best so far" if verdict.best else ""
        say(f"validation at step {updates_done}: loss {result.loss:.4f}{said}{best}")
        for kind in due:
            values = {f"loss/validation/{kind}_average": result.loss}
            values |= {f"loss/validation/{kind}_subset/{name}": loss for name, loss in result.by_subset.items()}
            values |= {f"loss/validation/{kind}_band/{name}": loss for name, loss in result.by_band.items()}
            if is_trained:
                values[f"loss/validation/{kind}_divergence"] = result.loss - self.average.average
            at = updates_done if kind == "step" else -(-updates_done // self.clock.updates_per_epoch)
            self.tracker.log(values, at)
        if verdict.best:
            self.save_all([self.saves.best], updates_done)
        return verdict.stop
