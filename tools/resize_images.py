"""Make pictures smaller: a copy of each for every size, in another folder.

    python tools/resize_images.py pictures small --max_resolution 512x512,384x384

`cat.png` becomes `cat+512x512.jpg` and `cat+384x384.jpg`. A size is a number of pixels, width times height: pictures
keep their aspect ratio, and none is enlarged. Every copy is made from the picture itself, upright. Files that are no
pictures are copied; captions and other files of a picture's name follow each of its copies with
--copy_associated_files.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    from library.data.shrinking import Shrink

_RESOLUTIONS = "512x512,384x384,256x256,128x128"
_INTERPOLATIONS = {"area": "area", "cubic": "cubic", "lanczos4": "lanczos", "nearest": "nearest", "linear": "linear"}
_INTERPOLATIONS |= {"lanczos": "lanczos", "box": "box"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("src_img_folder", type=Path, metavar="SRC", help="folder of pictures")
    found.add_argument("dst_img_folder", type=Path, metavar="DST", help="folder for the copies; made if it isn't there")
    found.add_argument(
        "--max_resolution", default=_RESOLUTIONS, metavar="WxH,...", help=f"sizes (default: {_RESOLUTIONS})"
    )
    found.add_argument("--divisible_by", type=int, default=1, metavar="N", help="cut sides to multiples (default: 1)")
    found.add_argument("--interpolation", choices=tuple(_INTERPOLATIONS), help="default: area")
    found.add_argument("--save_as_png", action="store_true", help="PNG, which keeps alpha, instead of JPEG")
    found.add_argument(
        "--copy_associated_files", action="store_true", help="copy captions and the like for each size, renamed"
    )
    found.add_argument("--recursive", action="store_true", help="pictures of folders inside SRC too")
    found.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    found.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after one line for each thing that is wrong, or where no picture could be read."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.tool_script import run

    return run(lambda: resize(given))


def resize(given: argparse.Namespace) -> None:
    """Write the copies.

    Raises:
        UserError: a flag is wrong, there are no pictures, or none of them can be read.
    """
    sizes = dict(_sizes(given))
    from library import console
    from library.data.ahead import ahead
    from library.data.copies import pictures_in, write_copy
    from library.errors import UserError

    src, dst = given.src_img_folder, given.dst_img_folder
    pictures = list(pictures_in(src, dst, given.recursive))
    if not pictures:
        raise UserError.single(str(src), "no pictures there", "with --recursive, inner folders count too")
    _check_names(pictures, src)
    work = partial(_copies, sizes=sizes, given=given)
    bad = written = kept = 0
    for wrong, states in console.track(
        ahead(work, pictures, threads=given.threads, depth=2 * given.threads), "resizing", len(pictures)
    ):
        if wrong:
            console.warn(wrong)
        bad, written, kept = bad + bool(wrong), written + states.count(True), kept + states.count(False)
    if bad == len(pictures):
        raise UserError.single(str(src), "none of its pictures can be read")
    for path in _other_files(src, dst, pictures, given):
        done = write_copy(path.read_bytes, dst / path.relative_to(src), given.overwrite)
        written, kept = written + done, kept + (not done)
    console.say(f"{len(pictures) - bad} pictures, {written} files written to {dst}" + _tail(bad, kept))


def _other_files(src: Path, dst: Path, pictures: Sequence[Path], given: argparse.Namespace) -> Iterator[Path]:
    """What is no picture and no cache, but for files that follow a picture."""
    from library.data.copies import CACHES, sidecars
    from library.data.sources.images import EXTENSIONS

    follow = {path for picture in pictures for path in sidecars(picture)} if given.copy_associated_files else set()
    written = dst.resolve()
    for path in sorted(src.rglob("*") if given.recursive else src.iterdir()):
        inside = written in path.resolve().parents
        if path.is_file() and not inside and path not in follow and path.suffix.lower() not in (*EXTENSIONS, *CACHES):
            yield path


def _tail(bad: int, kept: int) -> str:
    there = f"; {kept} were there already and stay (--overwrite replaces them)" if kept else ""
    return (f"; {bad} pictures can't be read and were left out" if bad else "") + there


def _sizes(given: argparse.Namespace) -> "Iterator[tuple[str, Shrink]]":
    """The sizes by the names that files get."""
    from library.errors import Problem, UserError

    src, dst, problems, sides = given.src_img_folder, given.dst_img_folder, [], {}
    if not src.is_dir():
        problems.append(Problem("SRC", f"there is no folder {src}"))
    elif dst.resolve() == src.resolve():
        problems.append(Problem("DST", "is the same folder as SRC", "name another one"))
    if dst.exists() and not dst.is_dir():
        problems.append(Problem("DST", f"{dst} is a file", "name a folder"))
    for text in given.max_resolution.split(","):
        numbers = text.strip().lower().split("x")
        if len(numbers) == 2 and all(number.isdecimal() and int(number) > 0 for number in numbers):
            sides[text.strip()] = int(numbers[0]) * int(numbers[1])
        else:
            problems.append(Problem("--max_resolution", f"{text!r} is no size", "write sizes like 512x512,384x384"))
    problems += [
        Problem(f"--{flag}", f"{getattr(given, flag)} isn't 1 or more")
        for flag in ("divisible_by", "threads")
        if getattr(given, flag) < 1
    ]
    if problems:
        raise UserError(problems)
    from library.data.shrinking import Shrink

    chosen = _INTERPOLATIONS[given.interpolation] if given.interpolation else "area"
    for name, most in sides.items():
        yield name, Shrink(most, given.divisible_by, chosen)


def _check_names(pictures: Sequence[Path], src: Path) -> None:
    """Pictures that differ in their endings only would become one file."""
    from library.errors import UserError

    seen: dict[Path, Path] = {}
    for path in pictures:
        other = seen.setdefault(path.with_suffix(""), path)
        if other is not path:
            names = f"{other.relative_to(src)} and {path.relative_to(src)}"
            raise UserError.single(str(src), f"{names} would get the same names", "rename one of them")


def _copies(path: Path, sizes: "dict[str, Shrink]", given: argparse.Namespace) -> tuple[str, list[bool]]:
    """What is wrong with a picture, and for each file whether it was written or is there already."""
    from library.data.copies import sidecars, write_copy
    from library.data.shrinking import encoded, read_whole, shrunk
    from library.errors import DamagedPictureError

    folder = given.dst_img_folder / path.parent.relative_to(given.src_img_folder)
    ending = ".png" if given.save_as_png else ".jpg"
    beside = sidecars(path) if given.copy_associated_files else []
    targets = {name: folder / f"{path.stem}+{name}{ending}" for name in sizes}
    try:
        due = given.overwrite or not all(target.exists() for target in targets.values())
        picture = read_whole(path) if due else None
    except DamagedPictureError as damage:
        return f"{damage.path}: {damage.why}; left out", []

    def content(name: str) -> Callable[[], bytes]:
        assert picture is not None
        return lambda: encoded(shrunk(picture, sizes[name]), path, png=given.save_as_png)

    states = [picture is not None and write_copy(content(name), targets[name], given.overwrite) for name in sizes]
    states += [
        write_copy(other.read_bytes, folder / f"{path.stem}+{name}{other.suffix}", given.overwrite)
        for name in sizes
        for other in beside
    ]
    return "", states


if __name__ == "__main__":
    sys.exit(main())
