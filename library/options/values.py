"""Turning what a user wrote, as text or as a TOML or JSON value, into the value of a flag.

A conversion that loses nothing is made silently ("32" or 32.0 for a whole number, 0 or 1 for a switch); any other is a
`ValueError` whose text says what was read and what is allowed. Where it was read is the caller's to add.
"""

import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from library.errors import nearest
from library.options.flags import Flag


class Unset:
    """The value that stands for "as if the flag had not been written"."""


UNSET = Unset()
_LONGEST_NAME = 255


def read(flag: Flag, raw: Any) -> Any:
    """The value of `flag` that `raw` means, or `UNSET`.

    Raises:
        ValueError: `raw` is of a wrong type, would lose something, isn't among the choices or is out of the limits.
    """
    if raw is None or (raw == "" and isinstance(raw, str) and (flag.shape != "str" or flag.default is None)):
        return UNSET
    if isinstance(raw, (str, int, float)) and not isinstance(raw, bool):
        for written, meaning in flag.synonyms.items():
            if str(written) == str(raw):
                return UNSET if meaning is None else meaning
    if flag.many:
        return _many(flag, raw)
    if isinstance(raw, dict) and flag.shape != "table":
        raise ValueError(f"is a table; {_wanted(flag)}")
    if isinstance(raw, list) and flag.shape != "size":
        raise ValueError(f"is a list; {_wanted(flag)}")
    return _one(flag, raw)


def _many(flag: Flag, raw: Any) -> Any:
    if isinstance(raw, dict):
        raise ValueError(f"is a table; {_wanted(flag)}")
    items = raw if isinstance(raw, (list, tuple)) else [raw]
    return tuple(_one(flag, item) for item in items) or UNSET


def _one(flag: Flag, raw: Any) -> Any:
    value = _CONVERSIONS[flag.shape](flag, raw)
    if flag.choices and value not in flag.choices:
        hint = nearest(str(value), [str(choice) for choice in flag.choices])
        also = "".join(f" or {text}" for text, meant in flag.synonyms.items() if meant is None and text != "None")
        raise ValueError(f"{value!r} is not among {flag.type_name()}{also}" + (f"; {hint}" if hint else ""))
    if flag.zero_is_off and value < 1:
        return UNSET
    for limit, bound in flag.limits:
        words, holds = _LIMITS[limit]
        if not holds(value, bound):
            raise ValueError(f"{value} is out of range: it must be {words} {bound:g}")
    return value


_LIMITS: dict[str, tuple[str, Any]] = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("above", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("below", lambda value, bound: value < bound),
}


def _wanted(flag: Flag) -> str:
    return f"wanted: {flag.type_name()}"


def _wrong(flag: Flag, raw: Any) -> ValueError:
    return ValueError(f"{_shown(raw)} is no {flag.type_name()}" if not flag.many else f"{_shown(raw)}: {_wanted(flag)}")


def _shown(raw: Any) -> str:
    if isinstance(raw, bool):
        return str(raw).lower()
    return repr(raw) if isinstance(raw, (str, int, float)) else str(raw)


def _number(flag: Flag, raw: Any) -> Any:
    """`raw` as an int or a float; text of a whole number stays exact."""
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise _wrong(flag, raw)
    if isinstance(raw, str):
        try:
            raw = int(raw)
        except ValueError:
            try:
                raw = float(raw)
            except ValueError:
                raise _wrong(flag, raw) from None
    if isinstance(raw, float) and not math.isfinite(raw):
        raise _wrong(flag, raw)
    return raw


def _flag(flag: Flag, raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, (int, float)) and raw in (0, 1):
        return bool(raw)
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(raw, str) and raw.lower() in words:
        return words[raw.lower()]
    raise ValueError(f"{_shown(raw)} is neither true nor false")


def _int(flag: Flag, raw: Any) -> int:
    number = _number(flag, raw)
    if number != int(number):
        raise ValueError(f"{_shown(raw)} is not a whole number")
    return int(number)


def _float(flag: Flag, raw: Any) -> float:
    return float(_number(flag, raw))


def _str(flag: Flag, raw: Any) -> str:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, int) and not isinstance(raw, bool):
        return str(raw)
    raise ValueError(f"{_shown(raw)} is no text; write it in quotes")


def _path(flag: Flag, raw: Any) -> Path:
    text = _str(flag, raw)
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can")
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in Path(text).parts):
        raise ValueError(f"is no path: a name in it is longer than {_LONGEST_NAME} bytes")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text!r} is no path: {error}") from None


def _steps(flag: Flag, raw: Any) -> int | float:
    """Whole numbers are steps, 0.0 to 1.0 and percentages are a ratio of all steps."""
    if isinstance(raw, str) and raw.strip().endswith("%"):
        ratio = _number(flag, raw.strip()[:-1]) / 100
        if not 0 <= ratio <= 1:
            raise ValueError(f"{_shown(raw)} is out of range: a percentage is from 0% to 100%")
        return float(ratio)
    number = _number(flag, raw)
    least = dict(flag.limits).get("ge", 0)
    if number < least:
        raise ValueError(f"{_shown(raw)} is out of range: it must be at least {least:g}")
    if isinstance(number, int) or number == 0:
        return int(number)
    if number <= 1:
        return number
    if number != int(number):
        raise ValueError(f"{_shown(raw)} is neither a ratio up to 1.0 nor a whole number of steps")
    return int(number)


def _size(flag: Flag, raw: Any) -> tuple[int, int]:
    """`512`, `"512"`, `"512,768"`, `[512]` and `[512, 768]`; one number is a square."""
    parts = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
    try:
        sides = [_int(flag, part) for part in parts]
    except ValueError:
        raise ValueError(f'{_shown(raw)} is no size in pixels; wanted: one number, or "width,height"') from None
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f'{_shown(raw)} is no size in pixels; wanted: one number, or "width,height", above 0')
    return sides[0], sides[-1]


def _table(flag: Flag, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _wrong(flag, raw)
    return raw


_CONVERSIONS: dict[str, Any] = {
    "flag": _flag,
    "int": _int,
    "float": _float,
    "str": _str,
    "path": _path,
    "steps": _steps,
    "size": _size,
    "table": _table,
}


def written(value: Any) -> Any:
    """A value as it stands in TOML, JSON, logs and metadata: paths as text, sizes and lists as lists."""
    if isinstance(value, Path):
        return str(value)
    return [written(item) for item in value] if isinstance(value, tuple) else value


def round_half_up(count: int, fraction: float) -> int:
    """`count * fraction`, the fraction taken as it is written in decimals: 0.29 of 50 is 14.5, which gives 15."""
    return int(count * Fraction(repr(float(fraction))) + Fraction(1, 2))
