"""Reading a dataset file, TOML or JSON, against its schema: each level's values, their places, and what is wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError, nearest
from library.options import values
from library.options.config_file import read_toml
from library.options.dataset_schema import KEYS, TITLES, Level, advice
from library.options.lines import json_lines, place, toml_lines


@dataclass
class Table:
    """One table of the file: its values by key, the place of each, its own place, and keys whose values are wrong."""

    where: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)


@dataclass
class DatasetFile:
    """`datasets` holds each dataset's table with the tables of its subsets."""

    general: Table = field(default_factory=Table)
    datasets: list[tuple[Table, list[Table]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_dataset_file(path: Path, where: str) -> DatasetFile:
    """The content of `path`; everything that is wrong in it is in `problems`."""
    result = DatasetFile()
    try:
        content, lines = _load(path, where)
    except UserError as error:
        result.problems.extend(error.problems)
        return result
    _Reader(path, lines, result).read(content)
    return result


def _load(path: Path, where: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    if path.suffix.lower() == ".toml":
        content, text = read_toml(path, where)
        return content, toml_lines(text)
    if path.suffix.lower() != ".json":
        raise UserError.single(where, f"{path} is neither .toml nor .json")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return json.loads(text), json_lines(text)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))
        raise UserError.single(where, f"{path} can't be read: {reason}") from None
    except json.JSONDecodeError as error:
        raise UserError.single(
            f"{path}:{error.lineno}", f"no valid JSON: {error.msg}", f"column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError.single(str(path), f"is no UTF-8 text (byte {error.start})", "save it as UTF-8") from None


class _Reader:
    """Walks through one file's content."""

    def __init__(self, path: Path, lines: Mapping[tuple[str | int, ...], int], result: DatasetFile) -> None:
        self.path, self.lines, self.result = str(path), lines, result

    def place(self, path: tuple[str | int, ...]) -> str:
        return place(self.path, self.lines, path)

    def problem(self, path: tuple[str | int, ...], wrong: str, advice: str = "") -> None:
        self.result.problems.append(Problem(self.place(path), wrong, advice))

    def read(self, content: Any) -> None:
        if not isinstance(content, dict):
            self.result.problems.append(Problem(self.path, "is no table", "wanted: general and datasets"))
            return
        for key in content:
            if key not in ("general", "datasets"):
                hint = f"it belongs in {KEYS[key].title()}" if key in KEYS else nearest(key, ("general", "datasets"))
                self.problem((key,), "unknown key", hint or "the top level holds general and datasets")
        self.result.general = self.table("general", content.get("general", {}), ("general",))
        datasets = self.tables(content.get("datasets", []), ("datasets",))
        for dataset, path in datasets:
            table = self.table("dataset", dataset, path)
            table.where = f"{self.place(path)} [[datasets]]".replace(" datasets [[", " [[")
            subsets = self.tables(dataset.get("subsets", []), (*path, "subsets"))
            read = [self.table("subset", subset, inner) for subset, inner in subsets]
            if not subsets:
                self.problem(path, "a dataset without subsets", "add [[datasets.subsets]] with an image_dir")
            self.result.datasets.append((table, read))
        if "datasets" not in content or content["datasets"] == []:
            self.result.problems.append(Problem(self.path, "holds no datasets", "add [[datasets]]"))

    def tables(self, raw: Any, path: tuple[str | int, ...]) -> list[tuple[dict[str, Any], tuple[str | int, ...]]]:
        """The tables of a list, each with its path."""
        if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
            self.problem(path, "is no list of tables", f"write [[{'.'.join(p for p in path if isinstance(p, str))}]]")
            return []
        return [(item, (*path, index)) for index, item in enumerate(raw)]

    def table(self, level: Level, raw: Any, path: tuple[str | int, ...]) -> Table:
        table = Table(where=self.place(path))
        if not isinstance(raw, dict):
            self.problem(path, "is no table", f"write {TITLES[level]}")
            return table
        for name, item in raw.items():
            if name == "subsets" and level == "dataset":
                continue
            here = (*path, name)
            if name not in KEYS or level not in KEYS[name].levels:
                self.problem(here, f"unknown key in {TITLES[level]}", advice(name, level))
                continue
            self.key(table, name, item, here)
        return table

    def key(self, table: Table, name: str, raw: Any, path: tuple[str | int, ...]) -> None:
        """Read one known key into `table`, judging refused ones."""
        flag, parts = KEYS[name].value, KEYS[name].parts
        try:
            value = values.read(flag, _as_list(raw, parts) if parts and isinstance(raw, dict) else raw)
        except ValueError as error:
            self.problem(path, str(error))
            table.bad.add(name)
            return
        if isinstance(value, values.Unset):
            return
        if flag.kind == "equivalent" and value:
            if not any(line.endswith(flag.why) for line in self.result.notices):
                self.result.notices.append(f"{self.place(path)}: nothing to do: {flag.why}")
        elif flag.kind == "honoured":
            table.values[name] = value
            table.places[name] = self.place(path)


def _as_list(raw: dict[str, Any], parts: tuple[str, ...]) -> list[Any]:
    """The values of a table with just these keys.

    Raises:
        ValueError: a key is missing, or isn't known.
    """
    if set(raw) != set(parts):
        raise ValueError(f"holds {', '.join(raw) or 'nothing'}; wanted: {', '.join(parts)}")
    return [raw[name] for name in parts]
