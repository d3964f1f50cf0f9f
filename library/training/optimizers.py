"""Optimizers by the names that users know: a registry of frozen records, and the building of one."""

import ast
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from library.errors import UserError, nearest


@dataclass(frozen=True)
class OptimizerInfo:
    """A named optimizer: how to get its class, and the arguments that it gets unless the user says otherwise."""

    name: str
    load: Callable[[], type[torch.optim.Optimizer]]
    defaults: dict[str, Any] = field(default_factory=dict)


OPTIMIZERS = {info.name.lower(): info for info in (OptimizerInfo("AdamW", lambda: torch.optim.AdamW),)}


def parse_arguments(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """`key=value` texts with Python literals as values (a bare word is a text).

    Raises:
        UserError: a text without `=`.
    """
    arguments = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError.single(flag, f"{text!r} has no =", "write key=value")
        try:
            arguments[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key.strip()] = value
    return arguments


def build_optimizer(
    name: str, groups: list[dict[str, Any]], arguments: dict[str, Any]
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over `groups` (dicts of `params` and `lr`), and its name for metadata, `module.Class(k=v,...)`.

    Raises:
        UserError: an unknown optimizer, or an argument that it doesn't take.
    """
    info = OPTIMIZERS.get((name or "AdamW").lower())
    if info is None:
        raise UserError.single("--optimizer_type", f"{name!r} is not known", f"one of {', '.join(OPTIMIZERS)}")
    optimizer_class = info.load()
    known = [key for key in inspect.signature(optimizer_class).parameters if key not in ("params", "lr")]
    for key in arguments:
        if key not in known:
            raise UserError.single("--optimizer_args", f"{info.name} takes no {key!r}", nearest(key, known))
    settings = {**info.defaults, **arguments}
    if "fused" in known and not {"fused", "foreach", "capturable", "differentiable"} & settings.keys():
        settings["fused"] = True
    try:
        optimizer = optimizer_class(groups, **settings)
    except (TypeError, ValueError) as fault:
        raise UserError.single("--optimizer_args", f"{info.name} refuses them: {fault}") from fault
    texts = ",".join(f"{key}={value}" for key, value in arguments.items())
    label = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    return optimizer, f"{label}({texts})" if texts else label
