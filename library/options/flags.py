"""How a flag is declared, and what the rest of this room reads from a declaration.

Every flag is a field of one frozen pydantic model per group (`honoured`, `equivalent` or `refused`). Command line, TOML
keys, conversions, checks, `--help` and docs/options.md are all made from these fields. Which flags there are: the
modules of the groups. What a value may look like: options.values.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["honoured", "equivalent", "refused"]
Shape = Literal["flag", "int", "float", "str", "path", "steps", "size", "table"]


class Group(BaseModel):
    """Base of the groups: fields are flags, the docstring's first line is the group's title in `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def honoured(
    default: Any,
    text: str,
    *,
    metavar: str | None = None,
    needs: str | None = None,
    refuse: Mapping[str, str] | None = None,
    synonyms: Mapping[Any, Any] | None = None,
    zero_is_off: bool = False,
    secret: bool = False,
    each_ge: float | None = None,
    **limits: float,
) -> Any:
    """A flag that does what it says.

    Args:
        needs: another flag without which this one has no effect, which is then said in one line.
        refuse: values that sd-scripts knows and we don't, each with what to do instead.
        synonyms: values that mean another one, such as `max_token_length = 75`.
        zero_is_off: numbers below 1 mean that the flag wasn't given.
        each_ge: least allowed value of every item of a list.
        limits: `ge`, `gt`, `le`, `lt`.
    """
    more = {
        "limits": None if each_ge is None else (("ge", each_ge),),
        "kind": "honoured",
        "metavar": metavar,
        "needs": needs,
        "refuse": refuse,
        "synonyms": synonyms,
        "zero_is_off": zero_is_off,
        "secret": secret,
    }
    return _field(default, text, more, limits)


def equivalent(default: Any, text: str, why: str, *, synonyms: Mapping[Any, Any] | None = None) -> Any:
    """A flag that needs nothing to be done, because the result is the same without it; `why` is said in one line."""
    return _field(default, text, {"kind": "equivalent", "why": why, "synonyms": synonyms}, {})


def refused(
    default: Any,
    text: str,
    why: str,
    *,
    needs: str | None = None,
    synonyms: Mapping[Any, Any] | None = None,
    secret: bool = False,
) -> Any:
    """A flag that ends the run when it is set to something other than its default or off; `why` says what to use.

    Args:
        needs: another flag without which this one has no effect, so that it is then only mentioned.
    """
    more = {"kind": "refused", "why": why, "needs": needs, "synonyms": synonyms, "secret": secret}
    return _field(default, text, more, {})


def _field(default: Any, text: str, more: dict[str, Any], limits: Mapping[str, Any]) -> Any:
    return Field(default=default, description=text, json_schema_extra={"flag": more}, **limits)


@dataclass(frozen=True)
class Flag:
    """A declaration, read. `name` is the flag without dashes and the TOML key.

    `limits` holds (`ge`|`gt`|`le`|`lt`, bound) pairs; `choices` is empty where any text goes.
    """

    name: str
    shape: Shape
    default: Any = None
    many: bool = False
    optional: bool = False
    choices: tuple[Any, ...] = ()
    limits: tuple[tuple[str, float], ...] = ()
    group: str = ""
    text: str = ""
    kind: Kind = "honoured"
    why: str = ""
    needs: str | None = None
    metavar: str | None = None
    refuse: Mapping[str, str] = field(default_factory=dict)
    synonyms: Mapping[Any, Any] = field(default_factory=dict)
    zero_is_off: bool = False
    secret: bool = False

    @property
    def option(self) -> str:
        """The flag as it is written on a command line."""
        return f"--{self.name}"

    def type_name(self) -> str:
        """The type in words, for `--help` and the docs."""
        if self.choices:
            allowed = [str(choice) for choice in self.choices if str(choice) not in self.refuse]
            return " or ".join(allowed) if len(allowed) < 3 else ", ".join(allowed)
        words = {
            "flag": "switch",
            "int": "whole number",
            "float": "number",
            "str": "text",
            "path": "path",
            "steps": "steps, or a ratio up to 1.0",
            "size": "width,height",
            "table": "table",
        }
        plural = {"int": "whole numbers", "float": "numbers", "str": "texts", "path": "paths"}
        return plural.get(self.shape, words[self.shape]) if self.many else words[self.shape]


def flags_of(group: str, model: type[BaseModel]) -> tuple[Flag, ...]:
    """The flags that a group declares, in their order."""
    return tuple(_read(group, name, info) for name, info in model.model_fields.items())


def _read(group: str, name: str, info: Any) -> Flag:
    optional, many, choices, shape = _shape(name, info.annotation)
    limits = tuple(
        (limit, getattr(constraint, limit))
        for constraint in info.metadata
        for limit in ("ge", "gt", "le", "lt")
        if getattr(constraint, limit, None) is not None
    )
    more: dict[str, Any] = {"limits": limits}
    more.update({key: value for key, value in info.json_schema_extra["flag"].items() if value is not None})
    return Flag(
        name=name,
        shape=shape,
        default=info.default,
        many=many,
        optional=optional,
        choices=choices,
        group=group,
        text=info.description,
        **more,
    )


def _shape(name: str, annotation: Any) -> tuple[bool, bool, tuple[Any, ...], Shape]:
    """Whether None is allowed, whether there are many values, the choices, and the shape of one value."""
    optional, many = False, False
    choices: tuple[Any, ...] = ()
    if get_origin(annotation) in (Union, types.UnionType):
        parts = get_args(annotation)
        optional = type(None) in parts
        parts = tuple(part for part in parts if part is not type(None))
        if set(parts) == {int, float}:
            return optional, False, (), "steps"
        annotation = parts[0]
    if annotation == tuple[int, int]:
        return optional, False, (), "size"
    if get_origin(annotation) is tuple:
        many, annotation = True, get_args(annotation)[0]
        if annotation == tuple[int, int]:
            return optional, True, (), "size"
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        annotation = type(choices[0])
    shapes: dict[Any, Shape] = {bool: "flag", int: "int", float: "float", str: "str", Path: "path"}
    if annotation not in shapes:
        raise TypeError(f"flag {name} is declared with a type that isn't known: {annotation}")
    return optional, many, choices, shapes[annotation]
