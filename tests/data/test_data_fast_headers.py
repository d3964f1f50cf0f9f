"""The fast reader of headers agrees with Pillow on every file, or leaves it to Pillow."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from library.data.sources import fast_headers
from library.data.sources.fast_headers import HEAD_BYTES, Found, exif_orientation
from library.data.sources.images import Damage, Header, _ask_pillow, probe

MakePicture = Callable[..., Path]


def fast(path: Path) -> Found | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return fast_headers.read(descriptor, os.read(descriptor, HEAD_BYTES), path.stat().st_size)
    finally:
        os.close(descriptor)


def agrees(path: Path) -> bool:
    """Whether the fast reader knew the answer; it must be Pillow's."""
    assert probe(path) == _ask_pillow(path)
    return fast(path) is not None


def encoded(mode: str, size: tuple[int, int], **how: Any) -> bytes:
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image = Image.fromarray(noise, "RGBA").convert(mode)
    elif mode != "RGB":
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


def exif_of(orientation: int, *, big: bool = False, more: bool = False) -> bytes:
    """EXIF data without its JPEG prefix."""
    order = ">" if big else "<"
    entries = [(0x0112, 3, 1, struct.pack(f"{order}HH", orientation, 0))]
    extra = b""
    if more:
        place = 8 + 2 + 12 * 3 + 4
        entries = [(0x010F, 2, 9, struct.pack(f"{order}I", place)), *entries]
        entries.append((0x011A, 5, 1, struct.pack(f"{order}I", place + 10)))
        extra = b"A camera\0\0" + struct.pack(f"{order}II", 72, 1)
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}IH", 8, len(entries))
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    return head + body + bytes(4) + extra


sizes = st.tuples(st.integers(1, 130), st.integers(1, 130))
pngs = st.fixed_dictionaries({"format": st.just("PNG"), "optimize": st.booleans()})
jpegs = st.fixed_dictionaries(
    {
        "format": st.just("JPEG"),
        "quality": st.integers(1, 100),
        "progressive": st.booleans(),
        "optimize": st.booleans(),
        "subsampling": st.sampled_from([0, 1, 2]),
        "comment": st.binary(max_size=30),
        "icc_profile": st.none() | st.binary(min_size=1, max_size=70000),
    }
)
webps = st.fixed_dictionaries(
    {
        "format": st.just("WEBP"),
        "lossless": st.booleans(),
        "icc_profile": st.none() | st.binary(min_size=1, max_size=20000),
    }
)
bmps = st.just({"format": "BMP"})
kinds = st.one_of(
    st.tuples(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]), pngs),
    st.tuples(st.sampled_from(["L", "RGB", "CMYK"]), jpegs),
    st.tuples(st.sampled_from(["RGB", "RGBA"]), webps),
    st.tuples(st.sampled_from(["1", "L", "P", "RGB", "RGBA"]), bmps),
)
exifs = st.none() | st.builds(exif_of, st.integers(0, 9), big=st.booleans(), more=st.booleans())


@settings(deadline=None, max_examples=250)
@given(kinds, sizes, exifs)
def test_every_kind_of_file_reads_as_pillow_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[str, dict[str, Any]],
    size: tuple[int, int],
    exif: bytes | None,
) -> None:
    mode, how = kind
    path = tmp_path_factory.getbasetemp() / "kind.png"
    if exif is not None and how["format"] != "BMP":
        how = {**how, "exif": exif if how["format"] == "PNG" else b"Exif\0\0" + exif}
    path.write_bytes(encoded(mode, size, **how))
    known = agrees(path)
    assert known or how["format"] == "BMP" or how.get("icc_profile") or mode == "I;16", (mode, how)


@settings(deadline=None, max_examples=300)
@given(kinds, sizes, exifs, st.data())
def test_damaged_files_are_never_read_as_something_else(
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[str, dict[str, Any]],
    size: tuple[int, int],
    exif: bytes | None,
    data: st.DataObject,
) -> None:
    mode, how = kind
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    if exif is not None and how["format"] in ("PNG", "JPEG"):
        how = {**how, "exif": exif if how["format"] == "PNG" else b"Exif\0\0" + exif}
    content = bytearray(encoded(mode, size, **how))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))]))
    found, real = probe(path), _ask_pillow(path)
    if how["format"] == "WEBP" and isinstance(real, Damage):
        return
    assert found == real


def png_with(chunks: list[tuple[bytes, bytes]], *, behind: bool = False) -> bytes:
    whole = encoded("RGB", (70, 50), format="PNG")
    made = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    place = len(whole) - 12 if behind else 33
    return whole[:place] + made + whole[place:]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("big", [False, True])
def test_png_with_exif_before_and_behind_the_pixels(tmp_path: Path, behind: bool, orientation: int, big: bool) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_with([(b"eXIf", exif_of(orientation, big=big, more=True))], behind=behind))
    assert agrees(path) == (not behind)
    header = probe(path)
    assert isinstance(header, Header)
    assert header.orientation == orientation


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)],
        [(b"tEXt", b"parameters\0a cat, 4k")],
        [(b"tEXt", b"exif\0II*\0junk")],
        [(b"zTXt", b"Comment\0\0" + zlib.compress(b"eXIf and more"))],
        [(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n      1\n45\n"))],
        [(b"iCCP", b"name\0\0" + zlib.compress(bytes(3000)))],
        [(b"acTL", struct.pack(">II", 1, 0))],
        [(b"tRNS", b"\0")],
        [(b"gAMA", b"\0")],
        [(b"tEXt", b"long\0" + b"x" * 30000)],
        [(b"eXIf", exif_of(6)), (b"eXIf", exif_of(3))],
        [(b"eXIf", b"II*\0 broken")],
        [(b"prVt", b"private")],
    ],
    ids=lambda chunks: chunks[0][0].decode() + str(len(chunks[0][1])),
)
def test_png_with_other_chunks(tmp_path: Path, chunks: list[tuple[bytes, bytes]]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_with(chunks))
    agrees(path)


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    whole = encoded("RGB", (70, 50), format="JPEG")
    made = b"".join(struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data for marker, data in segments)
    return whole[:2] + made + whole[2:]


@pytest.mark.parametrize(
    "segments",
    [
        [(0xE1, b"Exif\0\0" + exif_of(6, more=True) + encoded("RGB", (16, 16), format="JPEG"))],
        [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)],
        [(0xE1, b"Exif\0\0" + exif_of(3)), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)],
        [(0xE1, b"Exif\0\0" + exif_of(3)), (0xE1, b"Exif\0\0" + exif_of(6))],
        [(0xE2, b"MPF\0" + bytes(60))],
        [(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60000))],
        [(0xED, b"Photoshop 3.0\x008BIM\x04\x04")],
        [(0xEE, b"Adobe\0d\0\0\0\0\1")],
        [(0xE0, b"JFIF")],
        [(0xFE, bytes(65000))] * 3,
        [(0xDB, b"\0" * 64)],
        [(0xC3, b"\x08\0\x10\0\x10\x01\x01\x11\0")],
    ],
    ids=lambda segments: f"{segments[0][0]:x}-{len(segments)}-{len(segments[0][1])}",
)
def test_jpeg_with_other_segments(tmp_path: Path, segments: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_with(*segments))
    agrees(path)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "GIF"])
def test_animated_pictures_named_png(tmp_path: Path, make_picture: MakePicture, format_: str) -> None:
    frames = [Image.new("RGB", (70, 50), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / "a.png"
    frames[0].save(path, format=format_, save_all=True, append_images=frames[1:])
    assert not agrees(path)
    header = probe(path)
    assert isinstance(header, Header)
    assert header.size == (70, 50)


def test_interlaced_png(tmp_path: Path) -> None:
    whole = bytearray(encoded("L", (1, 1), format="PNG"))
    whole[28] = 1
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    path = tmp_path / "a.png"
    path.write_bytes(bytes(whole))
    assert agrees(path)


def test_png_text_written_by_pillow(tmp_path: Path) -> None:
    told = PngImagePlugin.PngInfo()
    told.add_text("prompt", "a cat")
    told.add_itxt("workflow", "ein Kätzchen")
    path = tmp_path / "a.png"
    Image.new("RGB", (70, 50)).save(path, pnginfo=told)
    assert agrees(path)


def test_a_header_that_promises_too_many_pixels(tmp_path: Path) -> None:
    whole = bytearray(encoded("L", (8, 8), format="PNG"))
    whole[16:24] = struct.pack(">II", 100_000, 100_000)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    path = tmp_path / "a.png"
    path.write_bytes(bytes(whole))
    assert not agrees(path)
    found = probe(path)
    assert isinstance(found, Damage)
    assert "more than 178 million pixels" in found.wrong


@given(st.integers(0, 12), st.booleans(), st.booleans())
def test_orientation_in_exif_data(orientation: int, big: bool, more: bool) -> None:
    wanted = orientation if 1 <= orientation <= 8 else 1
    assert exif_orientation(exif_of(orientation, big=big, more=more)) == wanted
