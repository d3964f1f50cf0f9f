"""Upright size and orientation of ordinary PNG, JPEG, WebP and BMP files, read by `struct` from a few thousand bytes.

Many times as fast as Pillow, and no judge of its own: whatever is unusual, doubtful or broken is answered with None,
and Pillow decides (data.sources.images). Formats: PNG (ISO/IEC 15948), JPEG (ITU-T T.81), EXIF (CIPA DC-008), WebP (RFC
9649).
"""

import os
import struct
import zlib
from struct import Struct

Found = tuple[int, int, int]
"""Stored width and height in pixels, and EXIF orientation 1..8."""

HEAD_BYTES = 8192
TAIL_BYTES = 16384
"""How much of a PNG's end is searched for EXIF data behind the pixels."""
ORIENTATION_TAG = 0x0112
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_MOST_PIXELS = 89_478_485
"""Pillow looks at pictures of more itself."""
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_LENGTHS = {b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"tIME": 7}
_PNG_PLAIN = frozenset([b"PLTE", b"bKGD", b"sBIT", b"hIST"])
_PNG_TALKING = frozenset([b"exif", b"xmp", b"XML:com.adobe.xmp", b"Raw profile type exif"])
_LONG_CHUNK = 1 << 20
_IHDR = Struct(">I4sIIBBBBBI")
_CHUNK = Struct(">I4s")
_CRC = Struct(">I")
_SEGMENT = Struct(">BBH")
_FRAME = Struct(">BHHB")
_BMP = Struct("<I4xIIiiHHI")
_RIFF_CHUNK = Struct("<4sI")
_TIFF = {
    b"II*\0": (Struct("<I"), Struct("<H"), Struct("<HHII")),
    b"MM\0*": (Struct(">I"), Struct(">H"), Struct(">HHII")),
}
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_XMP = b"http://ns.adobe.com/xap/1.0/\0"


def read(descriptor: int, head: bytes, length: int) -> Found | None:
    """The facts of a whole, ordinary picture; None: ask Pillow.

    Args:
        descriptor: the open file.
        head: its first `HEAD_BYTES` bytes, or all of it.
        length: bytes of the file.
    """
    try:
        if head.startswith(_PNG_START):
            found = _png(descriptor, head, length)
        elif head.startswith(b"\xff\xd8\xff"):
            found = _jpeg(descriptor, head, length)
        elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            found = _webp(descriptor, head, length)
        elif head.startswith(b"BM"):
            found = _bmp(head, length)
        else:
            return None
    except (IndexError, struct.error, OSError):
        return None
    if found is None or found[0] < 1 or found[1] < 1 or found[0] * found[1] > _MOST_PIXELS:
        return None
    return found


def _piece(descriptor: int, head: bytes, start: int, count: int) -> bytes:
    """`count` bytes of the file from `start` on, fewer at its end."""
    if start + count <= len(head):
        return head[start : start + count]
    os.lseek(descriptor, start, os.SEEK_SET)
    return os.read(descriptor, count)


def _end(descriptor: int, head: bytes, length: int, count: int) -> bytes:
    """The last `count` bytes of the file, or all of a file that `head` holds."""
    return head if len(head) == length else _piece(descriptor, head, max(0, length - count), count)


def _png(descriptor: int, head: bytes, length: int) -> Found | None:
    size, kind, width, height, depth, colour, compression, filters, _, crc = _IHDR.unpack_from(head, 8)
    if (size, kind, compression, filters) != (13, b"IHDR", 0, 0) or depth not in _PNG_DEPTHS.get(colour, ()):
        return None
    if crc != zlib.crc32(head[12:29]):
        return None
    tail = _end(descriptor, head, length, TAIL_BYTES)
    if not tail.endswith(PNG_END):
        return None
    orientation: int | None = 1
    position = 33
    while True:
        size, kind = _CHUNK.unpack(_piece(descriptor, head, position, 8))
        if kind == b"IDAT":
            break
        if size > _LONG_CHUNK:
            return None
        chunk = _piece(descriptor, head, position + 4, size + 8)
        if _CRC.unpack_from(chunk, size + 4)[0] != zlib.crc32(chunk[: size + 4]):
            return None
        if kind == b"eXIf":
            if orientation != 1:
                return None
            orientation = exif_orientation(chunk[4:-4])
        elif not _png_chunk_is_plain(kind, size, chunk):
            return None
        if not orientation:
            return None
        position += 12 + size
    if b"eXIf" in tail and tail.find(b"eXIf", max(0, position - length + len(tail))) >= 0:
        return None
    return width, height, orientation or 1


def _png_chunk_is_plain(kind: bytes, size: int, chunk: bytes) -> bool:
    """Nothing in a chunk before the pixels tells of orientation, and no reader stumbles over it."""
    if kind == b"tEXt":
        return chunk[4:-4].partition(b"\0")[0] not in _PNG_TALKING
    if kind == b"iTXt":
        keyword, _, rest = chunk[4:-4].partition(b"\0")
        return keyword not in _PNG_TALKING and rest.startswith(b"\0\0")
    return kind in _PNG_PLAIN or _PNG_LENGTHS.get(kind) == size


def _jpeg(descriptor: int, head: bytes, length: int) -> Found | None:
    tail = _end(descriptor, head, length, 1024)
    if not tail.endswith(b"\xff\xd9") and not tail[-1024:].rstrip(b"\0\r\n ").endswith(b"\xff\xd9"):
        return None
    position, size, exif, told = 2, None, None, False
    while True:
        start, marker, count = _SEGMENT.unpack(_piece(descriptor, head, position, 4))
        if start != 0xFF or count < 2:
            return None
        if marker == 0xDA:
            break
        if marker in (0xC0, 0xC1, 0xC2):
            bits, height, width, layers = _FRAME.unpack(_piece(descriptor, head, position + 4, 6))
            if size is not None or bits != 8 or layers not in (1, 3, 4) or count != 8 + 3 * layers:
                return None
            size = width, height
        elif marker == 0xE1:
            data = _piece(descriptor, head, position + 4, count - 2)
            if data.startswith(b"Exif\0\0"):
                if exif is not None:
                    return None
                exif = data[6:]
            told |= data.startswith(_XMP) and b"tiff:Orientation" in data
        elif not _segment_is_plain(descriptor, head, position, marker, count - 2):
            return None
        position += 2 + count
    orientation = 1 if exif is None else exif_orientation(exif)
    if size is None or not orientation or told:
        return None
    return *size, orientation


def _segment_is_plain(descriptor: int, head: bytes, position: int, marker: int, count: int) -> bool:
    """A segment that says nothing about the size, and that no reader stumbles over."""
    if marker in (0xC4, 0xDD, 0xFE):
        return True
    if marker == 0xDB:
        tables = _piece(descriptor, head, position + 4, count)
        return count % 65 == 0 and all(tables[i] < 16 for i in range(0, count, 65))
    if not 0xE0 <= marker <= 0xEF:
        return False
    start = _piece(descriptor, head, position + 4, min(count, 16))
    if marker == 0xE2:
        return len(start) >= 14 and not start.startswith(b"MPF\0")
    return not (marker == 0xED or (marker in (0xE0, 0xEE) and len(start) < 7))


def _webp(descriptor: int, head: bytes, length: int) -> Found | None:
    end = 8 + int.from_bytes(head[4:8], "little")
    kind, count = _RIFF_CHUNK.unpack_from(head, 12)
    if end > length or 20 + count > end:
        return None
    if kind in (b"VP8 ", b"VP8L"):
        size = _webp_frame(kind, head, 20)
        return None if size is None or end - (20 + count) > 1 else (*size, 1)
    if kind != b"VP8X" or count != 10 or head[20] & ~0x38:
        return None
    canvas = 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    orientation: int | None = 1
    position, pixels = 30, None
    while position + 8 <= end:
        kind, count = _RIFF_CHUNK.unpack(_piece(descriptor, head, position, 8))
        if position + 8 + count > end:
            return None
        if kind in (b"VP8 ", b"VP8L"):
            if pixels is not None:
                return None
            pixels = _webp_frame(kind, _piece(descriptor, head, position + 8, 10), 0)
        elif kind == b"EXIF":
            if orientation != 1:
                return None
            orientation = exif_orientation(_piece(descriptor, head, position + 8, count).removeprefix(b"Exif\0\0"))
        elif kind not in (b"ICCP", b"ALPH"):
            return None
        position += 8 + count + count % 2
    return None if pixels != canvas or not orientation else (*canvas, orientation)


def _webp_frame(kind: bytes, data: bytes, start: int) -> tuple[int, int] | None:
    """Width and height in the first bytes of a lossy or lossless frame."""
    if kind == b"VP8 ":
        if data[start] & 1 or data[start + 3 : start + 6] != b"\x9d\x01\x2a":
            return None
        width, height = struct.unpack_from("<HH", data, start + 6)
        return width & 0x3FFF, height & 0x3FFF
    if data[start] != 0x2F:
        return None
    bits = int.from_bytes(data[start + 1 : start + 5], "little")
    return None if bits >> 29 else ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)


def _bmp(head: bytes, length: int) -> Found | None:
    _, start, header, width, height, planes, depth, compression = _BMP.unpack_from(head, 2)
    if (header, planes, depth, compression) != (40, 1, 24, 0) or start != 54 or width < 1 or height == -(1 << 31):
        return None
    if length < start + (width * 24 + 31) // 32 * 4 * abs(height):
        return None
    return width, abs(height), 1


def exif_orientation(data: bytes) -> int | None:
    """The orientation in EXIF data that begins with its TIFF header, 1 where none stands there; None: in doubt."""
    layout = _TIFF.get(data[:4])
    if layout is None:
        return None
    long, short, entry = layout
    position = long.unpack_from(data, 4)[0]
    number = short.unpack_from(data, position)[0]
    if position + 6 + 12 * number > len(data):
        return None
    found = None
    for start in range(position + 2, position + 2 + 12 * number, 12):
        tag, kind, count, value = entry.unpack_from(data, start)
        size = _TIFF_BYTES.get(kind, 0) * count
        if size < 1 or (size > 4 and value + size > len(data)):
            return None
        if tag == ORIENTATION_TAG:
            if found is not None or kind != 3 or count != 1:
                return None
            found = short.unpack_from(data, start + 8)[0]
    return 1 if found is None or not 1 <= found <= 8 else found
