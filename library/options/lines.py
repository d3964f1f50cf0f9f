"""On which line of a TOML or JSON file a key stands, so that a message can say where to look.

The scanners read texts that the real parsers have already accepted, and find lines only: no value is made here.
A path is a tuple of keys and list indices, such as `("datasets", 0, "subsets", 1, "image_dir")`.
"""

import json
import re
import tomllib
from collections.abc import Mapping

Path = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR_END = re.compile(r"[,\]}#\n]|$")


def toml_lines(text: str) -> dict[Path, int]:
    """Line, counted from 1, of every key, table header and list element of a valid TOML text."""
    return _Toml(text.replace("\r\n", "\n")).scan()


def json_lines(text: str) -> dict[Path, int]:
    """Line, counted from 1, of every key and list element of a valid JSON text."""
    return _Json(text).scan()


class _Scanner:
    """A position in a text, and the lines found so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.line_of_at = (0, 1)
        self.lines: dict[Path, int] = {}

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def line(self) -> int:
        """The line of the current position."""
        before, line = self.line_of_at
        self.line_of_at = (self.at, line + self.text.count("\n", before, self.at))
        return self.line_of_at[1]

    def skip(self, characters: str) -> None:
        while self.at < len(self.text) and self.text[self.at] in characters:
            self.at += 1


class _Json(_Scanner):
    decoder = json.JSONDecoder(strict=False)

    def scan(self) -> dict[Path, int]:
        self.value(())
        return self.lines

    def value(self, path: Path) -> None:
        self.skip(" \t\r\n")
        self.lines.setdefault(path, self.line())
        start = self.peek()
        if start == "{":
            self.at += 1
            while self.more("}"):
                key = self.string()
                self.lines[(*path, key)] = self.line()
                self.skip(" \t\r\n:")
                self.value((*path, key))
        elif start == "[":
            self.at += 1
            index = 0
            while self.more("]"):
                self.value((*path, index))
                index += 1
        elif start == '"':
            self.string()
        else:
            while self.peek() and self.peek() not in ",]} \t\r\n":
                self.at += 1

    def more(self, end: str) -> bool:
        """Whether another item follows; steps over commas, and over the end."""
        self.skip(" \t\r\n,")
        if self.peek() in (end, ""):
            self.at += 1
            return False
        return True

    def string(self) -> str:
        text, self.at = self.decoder.raw_decode(self.text, self.at)
        return str(text)


class _Toml(_Scanner):
    def scan(self) -> dict[Path, int]:
        table: Path = ()
        counts: dict[Path, int] = {}
        while True:
            self.blanks()
            if not self.peek():
                return self.lines
            if self.peek() == "[":
                table = self.header(counts)
            else:
                self.pair(table)

    def blanks(self) -> None:
        """Step over white space, line ends and comments."""
        self.skip(" \t\n")
        while self.peek() == "#":
            end = self.text.find("\n", self.at)
            self.at = len(self.text) if end < 0 else end
            self.skip(" \t\n")

    def header(self, counts: dict[Path, int]) -> Path:
        """`[a.b]` or `[[a.b]]`; `counts` holds how many tables each list has."""
        line = self.line()
        many = self.text.startswith("[[", self.at)
        self.at += 2 if many else 1
        keys = self.keys()
        self.at += 2 if many else 1
        path: Path = ()
        for position, key in enumerate(keys):
            path += (key,)
            if many and position == len(keys) - 1:
                counts[path] = counts.get(path, 0) + 1
            self.lines.setdefault(path, line)
            if path in counts:
                path += (counts[path] - 1,)
        self.lines.setdefault(path, line)
        return path

    def keys(self) -> list[str]:
        """A dotted key, up to and without what ends it."""
        keys = []
        while True:
            self.skip(" \t")
            keys.append(self.key())
            self.skip(" \t")
            if self.peek() != ".":
                return keys
            self.at += 1

    def key(self) -> str:
        quote = self.peek()
        if quote in ('"', "'"):
            start = self.at
            self.string()
            inner = self.text[start + 1 : self.at - 1]
            if quote == '"' and "\\" in inner:
                return next(iter(tomllib.loads(f'"{inner}" = 0')))
            return inner
        found = _BARE_KEY.match(self.text, self.at)
        if found is None:
            raise ValueError(f"no TOML key at line {self.line()}")
        self.at = found.end()
        return found.group()

    def pair(self, table: Path) -> None:
        line = self.line()
        path = table
        for key in self.keys():
            path += (key,)
            self.lines.setdefault(path, line)
        self.at += 1
        self.skip(" \t")
        self.value(path)

    def value(self, path: Path) -> None:
        start = self.peek()
        if start in ('"', "'"):
            self.string()
        elif start == "[":
            self.items(path, "]")
        elif start == "{":
            self.items(path, "}")
        else:
            end = _SCALAR_END.search(self.text, self.at)
            self.at = end.start() if end else len(self.text)

    def items(self, path: Path, end: str) -> None:
        """A list or an inline table, with what stands in it."""
        self.at += 1
        index = 0
        while True:
            self.skip(",")
            self.blanks()
            if self.peek() == ",":
                continue
            if self.peek() in (end, ""):
                self.at += 1
                return
            if end == "}":
                self.pair(path)
            else:
                self.lines.setdefault((*path, index), self.line())
                self.value((*path, index))
                index += 1
            self.blanks()

    def string(self) -> None:
        """Step over a string of any of the four kinds."""
        quote = self.peek()
        if self.text.startswith(quote * 3, self.at):
            self.at += 3
            while not self.text.startswith(quote * 3, self.at):
                self.at += 2 if quote == '"' and self.peek() == "\\" else 1
            self.at += 3
            self.skip(quote)
            return
        self.at += 1
        while self.peek() != quote:
            self.at += 2 if quote == '"' and self.peek() == "\\" else 1
        self.at += 1


def place(file: str, lines: Mapping[Path, int], path: Path) -> str:
    """`file.toml:12 key`, with the line of the nearest part of `path` that has one."""
    key = next((str(part) for part in reversed(path) if isinstance(part, str)), "")
    for length in range(len(path), -1, -1):
        if path[:length] in lines:
            return f"{file}:{lines[path[:length]]} {key}".rstrip()
    return f"{file} {key}".rstrip()
