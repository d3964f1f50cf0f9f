"""The pixels that are trained: upright, resized, cut and flipped."""

import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from library.data import sources
from library.data.augment import draw
from library.data.buckets import Fit
from library.data.images import Header, probe
from library.data.pixels import INTERPOLATIONS, read_pixels, resize
from library.data.plan import build_plan
from library.data.records import ImageRecord
from library.errors import UserError
from library.options.specs import DatasetSpec, SubsetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


def record_of(path: Path) -> ImageRecord:
    header = probe(path)
    assert isinstance(header, Header)
    return ImageRecord(path, path.name, header.size, header.orientation, "", False, 0, 0, 1, False)


def whole(path: Path) -> np.ndarray:
    """The picture at its own size, through `read_pixels`."""
    record = record_of(path)
    return read_pixels(record, Fit(record.size, record.size, (0, 0), 0.0, 0.0))


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(tmp_path: Path, make_picture: MakePicture, ending: str, orientation: int) -> None:
    path = make_picture(tmp_path / f"a{ending}", (40, 24), orientation=orientation)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(whole(path), expected)


def test_area_shrinks_and_lanczos_enlarges(tmp_path: Path, make_picture: MakePicture) -> None:
    pixels = whole(make_picture(tmp_path / "a.png", (90, 60)))
    assert np.array_equal(resize(pixels, (45, 30)), cv2.resize(pixels, (45, 30), interpolation=cv2.INTER_AREA))
    assert np.array_equal(resize(pixels, (90, 30)), cv2.resize(pixels, (90, 30), interpolation=cv2.INTER_AREA))
    lanczos = np.asarray(Image.fromarray(pixels).resize((135, 90), Image.Resampling.LANCZOS))
    assert np.array_equal(resize(pixels, (135, 90)), lanczos)
    assert resize(pixels, (90, 60)) is pixels


def test_named_interpolations(tmp_path: Path, make_picture: MakePicture) -> None:
    pixels = whole(make_picture(tmp_path / "a.png", (90, 60)))
    found = {name: resize(pixels, (45, 30), name).tobytes() for name in INTERPOLATIONS}
    assert set(found) == {"lanczos", "box", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"}
    assert found["linear"] == found["bilinear"]
    assert found["cubic"] == found["bicubic"]
    assert len(set(found.values())) >= 5
    assert all(len(data) == 45 * 30 * 3 for data in found.values())


def test_cut_and_flip(tmp_path: Path, make_picture: MakePicture) -> None:
    path = make_picture(tmp_path / "a.png", (90, 60))
    record, fit = record_of(path), Fit((64, 32), (90, 60), (13, 14), 0.0, 0.0)
    pixels = whole(path)
    assert np.array_equal(read_pixels(record, fit), pixels[14:46, 13:77])
    assert np.array_equal(read_pixels(record, fit, flip=True), pixels[14:46, 13:77][:, ::-1])
    assert np.array_equal(read_pixels(record, fit, crop=(26, 0)), pixels[0:32, 26:90])


def test_modes(tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
    as_rgb = np.stack([grey] * 3, -1)
    path = tmp_path / "a.png"

    Image.fromarray(grey).save(path)
    assert np.array_equal(whole(path), as_rgb)

    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert np.array_equal(whole(path), as_rgb)

    Image.fromarray(np.stack([grey, 255 - grey], -1), "LA").save(path)
    assert np.array_equal(whole(path), as_rgb)

    Image.fromarray(np.concatenate([as_rgb, as_rgb[..., :1]], -1)).save(path)
    assert np.array_equal(whole(path), as_rgb)

    palette = Image.fromarray(grey).convert("P")
    palette.save(path, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(whole(path), as_rgb)

    Image.fromarray(as_rgb).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(whole(tmp_path / "a.jpg").astype(int) - as_rgb).max() < 12


def test_damage_inside_names_the_picture(tmp_path: Path, make_picture: MakePicture) -> None:
    path = make_picture(tmp_path / "a.png", (90, 60))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\0" * 40
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"a\.png: can't be decoded"):
        whole(path)


def test_a_picture_that_changed_its_size(tmp_path: Path, make_picture: MakePicture) -> None:
    path = make_picture(tmp_path / "a.png", (90, 60))
    record = record_of(path)
    make_picture(path, (60, 90))
    with pytest.raises(UserError, match=r"a\.png: is 60x90, but was 90x60"):
        read_pixels(record, Fit((32, 32), (48, 32), (8, 0), 0.0, 0.0))


def test_augmentation_draws() -> None:
    fit = Fit((32, 32), (48, 36), (8, 2), 0.0, 0.0)

    def drawn(subset: SubsetSpec) -> list:
        return [draw(subset, fit, seed=1, epoch=e, key="a", repeat=r) for e in range(1, 41) for r in range(10)]

    plain = drawn(SubsetSpec(Path()))
    assert {(one.flip, one.crop) for one in plain} == {(False, (8, 2))}
    flips = drawn(SubsetSpec(Path(), flip_aug=True))
    assert 150 < sum(one.flip for one in flips) < 250
    crops = drawn(SubsetSpec(Path(), random_crop=True))
    assert {one.crop[0] for one in crops} == set(range(17))
    assert {one.crop[1] for one in crops} == set(range(5))
    both = drawn(SubsetSpec(Path(), flip_aug=True, random_crop=True))
    assert [one.flip for one in both] == [one.flip for one in flips]
    assert [one.crop for one in both] == [one.crop for one in crops]


def test_scan_to_pixels(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    for i, size in enumerate([(100, 64), (64, 100), (30, 30), (300, 280)]):
        make_picture(tmp_path / f"{i}.jpg", size, orientation=6 if i == 1 else 1)
    specs = [make_spec(tmp_path)]
    plan = build_plan(specs, sources.scan(specs).records, 8, 1)
    for record, fit in zip(plan.records, plan.fits, strict=True):
        assert read_pixels(record, fit).shape == (fit.bucket[1], fit.bucket[0], 3)
