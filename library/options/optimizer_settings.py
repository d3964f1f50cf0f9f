"""Settings of optimizers and schedules as a command line gives them: `key=value` texts with Python literals."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.options import values
from library.options.flags import Flag

Limits = tuple[tuple[str, float], ...]
FROM_0: Limits = (("ge", 0.0),)
ABOVE_0: Limits = (("gt", 0.0),)
SHARE: Limits = (("ge", 0.0), ("lt", 1.0))


@dataclass(frozen=True)
class Setting:
    """A setting of `--optimizer_args` or `--lr_scheduler_args`: `count` numbers, or one value."""

    flag: Flag
    count: int = 1

    @property
    def name(self) -> str:
        return self.flag.name

    def read(self, text: str) -> Any:
        """The value that a text means.

        Raises:
            ValueError: no Python literal, or one of another type, length or size; `name=text` stands in its words.
        """
        if self.flag.shape == "str":
            return text.strip("'\"")
        given = f"{self.name}={text}"
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"{given}: {text!r} is no number, True, False or (a, b)") from None
        if value is None and self.flag.optional:
            return None
        if isinstance(value, bool) != (self.flag.shape == "flag") or isinstance(value, str | dict | None):
            raise ValueError(f"{given} is no {self.flag.type_name()}")
        try:
            read = values.read(self.flag, list(value) if isinstance(value, tuple) else value)
        except ValueError as error:
            raise ValueError(f"{given}: {error}") from None
        if self.count > 1 and len(read) != self.count:
            raise ValueError(f"{given} must be {_COUNTS[self.count]} numbers")
        return read


_COUNTS = {2: "two", 3: "three"}


def parse_arguments(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """`key=value` texts with Python literals as values (a bare word is a text).

    Raises:
        UserError: a text without `=`.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError.single(flag, f"{text!r} has no =", "write key=value")
        try:
            arguments[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            arguments[key.strip()] = value.strip()
    return arguments


def number(name: str, limits: Limits = (), *, optional: bool = False) -> Setting:
    """A number; with `optional`, None is one of its values."""
    return Setting(Flag(name, "float", limits=limits, optional=optional))


def whole(name: str, limits: Limits = FROM_0) -> Setting:
    """A whole number."""
    return Setting(Flag(name, "int", limits=limits))


def switch(name: str, *, optional: bool = False) -> Setting:
    """True or False; with `optional`, None is one of its values."""
    return Setting(Flag(name, "flag", optional=optional))


def numbers(name: str, count: int, limits: Limits = SHARE) -> Setting:
    """So many numbers."""
    return Setting(Flag(name, "float", many=True, limits=limits), count)


def table(*settings: Setting) -> Mapping[str, Setting]:
    """Settings by name."""
    return {setting.name: setting for setting in settings}


def step_rules(text: str) -> tuple[tuple[tuple[int, float], ...], float]:
    """(step, factor up to that step) in order, and the factor after all of them, of a text such as `1:10,0.1:20,0.01`.

    Raises:
        ValueError: it is written otherwise.
    """
    *rules, last = text.strip("'\" ").split(",")
    try:
        pairs = [(int(step), float(factor)) for factor, step in (rule.split(":") for rule in rules)]
        return tuple(sorted(pairs)), float(last)
    except ValueError:
        raise ValueError(
            f"step_rules={text} must be factors with the steps up to which they count, such as 1:10,0.1:20,0.01"
        ) from None
