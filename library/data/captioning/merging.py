"""Captions or tags of sidecar files, put into one metadata file beside what stands there already."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.console import say, track, warn
from library.data.captioning.metadata_files import Table, key_of, problem_with_output, read_table, write_table
from library.data.sources.folders import list_pictures
from library.data.sources.shelves import read_caption
from library.errors import Problem, UserError

Field = Literal["caption", "tags"]
_SHOWN = 5


@dataclass(frozen=True)
class Merge:
    """What is merged.

    Attributes:
        field: of the entries.
        source: the metadata that are amended; None takes `output` if it is there.
        extension: of the sidecar files.
        full_path: keys are paths, as `folder` is written, instead of names without their ending.
        debug: tell every entry.
    """

    folder: Path
    output: Path
    field: Field
    extension: str
    source: Path | None = None
    full_path: bool = False
    recursive: bool = False
    debug: bool = False


def asked(given: argparse.Namespace, field: Field) -> Merge:
    """What the flags of `flags.add_merging` say."""
    extension = given.caption_extension if given.caption_extension.startswith(".") else f".{given.caption_extension}"
    return Merge(
        folder=given.train_data_dir,
        output=given.out_json,
        field=field,
        extension=extension,
        source=given.in_json,
        full_path=given.full_path,
        recursive=given.recursive,
        debug=given.debug,
    )


def merge(wish: Merge) -> Table:
    """Write `wish.output` and return its entries. A picture without such a file keeps the entry that it has.

    Raises:
        UserError: a flag is wrong, there are no pictures, none of them has such a file, one can't be read, or two
            pictures have one name.
    """
    _check(wish)
    keys = list_pictures(wish.folder, recursive=wish.recursive).keys
    if not keys:
        advice = "" if wish.recursive else "with --recursive and --full_path, inner folders count too"
        raise UserError.single(str(wish.folder), "no pictures there", advice)
    source = wish.source or (wish.output if wish.output.is_file() else None)
    table = read_table(source) if source else {}
    found: dict[str, str] = {}
    missing: list[str] = []
    problems: list[Problem] = []
    for key in track(keys, f"reading {wish.field}", len(keys)):
        picture = wish.folder / key
        file = picture.with_suffix(wish.extension)
        if not file.is_file():
            missing.append(key)
            continue
        name = key_of(table, picture, wish.folder) or (str(picture) if wish.full_path else picture.stem)
        text = read_caption(str(file))
        if isinstance(text, Problem):
            problems.append(text)
        elif name in found:
            problems.append(Problem(str(picture), "another picture has the same name", "use --full_path"))
        else:
            found[name] = text
    if not found and not problems:
        raise UserError.single(str(wish.folder), f"no picture has a {wish.extension} file", "see --caption_extension")
    if problems:
        raise UserError(problems)
    for name, text in found.items():
        table.setdefault(name, {})[wish.field] = text
        if wish.debug:
            say(f"{name}: {text}")
    write_table(wish.output, table)
    if missing:
        listed = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        warn(f"{len(missing)} of {len(keys)} pictures have no {wish.extension} file: {listed}")
    kept = f", {len(table) - len(found)} others kept" if len(table) > len(found) else ""
    say(f"{wish.field} of {len(found)} pictures written to {wish.output}{kept}")
    return table


def _check(wish: Merge) -> None:
    problems = []
    if not wish.folder.is_dir():
        problems.append(Problem("FOLDER", f"there is no folder {wish.folder}"))
    if wish.recursive and not wish.full_path:
        problems.append(Problem("--recursive", "needs --full_path, because names of different folders may be the same"))
    if output := problem_with_output(wish.output, "OUT"):
        problems.append(output)
    if wish.source is not None and not wish.source.is_file():
        problems.append(Problem("--in_json", f"there is no file {wish.source}"))
    if problems:
        raise UserError(problems)
