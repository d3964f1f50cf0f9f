"""What the header and the end of a picture file tell: its upright size, and whether it is whole. Nothing is decoded.

Damage inside the compressed data is found when the picture is decoded (data.pixels), not here.
"""

import importlib
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

PLUGINS = {
    "PNG": "PIL.PngImagePlugin",
    "JPEG": "PIL.JpegImagePlugin",
    "WEBP": "PIL.WebPImagePlugin",
    "BMP": "PIL.BmpImagePlugin",
    "GIF": "PIL.GifImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "JXL": "pillow_jxl",
}
"""What Pillow may try, whatever the name says (a GIF named .png is a picture), and the module that reads it."""
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
"""Names that are taken as pictures, in any case."""
ORIENTATION_TAG = 0x0112
TAIL_BYTES = 16384
BROKEN_HEADER = (
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
)
"""What the readers of formats raise on damaged headers, besides `OSError`."""
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Header:
    """A readable picture: upright (width, height), EXIF orientation 1..8, length of the file in bytes."""

    size: tuple[int, int]
    orientation: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that can't be used, and why."""

    wrong: str
    advice: str = "replace or remove it"


def probe(path: Path) -> Header | Damage:
    """Read the header of one picture and look at the end of its file."""
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length == 0:
                return Damage("the file is empty")
            damage = _truncation(file, length)
            if damage is not None:
                return damage
            file.seek(0)
            with open_image(file) as image:
                width, height = image.size
                orientation = _orientation(image, file, length)
    except UnidentifiedImageError:
        return Damage("not a picture in a format that can be read, whatever its name says")
    except Image.DecompressionBombError:
        return Damage("more than 178 million pixels", "scale it down")
    except OSError as error:
        return Damage(f"can't be read: {error.strerror or error}")
    except BROKEN_HEADER as error:
        return Damage(f"its header is damaged ({error})")
    if width < 1 or height < 1:
        return Damage("a picture without pixels")
    upright = (height, width) if orientation >= 5 else (width, height)
    return Header(upright, orientation, length)


def probe_all(paths: Sequence[Path], threads: int) -> list[Header | Damage]:
    """`probe` of every path, in order, by up to `threads` threads."""
    if threads <= 1 or len(paths) < 8:
        return [probe(path) for path in paths]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(probe, paths, chunksize=16))


def open_image(file: BinaryIO) -> Image.Image:
    """A picture of which only the header was read.

    Raises:
        UnidentifiedImageError, OSError, or an error of the format's reader: no picture, or a damaged one.
    """
    return Image.open(file, formats=_formats())


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats whose modules are installed; imported here alone, since Pillow's own search imports all it has."""
    found = []
    for name, module in PLUGINS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        if name in Image.OPEN:
            found.append(name)
    return tuple(found)


def _orientation(image: Image.Image, file: BinaryIO, length: int) -> int:
    """The EXIF orientation, 1 if there is none. A PNG may hold its EXIF data behind the pixels."""
    if image.format == "PNG" and "exif" not in image.info and b"eXIf" in _tail(file, length):
        image.load()
    value = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _tail(file: BinaryIO, length: int) -> bytes:
    position = file.tell()
    file.seek(max(0, length - TAIL_BYTES))
    data = file.read()
    file.seek(position)
    return data


def _truncation(file: BinaryIO, length: int) -> Damage | None:
    """The damage of a PNG, JPEG, WebP or BMP file whose end is missing; None for whole files and other formats."""
    head = file.read(64)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        whole = _png_is_whole(file, length)
    elif head.startswith(b"\xff\xd8"):
        whole = _jpeg_is_whole(file, length)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        whole = length >= int.from_bytes(head[4:8], "little") + 8
    elif head[:2] == b"BM":
        whole = _bmp_is_whole(head, length)
    else:
        return None
    return None if whole else Damage("the file is truncated: its end is missing")


def _png_is_whole(file: BinaryIO, length: int) -> bool:
    """The end chunk is there: as the last bytes, or found by walking the chunks when something was appended."""
    file.seek(max(0, length - len(_PNG_END)))
    if file.read() == _PNG_END:
        return True
    position = 8
    while position + 12 <= length:
        file.seek(position)
        size, kind = struct.unpack(">I4s", file.read(8))
        position += 12 + size
        if kind == b"IEND":
            return position <= length
    return False


def _jpeg_is_whole(file: BinaryIO, length: int) -> bool:
    """The end marker is there: as the last bytes but for padding, or found by walking the segments."""
    file.seek(max(0, length - 1024))
    if file.read().rstrip(b"\0\r\n ").endswith(b"\xff\xd9"):
        return True
    file.seek(0)
    data = file.read()
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 1 >= length:
            return False
        marker = data[position + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _bmp_is_whole(head: bytes, length: int) -> bool:
    """All rows of an uncompressed bitmap are there; other kinds aren't judged."""
    start, header_size = struct.unpack_from("<I", head, 10)[0], struct.unpack_from("<I", head, 14)[0]
    if header_size < 40:
        return length >= start
    width, height, _, depth, compression = struct.unpack_from("<iiHHI", head, 18)
    if compression not in (0, 3):
        return length >= start
    return bool(length >= start + (width * depth + 31) // 32 * 4 * abs(height))
