"""Find faces and copy each picture under a name that tells where its face is: what face crop reads.

    python tools/detect_faces.py SRC DST [--model face_detection_yunet_2023mar.onnx]

`cat.png` becomes `cat_0201_0113_0095_0095.png`: centre (x, y), width and height of the face in pixels of the upright
picture. Files are copied byte by byte; only a picture that its EXIF data turns is saved anew, upright. Captions and
other small files of the same name go with it. Faces are found by OpenCV: by a YuNet model if one is given, else by the
Haar cascade that comes with OpenCV 4, which knows photographed faces seen from the front.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import local

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
from PIL import ImageOps

from library import console
from library.data.ahead import ahead
from library.data.copies import pictures_in, same_stem, sidecars, write_copy
from library.data.faces import Face, name_with
from library.data.pixels import Pixels, decoded, resize
from library.data.records import ImageRecord
from library.data.sources.images import EXTENSIONS, Damage, open_image, probe
from library.errors import Problem, UserError

CASCADE = "haarcascade_frontalface_default.xml"
NEIGHBOURS = 6
SCORE = 0.8
LOOKED_AT = 1024
"""Longer side in pixels at which faces are looked for; larger pictures are shrunk to it."""
SMALLEST = 24
JPEG_QUALITY = 95

Detect = Callable[[Pixels], list[Face]]


@dataclass(frozen=True)
class Found:
    """A picture and its faces, largest first; `wrong` says why it can't be read."""

    path: Path
    orientation: int = 1
    faces: tuple[Face, ...] = ()
    wrong: str = ""


@dataclass(frozen=True)
class Copied:
    """What became of one picture: how many files were written, and how many were there already."""

    written: int = 0
    kept: int = 0


def setup_parser() -> argparse.ArgumentParser:
    """The options of this tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of pictures")
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to copy them to; made if it isn't there")
    parser.add_argument("--model", type=Path, metavar="FILE", help="YuNet model (.onnx); better than the cascade")
    parser.add_argument("--recursive", action="store_true", help="pictures of folders inside SRC too")
    parser.add_argument(
        "--multiple_faces",
        choices=("largest", "each", "skip"),
        default="largest",
        help="of several faces: name the largest, write a file for each, or leave the picture out (default: largest)",
    )
    parser.add_argument("--without_face", choices=("skip", "copy"), default="skip", help="pictures without a face")
    parser.add_argument(
        "--min_size", type=int, default=0, metavar="N", help="faces with a shorter longer side don't count"
    )
    parser.add_argument(
        "--padding", type=float, default=0.0, metavar="F", help="grow faces by this part of their size on each side"
    )
    parser.add_argument("--mask_dir", type=Path, metavar="DIR", help="folder of mask pictures with the same names")
    parser.add_argument("--mask_dst", type=Path, metavar="DIR", help="folder to copy the masks to")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Detect, copy, say what was found; returns the exit code."""
    arguments = setup_parser().parse_args(argv)
    try:
        _run(arguments)
    except UserError as error:
        for problem in error.problems:
            console.error(str(problem))
        return 2
    except KeyboardInterrupt:
        console.say("stopped; what was copied stays")
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    detector(arguments.model)
    pictures = list(pictures_in(arguments.src, arguments.dst, arguments.recursive))
    if not pictures:
        raise UserError.single(str(arguments.src), "no pictures there", "with --recursive, inner folders count too")
    look = partial(look_at, finder=_PerThread(arguments.model), min_size=arguments.min_size, padding=arguments.padding)
    done: list[tuple[Found, Copied]] = []
    depth = 2 * arguments.threads
    with closing(ahead(look, pictures, threads=arguments.threads, depth=depth)) as found:
        for one in console.track(found, "faces", len(pictures)):
            if one.wrong:
                console.warn(f"{one.path}: {one.wrong}; left out")
            done.append((one, copy(one, arguments)))
    readable = [one for one, _ in done if not one.wrong]
    counts = [sum(len(one.faces) == number for one in readable) for number in (0, 1)]
    console.say(
        f"{len(pictures)} pictures: {counts[1]} with one face, {len(readable) - sum(counts)} with several, "
        f"{counts[0]} without, {len(pictures) - len(readable)} unreadable"
    )
    written, kept = sum(copied.written for _, copied in done), sum(copied.kept for _, copied in done)
    console.say(f"{written} files written to {arguments.dst}")
    if kept:
        console.warn(f"{kept} files were there already and stay as they are; --overwrite replaces them")


def _check(arguments: argparse.Namespace) -> None:
    problems = []
    if not arguments.src.is_dir():
        problems.append(Problem("SRC", f"there is no folder {arguments.src}"))
    elif arguments.dst.resolve() == arguments.src.resolve():
        problems.append(Problem("DST", "is the same folder as SRC", "name another one"))
    if (arguments.mask_dir is None) != (arguments.mask_dst is None):
        problems.append(Problem("--mask_dir", "goes together with --mask_dst", "give both or neither"))
    elif arguments.mask_dir is not None and not arguments.mask_dir.is_dir():
        problems.append(Problem("--mask_dir", f"there is no folder {arguments.mask_dir}"))
    if not 0 <= arguments.padding <= 10:
        problems.append(Problem("--padding", f"{arguments.padding} isn't between 0 and 10"))
    if arguments.threads < 1:
        problems.append(Problem("--threads", f"{arguments.threads} isn't 1 or more"))
    if problems:
        raise UserError(problems)


class _PerThread:
    """A detector for each thread: OpenCV's can't be shared."""

    def __init__(self, model: Path | None) -> None:
        self._model, self._own = model, local()

    def __call__(self, pixels: Pixels) -> list[Face]:
        if not hasattr(self._own, "detect"):
            self._own.detect = detector(self._model)
        faces: list[Face] = self._own.detect(pixels)
        return faces


def detector(model: Path | None) -> Detect:
    """What finds faces in RGB pixels, for one thread.

    Raises:
        UserError: the model can't be read, or no detector is there.
    """
    if model is not None:
        return partial(_by_yunet, _yunet(model))
    if not hasattr(cv2, "CascadeClassifier"):
        wrong = f"OpenCV {cv2.__version__} comes without a face detector"
        advice = "download YuNet from OpenCV's model zoo (face_detection_yunet_2023mar.onnx) and name it here"
        raise UserError.single("--model", wrong, advice)
    from cv2.data import haarcascades

    return partial(_by_cascade, cv2.CascadeClassifier(str(Path(haarcascades) / CASCADE)))


def _yunet(model: Path) -> "cv2.FaceDetectorYN":
    if not model.is_file():
        raise UserError.single("--model", f"there is no file {model}")
    try:
        return cv2.FaceDetectorYN.create(str(model), "", (320, 320), SCORE)
    except cv2.error as error:
        advice = "take face_detection_yunet_2023mar.onnx of OpenCV's model zoo"
        raise UserError.single("--model", f"{model} is no YuNet model that OpenCV can read", advice) from error


def _by_yunet(found: "cv2.FaceDetectorYN", pixels: Pixels) -> list[Face]:
    found.setInputSize(pixels.shape[1::-1])
    rows = found.detect(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1]
    return [_face(*(float(value) for value in row[:4])) for row in (() if rows is None else rows)]


def _by_cascade(found: "cv2.CascadeClassifier", pixels: Pixels) -> list[Face]:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    boxes = found.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=NEIGHBOURS, minSize=(SMALLEST, SMALLEST))
    return [_face(*(float(value) for value in box)) for box in boxes]


def _face(left: float, top: float, width: float, height: float) -> Face:
    return Face(round(left + width / 2), round(top + height / 2), round(width), round(height))


def look_at(path: Path, *, finder: Detect, min_size: int, padding: float) -> Found:
    """The faces of one picture, in pixels of the upright picture."""
    header = probe(path)
    if isinstance(header, Damage):
        return Found(path, wrong=header.wrong)
    record = ImageRecord(path.parent, path.name, header.size, header.orientation, "", False, 0, 0, 1, False)
    try:
        pixels = decoded(record, alpha=False).pixels
    except UserError as error:
        return Found(path, wrong=error.problems[0].wrong)
    scale = max(1.0, max(header.size) / LOOKED_AT)
    small = resize(pixels, (max(1, round(header.size[0] / scale)), max(1, round(header.size[1] / scale))))
    faces = [_grown(face, scale, padding, header.size) for face in finder(small)]
    faces = [face for face in faces if max(face.w, face.h) >= max(1, min_size) and min(face.w, face.h) > 0]
    faces.sort(key=lambda face: (-face.w * face.h, face.cx, face.cy))
    return Found(path, header.orientation, tuple(faces))


def _grown(face: Face, scale: float, padding: float, size: tuple[int, int]) -> Face:
    """A face in pixels of the whole picture, padded, cut at the picture's edges."""
    spans = []
    for middle, length, side in ((face.cx, face.w, size[0]), (face.cy, face.h, size[1])):
        reach = length * (0.5 + padding)
        start, end = max(0.0, (middle - reach) * scale), min(float(side), (middle + reach) * scale)
        spans.append((round((start + end) / 2), max(0, round(end - start))))
    (cx, width), (cy, height) = spans
    return Face(cx, cy, width, height)


def copy(found: Found, arguments: argparse.Namespace) -> Copied:
    """Write what one picture becomes: itself and the files that belong to it, under each new name."""
    faces = found.faces
    skipped = (not faces and arguments.without_face == "skip") or (
        len(faces) > 1 and arguments.multiple_faces == "skip"
    )
    if found.wrong or skipped:
        return Copied()
    stem = found.path.stem
    stems = [name_with(stem, face) for face in faces[:1]] or [stem]
    if len(faces) > 1 and arguments.multiple_faces == "each":
        stems = [name_with(f"{stem}_{number:02d}", face) for number, face in enumerate(faces, 1)]
    inner = found.path.parent.relative_to(arguments.src)
    jobs: list[tuple[Callable[[], bytes], Path]] = []
    for new in stems:
        target = arguments.dst / inner / f"{new}{found.path.suffix}"
        jobs.append((partial(_upright_bytes, found), target))
        jobs += [(path.read_bytes, target.with_name(new + path.name[len(stem) :])) for path in sidecars(found.path)]
        if arguments.mask_dir is not None:
            masks = same_stem(arguments.mask_dir / inner, stem)
            folder = arguments.mask_dst / inner
            jobs += [
                (path.read_bytes, folder / f"{new}{path.suffix}") for path in masks if path.suffix.lower() in EXTENSIONS
            ]
    states = [write_copy(content, target, arguments.overwrite) for content, target in jobs]
    return Copied(states.count(True), states.count(False))


def _upright_bytes(found: Found) -> bytes:
    """The file as it is; a picture that is turned by its EXIF data, which may stand at the end, is saved upright."""
    data = found.path.read_bytes()
    if found.orientation == 1:
        return data
    target = io.BytesIO()
    with open_image(io.BytesIO(data)) as image:
        kind, colours = image.format, image.info.get("icc_profile")
        image.load()
        upright = ImageOps.exif_transpose(image)
        how = {"quality": JPEG_QUALITY, "subsampling": 0} if kind == "JPEG" else {"quality": JPEG_QUALITY}
        exif = upright.getexif()
        upright.save(target, format=kind, exif=exif, **({"icc_profile": colours} if colours else {}), **how)
    return target.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
