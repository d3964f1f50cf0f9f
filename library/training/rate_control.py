"""What sets the learning rates of an optimizer's groups before each update, behind one protocol.

Named schedules are functions of the step and store nothing; Adafactor's relative step sets its own; a class of
`--lr_scheduler_type` goes step by step and has a state.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from library.errors import UserError, nearest
from library.training.optimizers import BuiltOptimizer
from library.training.schedules import SCHEDULES, Curve, ScheduleSettings, learning_rate

_FLAG = "--lr_scheduler_type"


class RateControl(Protocol):
    """The loop's view of a schedule."""

    def before_update(self, updates_done: int) -> None:
        """Set the rates of the update that follows, of which `updates_done` came before."""

    def after_update(self) -> None:
        """The optimizer has made its step, or was skipped by the loss scaler."""

    def rates(self) -> list[float]:
        """The rate of each group in the update just made; this may wait for the device."""

    def state_dict(self) -> dict[str, Any]:
        """What can't be computed from the step."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the optimizer's own state has been loaded before."""


class CurveRates:
    """A named schedule. A changed base rate counts from the next update on, also after a resume."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str, curve: Curve) -> None:
        self._optimizer, self._name, self._curve = optimizer, name, curve
        self._base_rates = [float(group["lr"]) for group in optimizer.param_groups]

    def before_update(self, updates_done: int) -> None:
        for group, base in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = learning_rate(self._name, base, self._curve, updates_done)

    def after_update(self) -> None:
        return

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return


class AdafactorRates:
    """Adafactor's relative step, which sets nothing and shows what the optimizer did: as in transformers'
    `AdafactorSchedule`, the rate of the first parameter of each group."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def before_update(self, updates_done: int) -> None:
        return

    def after_update(self) -> None:
        return

    def rates(self) -> list[float]:
        return [self._rate(group) for group in self._optimizer.param_groups]

    def _rate(self, group: dict[str, Any]) -> float:
        """The step's rate as the optimizer reckons it; 0 where no parameter has been stepped."""
        states = (self._optimizer.state.get(parameter) for parameter in group["params"])
        first = next((state for state in states if state), None)
        return 0.0 if first is None else float(self._optimizer._get_lr(group, first))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return


class ClassRates:
    """A scheduler class, stepped once after each update. Its state is stored, with the rates that it has set."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str, arguments: Mapping[str, Any]) -> None:
        """Make the scheduler.

        Raises:
            UserError: there is no such class, or it refuses its settings.
        """
        self._optimizer, self._name, self._updates = optimizer, name, 0
        self._base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        scheduler_class = _scheduler_class(name)
        _check_settings(scheduler_class, name, arguments)
        try:
            self._scheduler = scheduler_class(optimizer, **arguments)
        except Exception as fault:
            raise UserError.single("--lr_scheduler_args", f"{name} refuses them: {fault}") from fault
        self._rates = self._set_rates()

    def _set_rates(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def before_update(self, updates_done: int) -> None:
        self._rates, self._updates = self._set_rates(), updates_done + 1

    def after_update(self) -> None:
        """One step of the schedule.

        Raises:
            UserError: the class can't make it with its settings.
        """
        try:
            self._scheduler.step()
        except Exception as fault:
            wrong = f"{self._name} fails with them after step {self._updates}: {type(fault).__name__} {fault}"
            raise UserError.single("--lr_scheduler_args", wrong, "check them") from fault

    def rates(self) -> list[float]:
        return list(self._rates)

    def state_dict(self) -> dict[str, Any]:
        return {
            "scheduler": self._scheduler.state_dict(),
            "rates": self._set_rates(),
            "base_rates": list(self._base_rates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            UserError: the run was started with other learning rates, which are part of what such a class has stored.
        """
        if list(state["base_rates"]) != self._base_rates:
            wrong = f"the learning rates were {state['base_rates']}, now they are {self._base_rates}"
            raise UserError.single("--resume", wrong, f"with {_FLAG} they can't be changed")
        self._scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self._optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        self._rates = self._set_rates()


def _check_settings(scheduler_class: Any, name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse settings that a class doesn't take, and the lack of those that it needs."""
    parameters = list(inspect.signature(scheduler_class).parameters.values())[1:]
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    known = [one.name for one in named]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    for key in arguments:
        if key not in known and not takes_any:
            advice = nearest(key, known) or f"known are {', '.join(known)}"
            raise UserError.single("--lr_scheduler_args", f"{name} takes no {key!r}", advice)
    for one in named:
        if one.default is one.empty and one.name not in arguments:
            advice = f"add --lr_scheduler_args {one.name}=..."
            raise UserError.single("--lr_scheduler_args", f"{name} needs {one.name}", advice)


def _scheduler_class(name: str) -> Any:
    """The class of a name; one without dots is of torch.optim.lr_scheduler.

    Raises:
        UserError: there is none.
    """
    module, _, cls = name.rpartition(".")
    module = module or "torch.optim.lr_scheduler"
    try:
        found = getattr(importlib.import_module(module), cls)
    except ImportError as fault:
        raise UserError.single(_FLAG, f"{module} can't be imported: {fault}") from fault
    except AttributeError:
        raise UserError.single(_FLAG, f"{module} has no {cls}") from None
    if not callable(getattr(found, "step", None)):
        raise UserError.single(_FLAG, f"{name} is no scheduler: it has no step()")
    return found


def build_rates(built: BuiltOptimizer, schedule: ScheduleSettings) -> RateControl:
    """What sets the rates of `built`; made before a state is loaded into it.

    Raises:
        UserError: a scheduler class that can't be made, or `adafactor` for an optimizer that has a learning rate.
    """
    if built.finds_its_rate:
        return AdafactorRates(built.optimizer)
    if built.info.schedule_free:
        return CurveRates(built.optimizer, "constant", Curve(schedule.curve.total))
    if schedule.scheduler_type:
        return ClassRates(built.optimizer, schedule.scheduler_type, schedule.scheduler_args)
    if schedule.name not in SCHEDULES:
        wrong = f"{built.info.name} can't be used with {schedule.name}"
        raise UserError.single("--lr_scheduler", wrong, "use --optimizer_type Adafactor, or another schedule")
    return CurveRates(built.optimizer, schedule.name, schedule.curve)
