"""Pictures and captions as a file lists them: sd-scripts' metadata (JSON, JSONL), and JSONL with columns.

Only names and texts are read here. Sizes that such a file holds are not used: the pictures' headers tell them.
"""

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.captions import replaces
from library.data.sources.listing import Findings, Listed, caption_of, lines_of
from library.data.sources.picture_files import SHOWN, Folders, is_picture, some
from library.errors import Problem, UserError, nearest
from library.options.lines import json_lines
from library.options.specs import Columns, SubsetSpec

_KINDS = {dict: "a table", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
_TEXT = (str, type(None))
_METADATA_LINE = '{"image_path": "a.png", "caption": "...", "tags": "..."}'
_METADATA_TABLE = '{"a.png": {"caption": "...", "tags": "..."}, ...}'


def list_metadata(spec: SubsetSpec, findings: Findings) -> list[Listed]:
    """The pictures of `spec.metadata_file` (`.jsonl`, or else JSON), sorted by key; what is wrong is in `findings`.

    A caption is the entry's caption and its tags, with the caption separator between them where both are there. Line
    ends in tags become separators. With wildcards every line of the caption that isn't blank gets the tags, without
    only the first such line counts. Names may be relative to `spec.image_dir`, absolute, written with backslashes, or
    lack their extension.
    """
    path = _file(spec)
    separator, wildcards = spec.caption.separator, spec.caption.wildcards
    reading = _Reading(path, spec.image_dir, findings)
    try:
        entries = _lines(path, reading) if path.suffix.lower() == ".jsonl" else _table(path, reading)
        for line, name, entry in entries:
            image = entry.get("image_path") if name is None else name
            if not isinstance(image, str) or not image:
                wrong = f"there is no image_path, but {some(sorted(entry)) or 'nothing'}"
                if "image_path" in entry or name is not None:
                    wrong = "image_path is empty" if image == "" else f"image_path is {kind(image)}, not a text"
                reading.complain(line, name, wrong, f"write lines like {_METADATA_LINE}" if name is None else "")
                continue
            caption, tags = entry.get("caption"), entry.get("tags")
            if not isinstance(caption, _TEXT) or not isinstance(tags, _TEXT):
                key, value = ("tags", tags) if isinstance(caption, _TEXT) else ("caption", caption)
                advice = "write it as one text, tags with commas between them" if isinstance(value, list) else ""
                reading.complain(line, name, f"{key} of {some([image])} is {kind(value)}, not a text", advice)
                continue
            reading.named.append((line, image, join_tags(caption or "", tags or "", separator, wildcards), None))
    except UserError as error:
        findings.problems += error.problems
        return []
    listed = reading.finish(spec, tell_unnamed=True)
    empty = sum(not one.caption for one in listed)
    if empty and not replaces(spec.caption):
        findings.notices.append(f"{path}: {empty} of {len(listed)} pictures have neither caption nor tags there")
    return listed


def join_tags(caption: str, tags: str, separator: str, wildcards: bool) -> str:
    """Caption and tags of one metadata entry as one text; several lines only with wildcards."""
    lines, tags = lines_of(caption_of(caption, wildcards)), separator.join(lines_of(tags))
    return "\n".join(f"{line}{separator}{tags}" for line in lines) if lines and tags else "\n".join(lines) or tags


def list_jsonl(spec: SubsetSpec, findings: Findings) -> list[Listed]:
    """The pictures of `spec.metadata_file`, JSON objects by line whose columns `spec.columns` names, sorted by key.

    Paths are absolute or relative to the file. The mask column may be absent; it is used if `spec.masks`. Of a caption
    with several lines the first that isn't blank counts, with wildcards all of them.
    """
    path, columns = _file(spec), spec.columns
    reading = _Reading(path, path.parent, findings, spec.image_dir)
    found_masks = False
    try:
        for line, _, row in _lines(path, reading):
            found_masks = found_masks or columns.mask in row
            texts = [_column(reading, line, row, name) for name in (columns.image, columns.caption)]
            mask = _column(reading, line, row, columns.mask) if spec.masks and row.get(columns.mask) else None
            image, caption = texts
            if image == "":
                reading.complain(line, None, f"column {columns.image} is empty")
            elif image is not None and caption is not None:
                reading.named.append((line, image, caption_of(caption, spec.caption.wildcards), mask))
    except UserError as error:
        findings.problems += error.problems
        return []
    listed = reading.finish(spec, tell_unnamed=False)
    _judge_masks(path, spec, found_masks, bool(listed), findings)
    empty = sum(not one.caption for one in listed)
    if empty and not replaces(spec.caption):
        findings.notices.append(f"{path}: {empty} of {len(listed)} captions are empty")
    return listed


def _column(reading: "_Reading", line: int, row: Mapping[str, Any], name: str) -> str | None:
    """The text in a column; None, with a complaint, if there is none."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    if name in row:
        reading.complain(line, None, f"column {name} is {kind(value)}, not a text")
    else:
        advice = nearest(name, row) or "name the columns with image_column and caption_column"
        reading.complain(line, None, f"there is no column {name}, but {some(sorted(row)) or 'nothing'}", advice)
    return None


def _judge_masks(path: Path, spec: SubsetSpec, found: bool, any_pictures: bool, findings: Findings) -> None:
    name = spec.columns.mask
    if found and not spec.masks:
        findings.notices.append(f"{path}: its column {name} is not used; --masked_loss uses it")
    elif spec.masks and not found and any_pictures and name != Columns().mask:
        findings.problems.append(Problem(str(path), f"no line has the column {name}", "name it with mask_column"))


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    return "null" if value is None else _KINDS.get(type(value), "something else")


@dataclass
class _Reading:
    """The pictures of one file while it is read: `named` holds line (0 if unknown), name, caption and mask of each.

    Names are relative to `base`. Keys are relative to `folder`, the subset's, which is `base` unless it is given.
    """

    path: Path
    base: Path
    findings: Findings
    folder: Path | None = None
    named: list[tuple[int, str, str, str | None]] = field(default_factory=list)
    repeated: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    _complaints: list[tuple[int, str | None, str, str]] = field(default_factory=list)

    def complain(self, line: int, key: str | None, wrong: str, advice: str = "") -> None:
        """Something is wrong with one entry: of a line, or (line 0) of a key whose line is looked up in the end."""
        self._complaints.append((line, key, wrong, advice))

    def hook(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Makes a table; keys that stand twice in it are remembered."""
        table = dict(pairs)
        if len(table) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.repeated += [(table, key) for key, count in counts.items() if count > 1]
        return table

    def take_repeated(self, table: Mapping[str, Any]) -> list[str]:
        """The keys that stand twice in a table, as messages name them."""
        return [f'"{some([key])}"' for other, key in self.repeated if other is table]

    def finish(self, spec: SubsetSpec, *, tell_unnamed: bool) -> list[Listed]:
        """The pictures that are there, sorted by key. Says what is wrong with the others."""
        place, names = _Place(self.base, self.folder or self.base), Folders()
        found: dict[str, Listed] = {}
        missing: list[tuple[int, str]] = []
        lost_masks: list[tuple[int, str]] = []
        file, plain = self.path.name, place.key(f"{place.base}/") == ""
        beside = names[place.base].pictures if plain else {}
        for line, name, caption, mask in self.named:
            if plain and name in beside:
                key = name
            else:
                picture = place.find(name, names, self.complain, line)
                if not picture:
                    missing += [(line, name)] if picture is None else []
                    continue
                key = place.key(picture)
            if mask is not None:
                mask_file = place.find(mask, names, self.complain, line)
                if mask_file is None:
                    lost_masks.append((line, mask))
                mask = mask_file or None
            if key in found:
                other = found[key].where
                again = f", see {other}" if line else ": its name is written two ways"
                self.complain(line, name, f"{some([name])} stands twice{again}", "name each picture once")
                continue
            found[key] = Listed(key, caption, mask, f"{file}:{line}" if line else file)
        self._tell(missing, lost_masks, place)
        if not self.named and not self._complaints:
            self.findings.problems.append(Problem(str(self.path), "it names no pictures"))
        if tell_unnamed:
            self._notice_unnamed(place, names, found)
        return sorted(found.values(), key=lambda one: one.key)

    def _tell(self, missing: list[tuple[int, str]], lost_masks: list[tuple[int, str]], place: "_Place") -> None:
        problems = self.findings.problems
        lines = _key_lines(self.path) if any(not line for line, *_ in self._complaints) else {}
        for line, key, wrong, advice in self._complaints[:SHOWN]:
            number = line or lines.get(key or "", 0)
            problems.append(Problem(f"{self.path}:{number}" if number else str(self.path), wrong, advice))
        if len(self._complaints) > SHOWN:
            more = f"{len(self._complaints) - SHOWN} more of {len(self._complaints)} entries that can't be used"
            problems.append(Problem(str(self.path), more, "mend them all"))
        counts = {"pictures": len(self.named), "masks": sum(mask is not None for *_, mask in self.named)}
        for lost, what in ((missing, "pictures"), (lost_masks, "masks")):
            if not lost:
                continue
            names = some([f"{name} (line {line})" if line else name for line, name in lost])
            wrong = f"it names {what} that aren't there ({len(lost)} of {counts[what]}): {names}"
            advice = f"names are looked for in {place.base}"
            if not Path(place.base).is_dir() and any(not name.startswith("/") for _, name in lost):
                wrong, advice = f"there is no folder {place.base}, in which its {what} would be", ""
            problems.append(Problem(str(self.path), wrong, advice))

    def _notice_unnamed(self, place: "_Place", names: Folders, found: Mapping[str, Listed]) -> None:
        """One line about pictures beside those that the file names."""
        unnamed = 0
        for folder in names.listed.values():
            inner = place.key(f"{folder.path}/")
            if not inner.startswith("/"):
                unnamed += sum(inner + name not in found and name[0] != "." for name in folder.pictures)
        if unnamed:
            what = "1 picture there isn't" if unnamed == 1 else f"{unnamed} pictures there aren't"
            self.findings.notices.append(f"{place.base}: {what} named in {self.path.name}, and not used")


class _Place:
    """Turns the names of a file into pictures, and pictures into keys."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base = posixpath.normpath(Path.cwd() / base)
        roots = (posixpath.normpath(Path.cwd() / folder), str(folder.resolve()))
        self._roots = tuple(f"{root.rstrip('/')}/" for root in dict.fromkeys(roots))

    def absolute(self, name: str) -> str:
        """The path that a name stands for."""
        if name.startswith("/"):
            return posixpath.normpath(name)
        if "/" not in name or not ("./" in name or "//" in name):
            return f"{self.base}/{name}"
        return posixpath.normpath(f"{self.base}/{name}")

    def key(self, path: str) -> str:
        """An absolute path, relative to the subset's folder if it lies there."""
        for root in self._roots:
            if path.startswith(root):
                return path[len(root) :]
        return path

    def find(
        self, name: str, folders: Folders, complain: Callable[[int, str | None, str, str], None], line: int
    ) -> str | None:
        """The path of the picture that a name means, empty if a complaint was made, None if nothing is there."""
        for spelling in (name, name.replace("\\", "/")) if "\\" in name else (name,):
            path = self.absolute(spelling)
            inner, _, last = path.rpartition("/")
            folder = folders[inner]
            if last in folder.pictures:
                return path
            same = folder.of_stem(last)
            if len(same) == 1:
                return f"{inner}/{same[0]}"
            if same:
                complain(line, name, f"{some([name])} may be {some(same)}", "write the name with its extension")
                return ""
            if last in folder.others and not is_picture(last):
                complain(line, name, f"{some([name])} isn't a picture that can be read", "convert it to PNG or JPEG")
                return ""
        return None


def _file(spec: SubsetSpec) -> Path:
    if spec.metadata_file is None:
        raise ValueError(f"a subset of kind {spec.source} without a file")
    return spec.metadata_file


def _text(path: Path) -> str:
    """The whole file.

    Raises:
        UserError: it can't be read, is empty, or isn't UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))
        raise UserError.single(str(path), reason) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        wrong = f"it isn't UTF-8 text (byte 0x{error.object[error.start]:02x})"
        raise UserError.single(f"{path}:{line}", wrong, "save it as UTF-8") from None
    if not text.strip():
        raise UserError.single(str(path), "the file is empty")
    return text


def _table(path: Path, reading: _Reading) -> Iterator[tuple[int, str | None, Mapping[str, Any]]]:
    """The entries of a JSON table: line 0, name, fields."""
    text = _text(path)
    try:
        content = json.loads(text, object_pairs_hook=reading.hook)
    except json.JSONDecodeError as error:
        advice = "name a file with one object a line .jsonl" if error.msg == "Extra data" else ""
        where, wrong = f"{path}:{error.lineno}", f"isn't valid JSON: {error.msg} (column {error.colno})"
        raise UserError.single(where, wrong, advice) from None
    except RecursionError:
        raise UserError.single(str(path), "isn't metadata: tables within tables without end") from None
    if not isinstance(content, dict):
        raise UserError.single(str(path), f"it holds {kind(content)}", f"write a table like {_METADATA_TABLE}")
    for table, key in reading.repeated:
        if table is content:
            reading.complain(0, key, f'"{some([key])}" stands twice', "keep one of them")
    for name, entry in content.items():
        if isinstance(entry, dict):
            for key in reading.take_repeated(entry) if reading.repeated else ():
                reading.complain(0, name, f'{key} stands twice in "{some([name])}"', "keep one of them")
            yield 0, name, entry
        else:
            reading.complain(0, name, f"{some([name])} is {kind(entry)}, not a table", "write {...} with its caption")


def _lines(path: Path, reading: _Reading) -> Iterator[tuple[int, str | None, Mapping[str, Any]]]:
    """The entries of a JSONL file: line, None, fields. Blank lines are passed over."""
    decoder = json.JSONDecoder(object_pairs_hook=reading.hook)
    for number, raw in enumerate(_text(path).split("\n"), 1):
        line = raw.strip()
        if not line:
            continue
        try:
            entry, end = decoder.raw_decode(line)
            wrong = "" if end == len(line) else f"more than one JSON object on a line (column {end + 1})"
        except json.JSONDecodeError as error:
            entry, wrong = None, f"isn't valid JSON: {error.msg} (column {error.colno})"
        except RecursionError:
            entry, wrong = None, "lists within lists without end"
        if wrong:
            advice = "name a file that is one table .json" if number == 1 and line in ("{", "[") else ""
            reading.complain(number, None, wrong, advice)
        elif not isinstance(entry, dict):
            reading.complain(number, None, f"holds {kind(entry)}, not a table")
        else:
            for key in reading.take_repeated(entry) if reading.repeated else ():
                reading.complain(number, None, f"{key} stands twice on a line", "keep one of them")
            reading.repeated.clear()
            yield number, None, entry


def _key_lines(file: Path) -> dict[str, int]:
    """The line of each picture's entry in a JSON table. Slow, so only for messages."""
    if file.suffix.lower() == ".jsonl":
        return {}
    return {str(path[0]): line for path, line in json_lines(_text(file)).items() if len(path) == 1}
