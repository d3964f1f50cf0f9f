"""Mask pictures: which one belongs to which picture, and whether it fits. Its pixels are read by data.pixels.

A mask has its picture's name, with any picture extension, in the folder of masks; or the source names it.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from library.data.sources.images import Damage
from library.data.sources.listing import Findings, Listed
from library.data.sources.picture_files import Folders, shortened, some
from library.data.sources.reading import LateBar
from library.data.sources.shelves import Shelves
from library.errors import Problem
from library.options.specs import SubsetSpec


@dataclass(frozen=True, slots=True)
class Masked:
    """A picture by the path that messages name, its upright (width, height) in pixels, and the path of its mask."""

    picture: str
    size: tuple[int, int]
    mask: str


def pair_masks(spec: SubsetSpec, pictures: Sequence[Listed], findings: Findings) -> dict[str, str]:
    """The absolute path of the mask in `spec.mask_dir` for each picture, by key; nothing without such a folder.

    A folder in `spec.mask_dir` that is named like the subset's folder is used in its place. Pictures in sub-folders
    have their masks in sub-folders of the same names, pictures from elsewhere directly in the folder. Pictures whose
    mask the source names are passed over. Missing and ambiguous masks become problems, masks without a picture a
    notice.
    """
    if spec.mask_dir is None:
        return {}
    where = spec.where or str(spec.image_dir)
    pictures_folder = spec.image_dir.resolve()
    own = spec.mask_dir.resolve() / pictures_folder.name
    base = str(own if own.is_dir() and own != pictures_folder else own.parent)
    if base == str(pictures_folder):
        wrong = f"{base} can't be the folder of masks, because it is the folder of the pictures"
        findings.problems.append(Problem(where, wrong, "keep masks in a folder of their own"))
        return {}
    folders = Folders()
    if folders[base].wrong:
        wrong = f"the folder of masks {base} can't be read: {folders[base].wrong}"
        findings.problems.append(Problem(where, wrong, "name the folder that holds the mask pictures"))
        return {}
    found: dict[str, str] = {}
    missing: list[str] = []
    ambiguous: list[str] = []
    for picture in pictures:
        if picture.mask is not None:
            continue
        inner, _, name = picture.key.rpartition("/")
        folder = folders[base if not inner or picture.key.startswith("/") else f"{base}/{inner}"]
        masks = folder.of_stem(name.rpartition(".")[0])
        if len(masks) == 1:
            found[picture.key] = f"{folder.path}/{masks[0]}"
        elif masks:
            ambiguous.append(f"{picture.key} ({some(masks)})")
        else:
            missing.append(picture.key)
    if missing:
        wrong = f"pictures without a mask in {base} ({len(missing)} of {len(pictures)}): {some(missing)}"
        findings.problems.append(Problem(where, wrong, "put a picture of the same name there for each of them"))
    if ambiguous:
        wrong = f"pictures with more than one mask in {base}: {some(ambiguous)}"
        findings.problems.append(Problem(where, wrong, "keep one of each"))
    _notice_unused(base, folders, set(found.values()), len(ambiguous), findings)
    return found


def _notice_unused(base: str, folders: Folders, used: set[str], ambiguous: int, findings: Findings) -> None:
    """One line about mask pictures that belong to no picture; not while it is unclear which ones do."""
    unused = sorted(
        f"{folder.path}/{name}"
        for folder in folders.listed.values()
        for name in folder.pictures
        if not name.startswith(".") and f"{folder.path}/{name}" not in used
    )
    if unused and not ambiguous:
        what = "1 mask belongs" if len(unused) == 1 else f"{len(unused)} masks belong"
        names = some([path.removeprefix(f"{base}/") for path in unused], 3)
        findings.notices.append(f"{base}: {what} to no picture: {names}")


def check_masks(
    wanted: Sequence[Masked], findings: Findings, *, threads: int = 1, shelves: Shelves | None = None
) -> list[int]:
    """The length in bytes of each mask's file, in order; 0 where it can't be used.

    Headers are read by up to `threads` threads, or come from the indexes of the masks' folders, which also know of
    damage that decoding has found; `shelves` are the folders that are open already. A mask that can't be read, or whose
    upright size isn't its picture's, is a problem; ten are told, the others counted.
    """
    opened = shelves or Shelves()
    places = [os.path.split(one.mask) for one in wanted]
    folders: dict[str, list[str]] = defaultdict(list)
    for folder, name in places:
        folders[folder].append(name)
    progress = LateBar("reading masks", len(wanted))
    for folder, names in folders.items():
        opened[folder].read_headers(names, threads=threads, progress=progress)
    progress.close()
    if shelves is None:
        opened.close()
    wrong: list[Problem] = []
    lengths: list[int] = []
    for one, (folder, name) in zip(wanted, places, strict=True):
        header = opened[folder].headers[name]
        lengths.append(0)
        if isinstance(header, Damage):
            wrong.append(Problem(one.mask, f"mask can't be used: {header.wrong}", header.advice))
        elif header.size != one.size:
            sizes = f"{_text(header.size)} pixels, but its picture {one.picture} has {_text(one.size)}"
            wrong.append(Problem(one.mask, f"mask has {sizes}", "a mask must be as large as its picture"))
        else:
            lengths[-1] = header.file_bytes
    findings.problems += shortened(wrong, "masks")
    return lengths


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
