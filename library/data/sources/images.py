"""What the header and the end of a picture file tell: its upright size, and whether it is whole. Nothing is decoded.

Ordinary files are read by data.sources.fast_headers, all others by Pillow. Damage inside the compressed data is found
when the picture is decoded, by `decode` or by data.pixels. What was found before is remembered by data.sources.index.
"""

import importlib
import os
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from library.data.sources import fast_headers
from library.data.sources.fast_headers import HEAD_BYTES, ORIENTATION_TAG, PNG_END, TAIL_BYTES

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
_READING = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
"""A pipe that is named like a picture must not make anybody wait."""

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


def probe(path: Path | str) -> Header | Damage:
    """Read the header of one picture and look at the end of its file."""
    try:
        descriptor = os.open(path, _READING)
    except (OSError, ValueError) as error:
        return Damage(f"can't be read: {getattr(error, 'strerror', None) or error}")
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return Damage("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not an ordinary file")
        if status.st_size == 0:
            return Damage("the file is empty")
        found = fast_headers.read(descriptor, os.read(descriptor, HEAD_BYTES), status.st_size)
    except OSError as error:
        return Damage(f"can't be read: {error.strerror or error}")
    finally:
        os.close(descriptor)
    return _ask_pillow(path) if found is None else _header(*found, status.st_size)


def _header(width: int, height: int, orientation: int, length: int) -> Header:
    """The header of a picture that is stored as `width` x `height`."""
    return Header((height, width) if orientation >= 5 else (width, height), orientation, length)


def _ask_pillow(path: Path | str) -> Header | Damage:
    try:
        with Path(path).open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            damage = _truncation(file, length)
            if damage is not None:
                return damage
            file.seek(0)
            with open_image(file) as image:
                width, height = image.size
                orientation = _orientation(image, file, length)
    except Exception as error:
        damage = damage_of(error)
        if damage is None:
            raise
        return damage
    if width < 1 or height < 1:
        return Damage("a picture without pixels")
    return _header(width, height, orientation, length)


def decode(path: Path | str) -> Damage | None:
    """Decode one picture and forget it: what is wrong with its data, which no header tells."""
    try:
        with Path(path).open("rb") as file, open_image(file) as image:
            image.load()
    except Exception as error:
        damage = damage_of(error)
        if damage is None:
            raise
        return damage
    return None


def damage_of(error: Exception) -> Damage | None:
    """What an error of Pillow's says about a picture; None for errors that no picture can cause."""
    if isinstance(error, UnidentifiedImageError):
        return Damage("not a picture in a format that can be read, whatever its name says")
    if isinstance(error, Image.DecompressionBombError):
        return Damage("more than 178 million pixels", "scale it down")
    if isinstance(error, OSError):
        return Damage(f"can't be read: {error.strerror or error}")
    if isinstance(error, BROKEN_HEADER):
        return Damage(f"its data is damaged ({error})")
    return None


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
    file.seek(max(0, length - len(PNG_END)))
    if file.read() == PNG_END:
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
