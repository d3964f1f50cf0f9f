"""Knowing when to stop: the best validation so far, how long ago it was, and at the end what the loss curves say.

Pure bookkeeping over numbers, with a state that JSON can hold: nothing is measured, saved or stopped here. What a curve
looks like is judged by library.training.curve_shape.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.training.curve_shape import Shape, judge, thinned, value_at

_MEMORY = 0.98
"""Share of the smoothed loss that is kept at each step: it looks back over about 50 of them."""
_STRETCHES = 512
"""The curve of the training loss is kept as at most so many means of equally long stretches."""
_BINS = 20
"""So many points of the training loss are judged; more would be too noisy."""
_FEWEST = 4
"""Curves of fewer points aren't judged."""
_NAMED = 3
"""So many files are named to try first."""


@dataclass(frozen=True)
class Verdict:
    """What follows from a validation: whether it is the best so far, and whether patience has run out."""

    best: bool
    stop: bool


class Watch:
    """Follows the losses of a run.

    Args:
        patience: so many validations in a row that are no better than the best one mean to stop; None is never.
        state: what `state` gave, to go on from there.
    """

    def __init__(self, patience: int | None, state: Mapping[str, Any] | None = None) -> None:
        self.patience = patience
        given = state or {}
        self._average: float = given.get("average", 0.0)
        self._count: int = given.get("count", 0)
        self._size: int = given.get("size", 1)
        self._stretches: list[tuple[int, float]] = [(step, loss) for step, loss in given.get("stretches", [])]
        self._partial: list[float] = list(given.get("partial", []))
        self._validations: list[tuple[int, float]] = [(step, loss) for step, loss in given.get("validations", [])]
        self._untrained: float | None = given.get("untrained")
        self._looked: int | None = given.get("looked")
        self._worse: int = given.get("worse", 0)
        self._broken: int | None = given.get("broken")

    def state(self) -> dict[str, Any]:
        """Everything, as JSON holds it; of bounded size but for the validations."""
        return {
            "average": self._average,
            "count": self._count,
            "size": self._size,
            "stretches": [[step, loss] for step, loss in self._stretches],
            "partial": list(self._partial),
            "validations": [[step, loss] for step, loss in self._validations],
            "untrained": self._untrained,
            "looked": self._looked,
            "worse": self._worse,
            "broken": self._broken,
        }

    @property
    def smoothed(self) -> float:
        """The exponential moving average of the training losses, corrected for its start (Kingma & Ba 2015); NaN
        before the first one."""
        return self._average / (1 - _MEMORY**self._count) if self._count else math.nan

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation after some training."""
        return min(self._validations, key=lambda one: one[1], default=None)

    @property
    def is_exhausted(self) -> bool:
        """Whether the last validations were no better for as long as patience lasts."""
        return self.patience is not None and self._worse >= self.patience

    def knows(self, step: int) -> bool:
        """Whether the validation of a step, or of a later one, was entered."""
        return self._looked is not None and step <= self._looked

    def trained(self, step: int, loss: float) -> None:
        """Enter the loss of update number `step`."""
        if not math.isfinite(loss):
            self._broken = step if self._broken is None else self._broken
            return
        self._average = _MEMORY * self._average + (1 - _MEMORY) * loss
        self._count += 1
        self._partial.append(loss)
        if len(self._partial) == self._size:
            self._stretches.append((step, math.fsum(self._partial) / self._size))
            self._partial = []
        if len(self._stretches) == _STRETCHES:
            pairs = zip(self._stretches[::2], self._stretches[1::2], strict=True)
            self._stretches = [(step, (first + second) / 2) for (_, first), (step, second) in pairs]
            self._size *= 2

    def validated(self, step: int, loss: float) -> Verdict:
        """Enter a loss on held-out pictures. That of step 0 is the model's own: it is only compared with.

        A step that was entered already, by the run that this one goes on from, changes nothing.
        """
        if self.knows(step):
            return Verdict(best=self.best == (step, loss), stop=self.is_exhausted)
        self._looked = step
        if step == 0:
            self._untrained = loss if math.isfinite(loss) else None
            return Verdict(best=False, stop=False)
        before = self.best
        better = math.isfinite(loss) and (before is None or loss < before[1])
        self._worse = 0 if better else self._worse + 1
        if math.isfinite(loss):
            self._validations.append((step, loss))
        elif self._broken is None:
            self._broken = step
        return Verdict(best=better, stop=self.is_exhausted)

    def advice(self, saves: Sequence[tuple[int, str]], *, only_vectors: bool = False) -> list[str]:
        """What the curves say, in lines for the end of a run.

        Args:
            saves: (step, name of a file that is there).
            only_vectors: all that was trained are vectors of new tokens.
        """
        lines = []
        if self._broken is not None:
            lines.append(f"the loss was no number at step {self._broken}: the run diverged; {_LOWER}")
        untrained = [] if self._untrained is None else [(0, self._untrained)]
        points = [*untrained, *self._validations]
        if len(points) >= _FEWEST and self._validations:
            shape = judge(points)
            lines += _on_validation(shape, self._untrained, min(self._validations, key=lambda one: one[1]))
            return lines + self._to_try(shape, saves)
        lines += self._on_few()
        curve = thinned(self._stretches, _BINS)
        if len(curve) >= 2 * _FEWEST:
            lines += _on_training(judge(curve), saves, only_vectors)
        return lines

    def _on_few(self) -> list[str]:
        """What can be said of validations that are too few for a curve."""
        if self.best is None:
            return []
        step, loss = self.best
        number = len(self._validations)
        counted = "1 validation is" if number == 1 else f"{number} validations are"
        return [f"{counted} too few for a curve; the lowest loss was {loss:.4f}, at step {step}"]

    def _to_try(self, shape: Shape, saves: Sequence[tuple[int, str]]) -> list[str]:
        """Saved files: the one with the lowest loss, the earliest that is about as good, then by their losses. The
        loss of one that was saved between validations is interpolated."""
        if not saves:
            return []
        named: dict[int, str] = {}
        for step, name in saves:
            named.setdefault(step, name)
        losses = {step: value_at(self._validations, step) for step in named}
        ranked = sorted(named, key=lambda step: (losses[step], step))
        as_good = [step for step in sorted(named) if losses[step] <= losses[ranked[0]] + shape.tolerance]
        order = list(dict.fromkeys([ranked[0], as_good[0], *ranked]))[:_NAMED]
        measured = dict(self._validations)
        files = ", ".join(
            f"{named[step]} (step {step}, {'' if step in measured else 'about '}{losses[step]:.4f})" for step in order
        )
        return [f"try first: {files}"]


_LOWER = "the learning rate is probably too high: try a half or a third of it"


def _on_validation(shape: Shape, untrained: float | None, best: tuple[int, float]) -> list[str]:
    """The curve of the validation loss in words; `best` is the step and the loss of its lowest point, as measured."""
    lines = [f"validation loss: from {shape.start:.4f} to its lowest, {best[1]:.4f}, at step {best[0]}"]
    if not shape.improved:
        base = " than that of the base model" if untrained is not None else " than at its first validation"
        lines = [f"validation loss: never noticeably lower{base}, {shape.start:.4f}"]
    if shape.jumps_at is not None:
        lines.append(_jumped(shape, "it"))
        if shape.rises_from is not None:
            lines.append(f"before that it had begun to rise at about step {shape.rises_from}")
        return lines
    if shape.rises_from is not None:
        if shape.improved and shape.flat_from is not None and shape.flat_from < shape.rises_from:
            lines.append(f"it went flat at about step {shape.flat_from}")
        lines.append(
            f"it began to rise at about step {shape.rises_from} and ended at {shape.end:.4f}: from there on the "
            "pictures are learned by heart; stop there, or lower the learning rate"
        )
    elif shape.flat_from is None:
        lines.append("it was still falling at the end: more steps may help")
    elif shape.improved:
        lines.append(
            f"it has been flat since about step {shape.flat_from}: more steps bring little, stop there next time"
        )
    else:
        lines.append("it changed too little to say where to stop: look at previews, or try a higher learning rate")
    return lines


def _on_training(shape: Shape, saves: Sequence[tuple[int, str]], only_vectors: bool) -> list[str]:
    """The curve of the training loss in words. It can't show that pictures are learned by heart, and where few numbers
    learn, what they gain is lost in the noise of single steps."""
    lines = []
    later = [f"{name} (step {step})" for step, name in sorted(saves) if step >= (shape.flat_from or 0)][:_NAMED]
    if shape.jumps_at is not None:
        lines.append(_jumped(shape, "the training loss"))
    elif shape.rises_from is not None:
        lines.append(
            f"the training loss seems to rise from about step {shape.rises_from} on, from {shape.best:.4f} to "
            f"{shape.end:.4f}: the learning rate may be too high"
        )
    elif shape.flat_from is None:
        lines.append(f"the training loss was still falling at the end, at {shape.end:.4f}")
    elif shape.improved:
        lines.append(
            f"the training loss seems to have been flat since about step {shape.flat_from}, at {shape.end:.4f}"
            + (f"; perhaps try these first: {', '.join(later)}" if later else "")
        )
    elif only_vectors:
        return [
            "the training loss of single steps says little about a few vectors: compare previews of several saves, or "
            "hold pictures out (--validation_split)"
        ]
    else:
        lines.append(f"the training loss shows no trend beyond its noise, at {shape.end:.4f}; look at previews")
    return [*lines, "only held-out pictures show where learning by heart begins: see --validation_split"]


def _jumped(shape: Shape, what: str) -> str:
    diverged = "it did not come back" if shape.ends_above_start else "it did not recover"
    return (
        f"{what} rose suddenly after step {shape.jumps_at}, from {shape.best:.4f} to {shape.end:.4f}, and {diverged}; "
        f"{_LOWER}, and use files from before that step"
    )
