"""Optimizers by the names that users know, built, tried and seen through one interface.

The records stand in options.optimizer_names. What a learning rate does over time: training.rate_control.
"""

import importlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from library.errors import UserError, nearest
from library.options.optimizer_names import (
    OptimizerInfo,
    known_names,
    optimizer_info,
    relative_step,
)
from library.options.optimizer_settings import parse_arguments

__all__ = ["BuiltOptimizer", "build_optimizer", "parse_arguments"]

_WAYS_TO_STEP = frozenset({"fused", "foreach", "capturable", "differentiable"})
_KEPT = (int, float, torch.Tensor)


class BuiltOptimizer:
    """An optimizer with what the rest of a run needs to know of it.

    Attributes:
        optimizer: the optimizer, ready to step.
        label: its name for metadata, `module.Class(k=v,...)` with the settings that it was given.
        info: its record.
        names: of its parameter groups, in order.
        finds_its_rate: its groups have no learning rates, because it finds them itself (Adafactor's relative step).
        settle: called when other weights are shown than those that train, for rules that these are held to.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        label: str,
        info: OptimizerInfo,
        names: Sequence[str],
        *,
        finds_its_rate: bool = False,
    ) -> None:
        self.optimizer, self.label, self.info = optimizer, label, info
        self.names, self.finds_its_rate = tuple(names), finds_its_rate
        self.settle: Callable[[], None] | None = None
        self._shows_other_weights = False
        if info.schedule_free:
            optimizer.train()

    def parameters(self) -> list[torch.Tensor]:
        """Every parameter of every group, in order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def freeze(self, parameters: Sequence[torch.Tensor]) -> None:
        """These are trained no more: from now on they are what this optimizer shows of them, in training, too."""
        if not self.info.schedule_free:
            return
        with self.evaluating():
            shown = [parameter.detach().clone() for parameter in parameters]
        for parameter, values in zip(parameters, shown, strict=True):
            parameter.copy_(values)
            if "z" in (state := self.optimizer.state.get(parameter, {})):
                state["z"].copy_(values)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it lasts, the parameters are those to look at and to save; afterwards they are bit for bit as before.

        Only schedule-free optimizers train other weights than those they show.
        """
        if not self.info.schedule_free or self._shows_other_weights:
            yield
            return
        parameters = self.parameters()
        kept = [parameter.detach().clone() for parameter in parameters]
        self.optimizer.eval()
        self._shows_other_weights = True
        try:
            if self.settle is not None:
                self.settle()
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():
                for parameter, values in zip(parameters, kept, strict=True):
                    parameter.copy_(values)
            self._shows_other_weights = False

    def step_sizes(self) -> dict[str, float] | None:
        """d times the learning rate by group name, for those that estimate d; None for all others.

        This may wait for the device.
        """
        groups = self.optimizer.param_groups
        if not all("d" in group for group in groups):
            return None
        sizes = (float(group["d"]) * float(group.get("effective_lr", group["lr"])) for group in groups)
        return dict(zip(self.names, sizes, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on besides parameters and gradients: also numbers and tensors that hang on the
        optimizer itself, which an optimizer's own state leaves out."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "attributes": {name: value for name, value in vars(self.optimizer).items() if _is_kept(value)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, with every tensor in the type that it was saved in."""
        saved = state["optimizer"]
        self.optimizer.load_state_dict(saved)
        numbered = {
            number: parameter
            for group, mine in zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
            for number, parameter in zip(group["params"], mine["params"], strict=True)
        }
        for number, values in saved["state"].items():
            if number in numbered and isinstance(values, dict):
                _restore_types(self.optimizer.state[numbered[number]], values)
        for name, value in state["attributes"].items():
            mine = vars(self.optimizer).get(name)
            moved = value.to(mine.device) if isinstance(mine, torch.Tensor) else value
            setattr(self.optimizer, name, moved)


def _is_kept(value: Any) -> bool:
    return isinstance(value, _KEPT) and not isinstance(value, bool)


def _restore_types(mine: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Undo torch's cast of every state tensor to the type of its parameter."""
    for key, value in saved.items():
        loaded = mine.get(key)
        if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
            mine[key] = value.detach().clone().to(loaded.device)


def build_optimizer(
    name: str,
    groups: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    *,
    device: torch.device | None = None,
    rate: float | None = None,
    names: Sequence[str] | None = None,
) -> BuiltOptimizer:
    """An optimizer over `groups`, which has made one step on a copy of some of them, so that what can't work shows now.

    Args:
        name: a registered name, a class of torch.optim or `package.module.Class`; empty for AdamW.
        groups: dicts of `params` and, mostly, `lr`.
        arguments: its settings, over the record's defaults.
        device: where it is going to step; that of the parameters where it isn't given.
        rate: the learning rate of groups that have none.
        names: of the groups, in order.

    Raises:
        UserError: an unknown optimizer, a package that isn't installed, a setting that it doesn't take, or an optimizer
            that can't step these parameters here.
    """
    info = optimizer_info(name)
    if info is None:
        advice = nearest(name, known_names()) or "--list_optimizers shows them"
        raise UserError.single("--optimizer_type", f"{name!r} is not known", advice)
    where = device or next(iter(groups[0]["params"])).device
    if info.needs and where.type != info.needs:
        raise UserError.single("--optimizer_type", f"{info.name} can't run on {where.type}: it needs {info.needs}")
    optimizer_class = _load(info)
    settings = {**info.defaults, **arguments}
    finds_its_rate = relative_step(info, settings)
    if info.relative_step:
        settings["relative_step"] = finds_its_rate
    _check_settings(optimizer_class, info, arguments)
    described = ",".join(f"{key}={value}" for key, value in settings.items())
    given = _groups(groups, rate, with_rates=not finds_its_rate)
    settings.update(info.fixed)
    if not finds_its_rate:
        settings.update(_default_rate(given, rate))
    settings = _tried(optimizer_class, info, given, settings, where)
    label = f"{optimizer_class.__module__}.{optimizer_class.__name__}" + (f"({described})" if described else "")
    return BuiltOptimizer(
        optimizer_class(given, **settings),
        label,
        info,
        names or [f"group{number}" for number in range(len(given))],
        finds_its_rate=finds_its_rate,
    )


def _load(info: OptimizerInfo) -> Callable[..., torch.optim.Optimizer]:
    """The class of a record.

    Raises:
        UserError: its package can't be imported, or has no such class.
    """
    install = f"pip install 'lorasmith[{info.extra}]'" if info.extra else "install the package that defines it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(info.module), info.cls)
    except ImportError as fault:
        raise UserError.single("--optimizer_type", f"{info.name} can't be imported: {fault}", install) from fault
    except AttributeError:
        raise UserError.single("--optimizer_type", f"{info.module} has no {info.cls}") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError.single("--optimizer_type", f"{info.module}.{info.cls} is no torch.optim.Optimizer")
    return found


def _check_settings(optimizer_class: Any, info: OptimizerInfo, arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(optimizer_class).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [key for key in parameters if key not in ("params", "lr")]
    for key in arguments:
        if key not in known:
            advice = nearest(key, known) or f"known are {', '.join(known)}"
            raise UserError.single("--optimizer_args", f"{info.name} takes no {key!r}", advice)


def _groups(groups: Sequence[Mapping[str, Any]], rate: float | None, *, with_rates: bool) -> list[dict[str, Any]]:
    """Copies of the groups; those that have no learning rate get `rate`, or all lose theirs."""
    copies = []
    for group in groups:
        copy = {**group, "params": list(group["params"])}
        if not with_rates:
            copy.pop("lr", None)
        elif copy.get("lr") is None:
            copy.pop("lr", None)
            copy.update({} if rate is None else {"lr": rate})
        copies.append(copy)
    return copies


def _default_rate(groups: Sequence[Mapping[str, Any]], rate: float | None) -> dict[str, float]:
    """The learning rate that the class is told of: only checked by it, because every group has its own."""
    rates = [rate or 0.0, *(float(group["lr"]) for group in groups if "lr" in group)]
    return {"lr": max(rates)} if max(rates) > 0 else {}


def _tried(
    optimizer_class: Callable[..., torch.optim.Optimizer],
    info: OptimizerInfo,
    groups: Sequence[Mapping[str, Any]],
    settings: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The settings, with the fused form where the class has one and it works here.

    Raises:
        UserError: the optimizer can't be made of them, or can't step.
    """
    parameters = inspect.signature(optimizer_class).parameters
    if "fused" in parameters and not _WAYS_TO_STEP & settings.keys():
        fused = {**settings, "fused": True}
        if _fault(optimizer_class, groups, fused, device) is None:
            return fused
    fault = _fault(optimizer_class, groups, settings, device)
    if fault is not None:
        flag = "--optimizer_args" if isinstance(fault, (TypeError, ValueError)) else "--optimizer_type"
        raise UserError.single(flag, f"{info.name} can't train this: {fault}") from fault
    return settings


def _fault(
    optimizer_class: Callable[..., torch.optim.Optimizer],
    groups: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    device: torch.device,
) -> Exception | None:
    """What goes wrong in one step over, of each group, the largest parameter of each number of axes.

    Any kind of error counts: the classes come from many packages.
    """
    copies = [{**group, "params": _largest(group["params"], device)} for group in groups]
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            optimizer = optimizer_class(copies, **settings)
            if hasattr(optimizer, "train"):
                optimizer.train()
            optimizer.step()
    except Exception as fault:
        return fault
    return None


def _largest(parameters: Sequence[torch.Tensor], device: torch.device) -> list[torch.nn.Parameter]:
    """Copies of them, with small gradients."""
    chosen = {parameter.ndim: parameter for parameter in sorted(parameters, key=torch.numel)}
    copies = []
    for parameter in chosen.values():
        copy = torch.nn.Parameter(parameter.detach().clone().to(device))
        copy.grad = torch.full_like(copy, 1e-3)
        copies.append(copy)
    return copies
