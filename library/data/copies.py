"""Pictures that a tool copies from one folder to another, changed or not, and the small files that belong to them."""

from collections.abc import Callable, Iterator
from pathlib import Path

from library.data.sources.images import EXTENSIONS
from library.data.whole_files import write_whole
from library.errors import UserError

CACHES = (".npz", ".safetensors")
"""Files beside a picture that hold what was computed from it."""


def pictures_in(src: Path, dst: Path, recursive: bool) -> Iterator[Path]:
    """The pictures of a folder by name, without those that lie in `dst`, where copies go."""
    written = dst.resolve()
    for path in sorted(src.rglob("*") if recursive else src.iterdir()):
        if path.suffix.lower() in EXTENSIONS and path.is_file() and written not in path.resolve().parents:
            yield path


def same_stem(folder: Path, stem: str) -> list[Path]:
    """What lies in a folder under a name without its ending."""
    return sorted(path for path in folder.glob("*") if path.stem == stem) if folder.is_dir() else []


def sidecars(picture: Path) -> list[Path]:
    """Files beside a picture that bear its name, such as captions; other pictures and caches are no part of it."""
    return [
        path
        for path in same_stem(picture.parent, picture.stem)
        if path.suffix.lower() not in (*EXTENSIONS, *CACHES) and path.is_file()
    ]


def write_copy(content: Callable[[], bytes], target: Path, overwrite: bool) -> bool:
    """Write a file, whole or not at all; False if it is there already and stays.

    Raises:
        UserError: it can't be read or written.
    """
    if target.exists() and not overwrite:
        return False
    try:
        data = content()
    except OSError as error:
        raise UserError.single(str(error.filename or target), f"can't be read ({error.strerror or error})") from error
    write_whole(target, data)
    return True
