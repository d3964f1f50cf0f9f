"""tools/resize_images.py: copies of pictures in smaller sizes."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from library.data.shrinking import Shrink
from tests.programs import tool


def resize(*words: object) -> int:
    return tool("resize_images")([str(word) for word in words])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A 90x60 picture with alpha, captions, a cache and a list."""
    folder = tmp_path / "src"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (60, 90, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    for name in ("a.txt", "a.caption", "a.npz", "list.json"):
        (folder / name).write_text(name)
    return folder


def test_each_size_is_made_from_the_picture_itself(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert resize(source, dst, "--max_resolution", "60x40,30x20", "--save_as_png", "--copy_associated_files") == 0
    copies = ["a+30x20.caption", "a+30x20.png", "a+30x20.txt", "a+60x40.caption", "a+60x40.png", "a+60x40.txt"]
    assert sorted(path.name for path in dst.iterdir()) == [*copies, "list.json"]
    whole = np.asarray(Image.open(source / "a.png"))
    for name, size in (("60x40", (60, 40)), ("30x20", (30, 20))):
        found = np.asarray(Image.open(dst / f"a+{name}.png"))
        expected = np.dstack([cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in np.dsplit(whole, 4)])
        assert np.array_equal(found, expected)
    assert (dst / "a+30x20.txt").read_text() == "a.txt"


def test_jpegs_are_cut_to_multiples_and_none_is_enlarged(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert resize(source, dst, "--max_resolution", "1000x1000", "--divisible_by", "32") == 0
    names = ["a+1000x1000.jpg", "a.caption", "a.txt", "list.json"]
    assert sorted(path.name for path in dst.iterdir()) == names
    with Image.open(dst / "a+1000x1000.jpg") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 32), "RGB")
        whole = np.asarray(Image.open(source / "a.png").convert("RGB"))[14:46, 13:77]
        assert np.abs(np.asarray(image).astype(int) - whole).mean() < 3


@pytest.mark.parametrize("name", ["area", "cubic", "lanczos4", "nearest", "linear", "box"])
def test_every_interpolation_draws_its_own_picture(name: str, source: Path, tmp_path: Path) -> None:
    flags = ["--max_resolution", "36x24", "--save_as_png", "--interpolation"]
    assert resize(source, tmp_path / "area", *flags, "area") == 0
    assert resize(source, tmp_path / name, *flags, name) == 0
    area, found = (np.asarray(Image.open(tmp_path / kind / "a+36x24.png"))[..., :3] for kind in ("area", name))
    assert found.shape == (24, 36, 3)
    assert np.array_equal(area, found) == (name == "area")


def test_squares_become_squares_of_the_size_that_was_asked_for() -> None:
    found = {Shrink(512 * 512, 64).sizes((side, side)) for side in range(513, 3000)}
    assert found == {((512, 512), (512, 512))}


@pytest.mark.parametrize("size", [(4000, 3000), (513, 511), (17, 9000)])
def test_sizes_keep_the_ratio_and_the_number_of_pixels(size: tuple[int, int]) -> None:
    resized, cut = Shrink(512 * 512, 64).sizes(size)
    assert resized[0] * resized[1] <= 512 * 512
    scale = (512 * 512 / (size[0] * size[1])) ** 0.5 if size[0] * size[1] > 512 * 512 else 1
    for side, small, kept in zip(size, resized, cut, strict=True):
        assert side * scale - 1 < small <= side * scale
        assert kept == (small if small < 64 else small // 64 * 64)


def test_what_is_there_stays_and_damage_is_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "b.png").write_bytes((source / "a.png").read_bytes()[:500])
    dst = tmp_path / "dst"
    assert resize(source, dst, "--max_resolution", "30x20") == 0
    assert "b.png: can't be decoded" in (told := capsys.readouterr().err) and "1 pictures can't be read" in told
    (dst / "a+30x20.jpg").write_bytes(b"mine")
    assert resize(source, dst, "--max_resolution", "30x20") == 0
    assert (dst / "a+30x20.jpg").read_bytes() == b"mine" and "stay" in capsys.readouterr().err
    assert resize(source, dst, "--max_resolution", "30x20", "--overwrite") == 0
    with Image.open(dst / "a+30x20.jpg") as image:
        assert image.size == (30, 20)


def test_wrong_flags_are_told_together(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resize(source, source, "--max_resolution", "512,0x3", "--divisible_by", "0") == 2
    told = capsys.readouterr().err
    assert all(part in told for part in ("DST", "'512' is no size", "'0x3' is no size", "--divisible_by: 0"))
    assert resize(tmp_path / "none", tmp_path / "dst") == 2
    Image.new("RGB", (8, 8)).save(source / "a.jpg")
    assert resize(source, tmp_path / "dst") == 2
    assert "a.jpg and a.png would get the same names" in capsys.readouterr().err


def test_a_picture_is_upright_and_keeps_its_profile(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (40, 20), "red").save(src / "a.jpg", exif=exif, icc_profile=profile)
    Image.new("CMYK", (40, 20)).save(src / "cmyk.jpg", icc_profile=profile[:16] + b"CMYK" + profile[20:])
    Image.new("L", (40, 20)).save(src / "grey.jpg", icc_profile=profile)
    assert resize(src, tmp_path / "dst", "--max_resolution", "20x10") == 0
    with Image.open(tmp_path / "dst" / "a+20x10.jpg") as image:
        assert image.size == (10, 20) and image.info["icc_profile"] == profile
        assert image.getexif().get(0x0112, 1) == 1
    for name in ("cmyk", "grey"):
        with Image.open(tmp_path / "dst" / f"{name}+20x10.jpg") as image:
            assert image.mode == "RGB" and "icc_profile" not in image.info
