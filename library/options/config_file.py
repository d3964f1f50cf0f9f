"""Reading options from a TOML file, and writing one."""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError, nearest
from library.options import foreign
from library.options.lines import place, toml_lines
from library.options.modules import LORA_ARGS, LORA_REFUSED
from library.options.other_names import OTHER_NAMES
from library.options.registry import FLAGS, Options, flags_of_script
from library.options.values import written

_NEVER_WRITTEN = {"config_file", "output_config", "dry_run", "print_command", "list_optimizers"}


@dataclass
class FromFile:
    """What a config file says: raw values by flag, the place of each, lines to show, and what is wrong.

    `preset` is the table of that name, which only ready settings have (library.options.presets).
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    preset: Mapping[str, Any] = field(default_factory=dict)


def named(path: Path) -> Path:
    """`path`, with `.toml` added if it is missing."""
    return path if path.suffix == ".toml" else path.with_name(path.name + ".toml")


def read_toml(path: Path, where: str) -> tuple[dict[str, Any], str]:
    """The content of a TOML file, and its text.

    Raises:
        UserError: the file is missing or is no TOML; the line is named.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))
        raise UserError.single(where, f"{path} can't be read: {reason}") from None
    except UnicodeDecodeError as error:
        raise UserError.single(str(path), f"is no UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise _syntax(path, text, str(error)) from None


def _syntax(path: Path, text: str, message: str) -> UserError:
    """A TOML syntax error as one problem, with the line in its place."""
    found = re.search(r"\s*\(at line (\d+), column (\d+)\)", message)
    if found is None:
        return UserError.single(f"{path}:{text.count(chr(10)) + 1}", message[:1].lower() + message[1:])
    line = text.splitlines()[int(found[1]) - 1] if int(found[1]) <= len(text.splitlines()) else ""
    backslash = "\\" in line and '"' in line
    advice = "write Windows paths with / or in single quotes" if backslash else f"column {found[2]} of: {line.strip()}"
    wrong = message[: found.start()]
    return UserError.single(f"{path}:{found[1]}", f"no valid TOML: {wrong[:1].lower() + wrong[1:]}", advice)


def read_config(path: Path) -> FromFile:
    """The options in the TOML file `path`. Sections are flattened by one level; later ones win."""
    result = FromFile()
    path = named(path)
    try:
        content, text = read_toml(path, "--config_file")
    except UserError as error:
        result.problems.extend(error.problems)
        return result
    lines = toml_lines(text)
    if isinstance(content.get("preset"), dict):
        result.preset = content.pop("preset")
    ignored: list[str] = []
    for keys, value in _flattened(content):
        name = keys[-1]
        where = place(str(path), lines, keys)
        if (name in FLAGS or name in OTHER_NAMES) and name not in _NEVER_WRITTEN:
            result.values[name] = value
            result.places[name] = where
        elif name in foreign.FOREIGN or name in _NEVER_WRITTEN:
            ignored.append(name)
        elif name == "datasets":
            result.problems.append(Problem(where, "this is a dataset file", "give it with --dataset_config"))
        else:
            advice = nearest(name, [*FLAGS, *OTHER_NAMES]) or "see --help"
            if name in LORA_ARGS or name in LORA_REFUSED:
                advice = f'it is a setting of the network: network_args = ["{name}=..."]'
            result.problems.append(Problem(where, "unknown option", advice))
    result.notices.extend(foreign.notices(str(path), ignored))
    return result


def _flattened(content: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """Path and value of each option: keys of the top level and of its tables, in the file's order."""
    pairs: list[tuple[tuple[str, ...], Any]] = []
    for key, value in content.items():
        known = key in FLAGS or key in foreign.FOREIGN
        if isinstance(value, dict) and (not known or any(inner in FLAGS for inner in value)):
            pairs.extend(((key, inner), item) for inner, item in value.items())
        else:
            pairs.append(((key,), value))
    return pairs


def write_config(path: Path, options: Options) -> Path:
    """Write every explicit option that differs from its default, but no secrets, as flat TOML. Returns the file.

    Raises:
        UserError: the file exists, or can't be written.
    """
    path = named(path)
    if path.exists():
        raise UserError.single("--output_config", f"{path} exists already", "name another file with --config_file")
    lines = []
    for name, flag in flags_of_script(options.script).items():
        value = options.value(name)
        if name in options.explicit and name not in _NEVER_WRITTEN and not flag.secret and value != flag.default:
            lines.append(f"{name} = {toml_value(name, written(value))}\n")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError.single("--output_config", f"{path} can't be written: {error.strerror or error}") from None
    return path


def toml_value(name: str, value: Any) -> str:
    """A value as TOML; a size as the text that sd-scripts reads."""
    if name == "resolution":
        return f'"{value[0]},{value[1]}"'
    if isinstance(value, list):
        return "[" + ", ".join(toml_value("", item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
