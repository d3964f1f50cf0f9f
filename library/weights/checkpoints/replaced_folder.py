"""A diffusers folder copied with some of its weights written anew: made under another name, then renamed, so that it is
there whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from library.errors import Problem, UserError
from library.models import folder
from library.models.families import Part
from library.models.info import PartInfo
from library.models.pickles import SUFFIXES
from library.weights.outputs import folder_problems, inside_problems, new_folder

_WEIGHTS = (".safetensors", *SUFFIXES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb")
_INDEX_MARK = ".index"
_NAMES = {"pytorch_model": "model"}


@dataclass(frozen=True)
class NewFolder:
    """The folder to come.

    Attributes:
        old: the folder that it is a copy of; new: where it is made.
    """

    old: Path
    new: Path

    def path_of(self, weights: Path) -> Path:
        """Where the new weights of a file of the old folder belong: pickles get the name of a safetensors file."""
        return self.new / weights.parent.relative_to(self.old) / _renamed(weights.name)


def _renamed(name: str) -> str:
    if name.endswith(".safetensors"):
        return name
    stem = name.rpartition(".")[0]
    first, dot, rest = stem.partition(".")
    base, dash, number = first.partition("-")
    return f"{_NAMES.get(base, base)}{dash}{number}{dot}{rest}.safetensors"


@contextmanager
def replaced_folder(old: Path, save_to: Path, parts: Mapping[Part, PartInfo]) -> Iterator[NewFolder]:
    """A copy of `old` that becomes `save_to` if the block ends without an error; the block writes the weights of
    `parts`.

    Of those parts' folders only configs are copied, not other variants of the same weights, which would be the old
    ones; the same holds for single files beside `model_index.json`.

    Raises:
        UserError: `save_to` is there already, or lies within `old`.
    """
    check_new_folder(old, save_to)
    with new_folder(save_to) as place:
        new = NewFolder(old, place)
        shutil.copytree(old, new.new, ignore=_skipping(old, parts))
        for part in parts:
            _copy_index(old / part, new.new / part, part)
        yield new


def copied_size(old: Path, parts: Iterable[Part]) -> int:
    """The bytes of the files that `replaced_folder` copies."""
    skipped, size = _skipping(old, parts), 0
    for place, folders, files in os.walk(old):
        left = skipped(place, [*folders, *files])
        folders[:] = [name for name in folders if name not in left]
        size += sum((Path(place) / name).stat().st_size for name in files if name not in left)
    return size


def _skipping(old: Path, parts: Iterable[Part]) -> Callable[[str, list[str]], set[str]]:
    """Which of the names in a folder aren't copied, as `shutil.copytree` asks for them."""
    replaced = {old / part for part in parts}

    def skipped(place: str, names: list[str]) -> set[str]:
        folder_of = Path(place)
        if folder_of == old:
            return {name for name in names if name.endswith(_WEIGHTS) or name.startswith(".")}
        if folder_of in replaced:
            return {name for name in names if name.endswith(_WEIGHTS) or _INDEX_MARK in name}
        return set()

    return skipped


def check_new_folder(old: Path, save_to: Path) -> None:
    """Refuse a place that a new folder can't be put to.

    Raises:
        UserError: so.
    """
    if problems := list(new_folder_problems(old, save_to)):
        raise UserError(problems)


def new_folder_problems(old: Path, save_to: Path) -> Iterator[Problem]:
    """What speaks against a place for a new folder that is made of `old`."""
    if save_to.suffix in _WEIGHTS:
        wrong = f"is the name of a file, but {old} is a folder"
        yield Problem(f"--save_to {save_to}", wrong, "give the name of a new folder")
    else:
        yield from folder_problems(save_to, "--save_to")
        yield from inside_problems(old, save_to, "--save_to")


def _copy_index(old: Path, new: Path, part: Part) -> None:
    """The table of a part's shards, with their new names."""
    names = {entry.name for entry in old.iterdir()}
    chosen = folder.weight_file(names, part, None)
    if chosen is None or not chosen.endswith(".json"):
        return
    table = folder.read_json(old / chosen, str(old))
    table["weight_map"] = {name: _renamed(str(file)) for name, file in table["weight_map"].items()}
    stem, _, tail = chosen.partition(".")
    target = f"{_NAMES.get(stem, stem)}.{tail.replace('bin', 'safetensors', 1)}"
    (new / target).write_text(json.dumps(table, indent=2, sort_keys=True), encoding="utf-8")
