"""Learning-rate schedules: pure functions of (step, total steps), so that nothing of them needs to be stored.

Each factor is what sd-scripts' schedulers (transformers' `get_scheduler`) multiply the learning rate with before
update number `step` (from 0). BEHAVIOUR of the names: linear warmup over `warmup` steps, then the curve over the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi


@dataclass(frozen=True)
class Curve:
    """The numbers that shape a schedule. `warmup` is in steps; `end_lr` is absolute."""

    total: int
    warmup: int = 0
    cycles: int = 1
    power: float = 1.0
    end_lr: float = 1e-7

    def progress(self, step: int) -> float:
        """0 at the end of the warmup, 1 at the end of the run and after it."""
        return min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))


def _restarts(curve: Curve, step: int) -> float:
    progress = curve.progress(step)
    return 0.0 if progress >= 1.0 else 0.5 * (1.0 + cos(pi * ((curve.cycles * progress) % 1.0)))


@dataclass(frozen=True)
class ScheduleInfo:
    """A named schedule and its factor after the warmup."""

    name: str
    factor: Callable[[Curve, int], float]


def _polynomial(curve: Curve, step: int) -> float:
    return (1.0 - curve.progress(step)) ** curve.power


SCHEDULES = {
    info.name: info
    for info in (
        ScheduleInfo("constant", lambda curve, step: 1.0),
        ScheduleInfo("constant_with_warmup", lambda curve, step: 1.0),
        ScheduleInfo("linear", lambda curve, step: 1.0 - curve.progress(step)),
        ScheduleInfo("cosine", lambda curve, step: max(0.0, 0.5 * (1.0 + cos(pi * curve.progress(step))))),
        ScheduleInfo("cosine_with_restarts", _restarts),
        ScheduleInfo("polynomial", _polynomial),
    )
}


def learning_rate(name: str, base: float, curve: Curve, step: int) -> float:
    """The learning rate of update `step` (from 0) for a group whose base rate is `base`."""
    if step < curve.warmup:
        return base * step / max(1, curve.warmup)
    factor = SCHEDULES[name].factor(curve, step)
    if name == "polynomial":
        return (base - curve.end_lr) * factor + curve.end_lr
    return base * factor


def warmup_steps(value: int | float, total: int) -> int:
    """`--lr_warmup_steps`: an integer is steps, a float is a share of the total."""
    return int(value * total) if isinstance(value, float) else value
