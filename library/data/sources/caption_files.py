"""Which caption file belongs to a picture, which extension such files have, and captions from names of pictures.

A caption is `<base><extension>`, or, for the names that face detection writes, the base without its last four `_`
pieces. What is in the files is read elsewhere (data.sources.shelves), what becomes of it, too (data.captions).
"""

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass

from library.data.faces import face_of
from library.data.sources.listing import Findings
from library.data.sources.picture_files import SHOWN, some
from library.errors import Problem
from library.options.specs import SubsetSpec

CAPTION_EXTENSIONS = (".txt", ".caption", ".captions", ".cap", ".tags", ".tag", ".text")
"""Where captions are looked for when the extension that was asked for finds none."""
_FACE_PIECES = 4


@dataclass(frozen=True)
class Place:
    """Pictures of a subset that lie in one folder: names of all files there, and the pictures' own names."""

    names: Set[str]
    pictures: Sequence[str]


def find_caption_files(spec: SubsetSpec, places: Sequence[Place], findings: Findings) -> list[list[str | None]]:
    """The name of each picture's caption file, place by place; None if it has none.

    The extension that counts is the one that was asked for, or `.txt` if none was named and only such files are there.
    """
    asked = spec.caption_extension if spec.caption_extension.startswith(".") else f".{spec.caption_extension}"
    found = [_find(place, asked) for place in places]
    if any(file is not None for files in found for file in files):
        _notice_shared_files(spec, places, found, findings)
        return found
    there = {}
    for extension in CAPTION_EXTENSIONS:
        others = [] if extension == asked else [_find(place, extension) for place in places]
        if count := sum(file is not None for files in others for file in files):
            there[extension] = (count, others)
    if not there:
        return found
    listed = ", ".join(f"{count} {extension}" for extension, (count, _) in there.items())
    if spec.caption_extension_named:
        wrong = f"no picture in {spec.image_dir} has a {asked} caption, but there are {listed}"
        advice = f"use --caption_extension {next(iter(there))}"
        findings.problems.append(Problem(spec.where or str(spec.image_dir), wrong, advice))
        return found
    if ".txt" in there:
        count, others = there[".txt"]
        findings.notices.append(f"{spec.image_dir}: no {asked} captions; its {count} .txt files are used")
        _notice_shared_files(spec, places, others, findings)
        return others
    findings.notices.append(f"{spec.image_dir}: no {asked} captions, but {listed}: name them with --caption_extension")
    return found


def caption_from_name(key: str) -> str:
    """The words of a picture's file name: without folder, extension and the numbers of a face, `_` read as a space."""
    base = _base(key.rpartition("/")[2])
    if face_of(key) is not None:
        base = base.rsplit("_", _FACE_PIECES)[0]
    return " ".join(base.replace("_", " ").split())


def _find(place: Place, extension: str) -> list[str | None]:
    """The caption file of each picture."""
    names = place.names
    if not any(name.endswith(extension) for name in names):
        return [None] * len(place.pictures)
    found: list[str | None] = []
    for picture in place.pictures:
        base = _base(picture)
        file: str | None = base + extension
        if file not in names:
            file = None
            if base.count("_") >= _FACE_PIECES:
                shorter = base.rsplit("_", _FACE_PIECES)[0] + extension
                file = shorter if shorter in names else None
        found.append(file)
    return found


def _notice_shared_files(
    spec: SubsetSpec, places: Sequence[Place], found: Sequence[Sequence[str | None]], findings: Findings
) -> None:
    """Name pictures that differ only in their extensions; the faces of one picture share a caption on purpose."""
    shared: list[list[str]] = []
    for place, files in zip(places, found, strict=True):
        if len(set(files) - {None}) == len(files) - files.count(None):
            continue
        same: dict[str, list[str]] = defaultdict(list)
        for name, file in zip(place.pictures, files, strict=True):
            if file is not None:
                same[_base(name)].append(name)
        shared += [names for names in same.values() if len(names) > 1]
    for names in shared[:SHOWN]:
        told = " and ".join(some([name]) for name in names)
        findings.notices.append(f"{spec.image_dir}: {told} share one caption file")
    if len(shared) > SHOWN:
        findings.notices.append(f"{spec.image_dir}: {len(shared) - SHOWN} more caption files are shared by pictures")


def _base(name: str) -> str:
    """A file's name without its extension; `Path` would take a third of the time of a scan."""
    return name.rpartition(".")[0]
