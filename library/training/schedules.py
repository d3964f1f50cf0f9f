"""Learning-rate schedules: pure functions of (step, total steps), so that nothing of them needs to be stored.

Each factor is what sd-scripts' schedulers (transformers' `get_scheduler`, diffusers' for `piecewise_constant`) multiply
the learning rate with before update number `step` (from 0): linear warmup over `warmup` steps, then the curve over the
rest. Names and flags: options.optimizer_names. What applies them to an optimizer: training.rate_control.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, pi, sqrt
from typing import Any

from library.errors import UserError
from library.options.optimizer import Optimizer
from library.options.optimizer_settings import parse_arguments, step_rules


@dataclass(frozen=True)
class Curve:
    """The numbers that shape a schedule. `warmup` and `decay` are in steps; `end_lr` is absolute, `least` a share.

    `rules` are (step, factor up to that step) in order, then `last_factor` counts. `timescale` 0 is the warmup, or
    10000 without one.
    """

    total: int
    warmup: int = 0
    cycles: int = 1
    power: float = 1.0
    end_lr: float = 1e-7
    decay: int = 0
    timescale: int = 0
    least: float = 0.0
    rules: tuple[tuple[int, float], ...] = ()
    last_factor: float = 1.0

    def progress(self, step: int) -> float:
        """0 at the end of the warmup, 1 at the end of the run and after it."""
        return min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))


def _half_cosines(progress: float, cycles: int = 1) -> float:
    return 0.5 * (1.0 + cos(pi * cycles * progress))


def _restarts(curve: Curve, step: int) -> float:
    progress = curve.progress(step)
    return 0.0 if progress >= 1.0 else _half_cosines((curve.cycles * progress) % 1.0)


def _polynomial(curve: Curve, step: int) -> float:
    return (1.0 - curve.progress(step)) ** curve.power


def _inverse_sqrt(curve: Curve, step: int) -> float:
    scale = curve.timescale or curve.warmup or 10_000
    return 1.0 / sqrt((step + scale - curve.warmup) / scale)


def _above(least: float, factor: float) -> float:
    """`factor` from 0 to 1, drawn together so that it ends at `least`."""
    return max(0.0, factor * (1.0 - least) + least)


def _cosine_with_least(curve: Curve, step: int) -> float:
    return _above(curve.least, _half_cosines(curve.progress(step), curve.cycles))


def _stable_decay(curve: Curve, step: int) -> float:
    start = curve.total - curve.decay
    if step < start:
        return 1.0
    if step >= curve.total:
        return curve.least
    return _above(curve.least, _half_cosines((step - start) / max(1, curve.decay), curve.cycles))


def _piecewise(curve: Curve, step: int) -> float:
    return next((factor for until, factor in curve.rules if step < until), curve.last_factor)


@dataclass(frozen=True)
class ScheduleInfo:
    """A named schedule and its factor after the warmup; `raised` where the warmup starts at `least`, not at 0."""

    name: str
    factor: Callable[[Curve, int], float]
    raised: bool = False


SCHEDULES = {
    info.name: info
    for info in (
        ScheduleInfo("constant", lambda curve, step: 1.0),
        ScheduleInfo("constant_with_warmup", lambda curve, step: 1.0),
        ScheduleInfo("linear", lambda curve, step: 1.0 - curve.progress(step)),
        ScheduleInfo("cosine", lambda curve, step: max(0.0, _half_cosines(curve.progress(step)))),
        ScheduleInfo("cosine_with_restarts", _restarts),
        ScheduleInfo("polynomial", _polynomial),
        ScheduleInfo("inverse_sqrt", _inverse_sqrt),
        ScheduleInfo("cosine_with_min_lr", _cosine_with_least),
        ScheduleInfo("warmup_stable_decay", _stable_decay, raised=True),
        ScheduleInfo("piecewise_constant", _piecewise),
    )
}
"""The schedules that are functions of the step; `adafactor` and classes of `--lr_scheduler_type` aren't."""


def learning_rate(name: str, base: float, curve: Curve, step: int) -> float:
    """The learning rate of update `step` (from 0) for a group whose base rate is `base`; 0 stays 0."""
    schedule = SCHEDULES[name]
    if base == 0:
        return 0.0
    if step < curve.warmup:
        factor = step / max(1, curve.warmup)
        return base * (_above(curve.least, factor) if schedule.raised else factor)
    factor = schedule.factor(curve, step)
    if name == "polynomial":
        return (base - curve.end_lr) * factor + curve.end_lr
    return base * factor


def warmup_steps(value: int | float, total: int) -> int:
    """`--lr_warmup_steps` and `--lr_decay_steps`: an integer is steps, a float is a share of the total."""
    return int(value * total) if isinstance(value, float) else value


@dataclass(frozen=True)
class ScheduleSettings:
    """What the learning rate does over time: a named curve, or a class (`scheduler_type`) and its settings."""

    name: str
    curve: Curve
    scheduler_type: str = ""
    scheduler_args: dict[str, Any] = field(default_factory=dict)


def schedule_settings(options: Optimizer, total: int) -> ScheduleSettings:
    """The schedule that the flags ask for over `total` updates.

    Raises:
        UserError: warmup and decay are longer than the run.
    """
    arguments = parse_arguments(options.lr_scheduler_args or (), "--lr_scheduler_args")
    if options.lr_scheduler_type:
        return ScheduleSettings(options.lr_scheduler, Curve(total), options.lr_scheduler_type, arguments)
    warmup, decay = warmup_steps(options.lr_warmup_steps, total), warmup_steps(options.lr_decay_steps, total)
    if options.lr_scheduler == "warmup_stable_decay" and warmup + decay > total:
        wrong = f"{warmup} steps of warmup and {decay} of decay are more than all {total} steps"
        raise UserError.single("--lr_decay_steps", wrong, "make one of them shorter")
    rules, last = step_rules(str(arguments["step_rules"])) if "step_rules" in arguments else ((), 1.0)
    curve = Curve(
        total,
        warmup,
        options.lr_scheduler_num_cycles,
        options.lr_scheduler_power,
        float(arguments.get("lr_end", Curve.end_lr)),
        decay,
        options.lr_scheduler_timescale or 0,
        options.lr_scheduler_min_lr_ratio or 0.0,
        rules,
        last,
    )
    return ScheduleSettings(options.lr_scheduler, curve)
