"""Headers tell size and orientation; damage is found without decoding."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from library.data.sources.images import Damage, Header, probe
from library.data.sources.reading import read_all

MakePicture = Callable[..., Path]


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG", ".JPG"])
def test_size_of_each_format(tmp_path: Path, make_picture: MakePicture, ending: str) -> None:
    path = make_picture(tmp_path / f"a{ending}", (70, 50))
    assert probe(path) == Header((70, 50), 1, path.stat().st_size)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF: install the wheel of pillow>=11.3")
def test_size_of_avif(tmp_path: Path, make_picture: MakePicture) -> None:
    header = probe(make_picture(tmp_path / "a.avif", (70, 50)))
    assert isinstance(header, Header)
    assert header.size == (70, 50)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_upright(tmp_path: Path, make_picture: MakePicture, ending: str, orientation: int) -> None:
    header = probe(make_picture(tmp_path / f"a{ending}", (70, 50), orientation=orientation))
    assert isinstance(header, Header)
    assert header.orientation == orientation
    assert header.size == ((50, 70) if orientation >= 5 else (70, 50))


def test_png_with_orientation_behind_the_pixels(tmp_path: Path, make_picture: MakePicture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    path = make_picture(tmp_path / "a.png", (70, 50))
    whole = path.read_bytes()
    import zlib

    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    path.write_bytes(whole[:-12] + chunk + whole[-12:])
    header = probe(path)
    assert isinstance(header, Header)
    assert (header.size, header.orientation) == ((50, 70), 6)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("missing", [1, 100, 2000])
def test_truncated_files_are_damaged(tmp_path: Path, make_picture: MakePicture, ending: str, missing: int) -> None:
    path = make_picture(tmp_path / f"a{ending}", (200, 150))
    data = path.read_bytes()
    assert len(data) > 2500
    path.write_bytes(data[:-missing])
    found = probe(path)
    assert isinstance(found, Damage)
    assert "truncated" in found.wrong


def test_progressive_jpeg_cut_between_scans_is_damaged(tmp_path: Path, make_picture: MakePicture) -> None:
    path = make_picture(tmp_path / "a.jpg", (200, 150), progressive=True)
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"\xff\xda")])
    assert isinstance(probe(path), Damage)


def test_jpeg_whose_only_end_marker_is_in_its_thumbnail_is_damaged(tmp_path: Path, make_picture: MakePicture) -> None:
    thumbnail = make_picture(tmp_path / "t.jpg", (20, 20)).read_bytes()
    whole = make_picture(tmp_path / "a.jpg", (200, 150)).read_bytes()
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    path = tmp_path / "b.jpg"
    path.write_bytes(whole[:2] + segment + whole[2:])
    assert isinstance(probe(path), Header)
    path.write_bytes((whole[:2] + segment + whole[2:])[:-2000])
    assert isinstance(probe(path), Damage)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("appended", [b"\0" * 3000, b"a video that a phone appended" * 100])
def test_bytes_after_the_end_are_no_damage(
    tmp_path: Path, make_picture: MakePicture, ending: str, appended: bytes
) -> None:
    path = make_picture(tmp_path / f"a{ending}", (200, 150))
    path.write_bytes(path.read_bytes() + appended)
    assert isinstance(probe(path), Header)
    Image.open(path).load()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b"this is a text\n" * 40, "not a picture"), (b"\x89PNG\r\n\x1a\n", "truncated")],
)
def test_files_that_are_no_pictures(tmp_path: Path, ending: str, content: bytes, word: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    found = probe(path)
    assert isinstance(found, Damage)
    assert word in found.wrong


@pytest.mark.parametrize("seed", range(60))
def test_random_bytes_never_raise(tmp_path: Path, make_picture: MakePicture, seed: int) -> None:
    draws = np.random.default_rng(seed)
    ending = [".png", ".jpg", ".webp", ".bmp"][seed % 4]
    path = make_picture(tmp_path / f"a{ending}", (60, 40))
    data = bytearray(path.read_bytes())
    for place in draws.integers(0, min(120, len(data)), 12):
        data[place] = int(draws.integers(256))
    path.write_bytes(bytes(data))
    assert isinstance(probe(path), Header | Damage)


def test_a_name_that_lies_about_the_format_is_fine(tmp_path: Path, make_picture: MakePicture) -> None:
    path = make_picture(tmp_path / "a.png", (70, 50), format="GIF")
    header = probe(path)
    assert isinstance(header, Header)
    assert header.size == (70, 50)


def test_missing_file(tmp_path: Path) -> None:
    found = probe(tmp_path / "no.png")
    assert isinstance(found, Damage)
    assert "No such file" in found.wrong


def test_threads_keep_the_order(tmp_path: Path, make_picture: MakePicture) -> None:
    paths: list[Path] = [make_picture(tmp_path / f"{i}.png", (10 + i, 20)) for i in range(40)]
    headers = read_all(probe, paths, threads=8, always=True)
    assert [header.size for header in headers if isinstance(header, Header)] == [(10 + i, 20) for i in range(40)]
