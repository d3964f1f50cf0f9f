"""Tables of captions and tags as sd-scripts' tools write them, read to be amended and written whole or not at all.

`.json` is one table, `{"a.png": {"caption": "...", "tags": "..."}}`; `.jsonl` has an object a line, whose `image_path`
is the key. What a picture's name means, and which pictures train, is decided elsewhere (data.sources.metadata_files).
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from library.data.sources.metadata_files import kind
from library.data.sources.picture_files import some
from library.data.whole_files import write_whole
from library.errors import Problem, UserError

TABLE_ENDINGS = (".json", ".jsonl")
IMAGE_PATH = "image_path"
Table = dict[str, dict[str, Any]]
"""A picture's name, as it stands in the file -> its fields, without the name. Both keep the file's order."""
_SHOWN = 10


def read_table(path: Path) -> Table:
    """The entries of a metadata file, with all of their fields; the ending tells which of the two kinds it is.

    Raises:
        UserError: there is no such file, it can't be read as its kind, an entry is no table, or a name stands twice.
    """
    text = _text(path)
    table: Table = {}
    problems: list[Problem] = []
    for where, name, entry in _lines(path, text) if path.suffix.lower() == ".jsonl" else _pairs(path, text):
        if isinstance(entry, Problem):
            problems.append(entry)
        elif name in table:
            problems.append(Problem(where, f'"{some([name])}" stands twice', "keep one of them"))
        else:
            table[name] = entry
    if problems:
        more = [Problem(str(path), f"{len(problems) - _SHOWN} more entries that can't be used", "mend them all")]
        raise UserError(problems[:_SHOWN] + (more if len(problems) > _SHOWN else []))
    return table


def key_of(table: Collection[str], picture: Path, folder: Path) -> str | None:
    """The name that a picture has in a table: its absolute path, its path within `folder`, its path as it was given, or
    one of these without its ending; None where it isn't there."""
    spellings = (absolute(picture), picture.relative_to(folder), picture)
    whole = [one.as_posix() for one in spellings]
    stems = [one.with_name(one.stem).as_posix() for one in spellings]
    return next((name for name in (*whole, *stems) if name in table), None)


def absolute(picture: Path) -> Path:
    """An absolute path without dots; links stay what they are."""
    return Path(os.path.normpath(Path.cwd() / picture))


def write_table(path: Path, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Write all entries in their order, in the kind that the ending names; an older file stays until this one is whole.

    Raises:
        UserError: the file can't be written.
    """
    if path.suffix.lower() == ".jsonl":
        lines = [_json({IMAGE_PATH: name, **entry}, None) for name, entry in table.items()]
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        write_text(path, f"{_json(table, 2)}\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    write_whole(path, text.encode("utf-8"))


def problem_with_output(path: Path, where: str) -> Problem | None:
    """What stands against writing a metadata file there: its ending, or its folder."""
    if path.suffix.lower() not in TABLE_ENDINGS:
        wrong = f"{path} ends in {path.suffix}" if path.suffix else f"{path} has no ending"
        return Problem(where, wrong, f"name a {' or '.join(TABLE_ENDINGS)} file")
    if path.is_dir():
        return Problem(where, f"{path} is a folder", "name a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return Problem(where, f"{folder} is not a folder", "name a file elsewhere")
    if not os.access(folder, os.W_OK):
        return Problem(where, f"nothing can be written into {folder}", "name a file elsewhere")
    return None


def _json(value: object, indent: int | None) -> str:
    """JSON with letters as they are, unless a file's name holds bytes that no letter has."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else f"can't be read ({error.strerror or error})"
        raise UserError.single(str(path), reason) from error
    except UnicodeDecodeError as error:
        raise UserError.single(str(path), f"isn't UTF-8 text (byte {error.start})", "save it as UTF-8") from error
    if not text.strip():
        raise UserError.single(str(path), "the file is empty", "remove it to begin anew")
    return text


class _Pairs(list[tuple[str, Any]]):
    """The keys and values of a JSON table; unlike in a dictionary, a key may stand twice."""


def _pairs(path: Path, text: str) -> Iterator[tuple[str, str, dict[str, Any] | Problem]]:
    try:
        content = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        wrong = f"isn't valid JSON: {error.msg} (column {error.colno})"
        advice = "name a file with one object a line .jsonl" if error.msg == "Extra data" else ""
        raise UserError.single(f"{path}:{error.lineno}", wrong, advice) from error
    except RecursionError as error:
        raise UserError.single(str(path), "isn't metadata: tables within tables without end") from error
    if not isinstance(content, _Pairs):
        raise UserError.single(str(path), f"holds {kind(content)}, not a table", 'write {"a.png": {"caption": "..."}}')
    for name, entry in content:
        if isinstance(entry, _Pairs):
            yield str(path), name, _fields(entry)
        else:
            yield str(path), name, Problem(str(path), f"{some([name])} is {kind(entry)}, not a table")


def _lines(path: Path, text: str) -> Iterator[tuple[str, str, dict[str, Any] | Problem]]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            advice = "name a file that is one table .json" if number == 1 and line.strip() in ("{", "[") else ""
            yield where, "", Problem(where, f"isn't valid JSON: {getattr(error, 'msg', 'too deep')}", advice)
            continue
        name = entry.pop(IMAGE_PATH, None) if isinstance(entry, dict) else None
        if isinstance(name, str) and name:
            yield where, name, entry
        else:
            wrong = f"has no {IMAGE_PATH}" if isinstance(entry, dict) else f"holds {kind(entry)}, not a table"
            yield where, "", Problem(where, wrong, f'write lines like {{"{IMAGE_PATH}": "a.png", "caption": "..."}}')


def _fields(value: Any) -> Any:
    """What was read with `_Pairs`, as dictionaries all the way down; of a field that stands twice the last counts."""
    if isinstance(value, _Pairs):
        return {key: _fields(inner) for key, inner in value}
    return [_fields(inner) for inner in value] if isinstance(value, list) else value
