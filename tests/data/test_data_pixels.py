"""The pixels that are trained: upright, resized, cut and flipped."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from library.data.augment import draw
from library.data.buckets import Fit
from library.data.pixels import INTERPOLATIONS, Picture, decoded, read_picture, resize, unit_range
from library.data.plan import build_plan
from library.data.records import ImageRecord
from library.data.sources import scan as sources
from library.data.sources.images import Header, probe
from library.errors import UserError
from library.options.specs import DatasetSpec, SubsetSpec
from tests.pixels import read_pixels

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


def record_of(path: Path) -> ImageRecord:
    header = probe(path)
    assert isinstance(header, Header)
    return ImageRecord(path.parent, path.name, header.size, header.orientation, "", False, 0, 0, 1, False)


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


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"keep_rgb": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("grey", [False, True])
def test_jpegs_are_decoded_as_pillow_does(
    tmp_path: Path, make_picture: MakePicture, how: dict[str, Any], subsampling: int, grey: bool
) -> None:
    with Image.open(make_picture(tmp_path / "a.png", (101, 67))) as image:
        image.convert("L" if grey else "RGB").save(
            tmp_path / "a.jpg", quality=85, subsampling=0 if "keep_rgb" in how else subsampling, **how
        )
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(whole(tmp_path / "a.jpg"), np.asarray(image.convert("RGB")))


def masked(path: Path, *, mask: Path | None = None) -> Picture:
    """Picture and mask at their own size; the alpha channel counts."""
    return decoded(replace(record_of(path), mask=None if mask is None else str(mask)), alpha=True)


def mask_of(path: Path, *, mask: Path | None = None) -> np.ndarray:
    found = masked(path, mask=mask).mask
    assert found is not None
    return found


def test_alpha_of_every_mode(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    rgb, alpha = draws.integers(0, 256, (12, 16, 3), np.uint8), draws.integers(0, 256, (12, 16), np.uint8)
    rgba = np.concatenate([rgb, alpha[..., None]], -1)
    path = tmp_path / "a.png"

    Image.fromarray(rgba).save(path)
    assert np.array_equal(mask_of(path), alpha)
    assert np.array_equal(masked(path).pixels, rgb)
    assert np.array_equal(whole(path), rgb)

    Image.fromarray(rgba).save(tmp_path / "a.webp", lossless=True, exact=True)
    assert np.array_equal(mask_of(tmp_path / "a.webp"), alpha)
    assert np.array_equal(masked(tmp_path / "a.webp").pixels, rgb)

    Image.fromarray(np.stack([rgb[..., 0], alpha], -1), "LA").save(path)
    assert np.array_equal(mask_of(path), alpha)
    assert np.array_equal(masked(path).pixels, rgb[..., :1].repeat(3, 2))

    palette = Image.fromarray(alpha).convert("P")
    palette.save(path, transparency=bytes(range(255, -1, -1)))
    assert np.array_equal(mask_of(path), 255 - np.asarray(palette))
    assert np.array_equal(masked(path).pixels, np.asarray(palette.convert("RGB")))

    rgb[3, 4] = (1, 2, 3)
    Image.fromarray(rgb).save(path, transparency=(1, 2, 3))
    assert np.argwhere(mask_of(path) == 0).tolist() == [[3, 4]]

    Image.fromarray(rgb).save(path)
    assert masked(path).mask is None
    Image.fromarray(rgb).save(tmp_path / "a.jpg")
    assert masked(tmp_path / "a.jpg").mask is None
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "a.jpg")
    assert masked(tmp_path / "a.jpg").mask is None


@pytest.mark.parametrize("ending", [".png", ".webp", ".gif", ".avif"])
def test_the_first_of_several_frames(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue", "green")]
    path = tmp_path / f"a{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 3
    named_as_png = path.rename(tmp_path / "b.png")
    assert np.abs(whole(named_as_png).astype(int) - [255, 0, 0]).max() <= 3


def test_jxl_where_its_plugin_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    rgba = np.random.default_rng(0).integers(0, 256, (24, 32, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.jxl", lossless=True)
    assert np.array_equal(masked(tmp_path / "a.jxl").pixels, rgba[..., :3])
    assert np.array_equal(mask_of(tmp_path / "a.jxl"), rgba[..., 3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_alpha_channel_turns_with_its_picture(tmp_path: Path, orientation: int) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (12, 16, 4), np.uint8)
    rgba[..., 3] = rgba[..., 0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgba).save(tmp_path / "a.png", exif=exif)
    picture = masked(tmp_path / "a.png")
    assert picture.pixels.shape == ((12, 16, 3) if orientation < 5 else (16, 12, 3))
    assert np.array_equal(mask_of(tmp_path / "a.png"), picture.pixels[..., 0])


def test_a_mask_is_the_first_channel_of_any_picture(tmp_path: Path, make_picture: MakePicture) -> None:
    path = make_picture(tmp_path / "a.png", (16, 12))
    level = np.random.default_rng(0).integers(0, 256, (12, 16), np.uint8)
    other = np.full_like(level, 9)
    kinds = {
        "grey.png": Image.fromarray(level),
        "rgb.png": Image.fromarray(np.stack([level, other, other], -1)),
        "rgba.png": Image.fromarray(np.stack([level, other, other, other], -1)),
        "la.png": Image.fromarray(np.stack([level, other], -1), "LA"),
        "deep.png": Image.fromarray(level.astype(np.uint16) * 257),
        "grey.bmp": Image.fromarray(level),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        assert np.array_equal(mask_of(path, mask=tmp_path / name), level), name
    Image.fromarray(level > 100).save(tmp_path / "bits.png")
    assert np.array_equal(mask_of(path, mask=tmp_path / "bits.png"), (level > 100) * 255)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_by_its_own_exif(
    tmp_path: Path, make_picture: MakePicture, ending: str, orientation: int
) -> None:
    mask = make_picture(tmp_path / f"mask{ending}", (40, 24), orientation=orientation)
    with Image.open(mask) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[..., 0]
    path = make_picture(tmp_path / "a.png", expected.shape[1::-1])
    assert np.array_equal(mask_of(path, mask=mask), expected)


def test_a_mask_picture_wins_over_alpha(tmp_path: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (12, 16, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba[..., 1]).save(tmp_path / "m.png")
    assert np.array_equal(mask_of(tmp_path / "a.png", mask=tmp_path / "m.png"), rgba[..., 1])


def test_masks_that_cant_be_used(tmp_path: Path, make_picture: MakePicture) -> None:
    path = make_picture(tmp_path / "a.png", (90, 60))
    wrong = make_picture(tmp_path / "m.png", (60, 90))
    with pytest.raises(UserError, match=r"m\.png: this mask is 60x90, but its picture .*a\.png is 90x60"):
        masked(path, mask=wrong)
    wrong.write_bytes(wrong.read_bytes()[:300])
    with pytest.raises(UserError, match=r"m\.png: can't be decoded"):
        masked(path, mask=wrong)
    with pytest.raises(UserError, match=r"gone\.png: can't be read"):
        masked(path, mask=tmp_path / "gone.png")


def test_masks_shrink_by_area_and_grow_by_lines(tmp_path: Path, make_picture: MakePicture) -> None:
    path = make_picture(tmp_path / "a.png", (64, 32))
    mask = whole(make_picture(tmp_path / "m.png", (64, 32)))[..., 0]
    record = replace(record_of(path), mask=str(tmp_path / "m.png"))
    for size, how in (((32, 16), cv2.INTER_AREA), ((128, 64), cv2.INTER_LINEAR)):
        for named in (None, "nearest"):
            subset = SubsetSpec(tmp_path, resize_interpolation=named)
            picture = read_picture(record, Fit(size, size, (0, 0), 0.0, 0.0), subset)
            assert picture.mask is not None
            assert np.array_equal(picture.mask, cv2.resize(mask, size, interpolation=how))
            assert np.array_equal(picture.pixels, resize(whole(path), size, named))


def test_the_unit_range_is_exact() -> None:
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 40, 24, 3), np.uint8))
    values = (np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - np.float32(0.5)) / 0.5
    found = unit_range(pictures)
    assert found.dtype == np.float32
    assert found.shape == (3, 3, 40, 24)
    assert np.array_equal(found, values.astype(np.float32))
    assert np.array_equal(unit_range([pictures[0][:, ::-1]]), values[:1, ..., ::-1])


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
        return [
            draw(subset, fit, seed=1, epoch=e, key="a", repeat=r, size=(48, 36))
            for e in range(1, 41)
            for r in range(10)
        ]

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
