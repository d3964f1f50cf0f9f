"""Flips, cuts and colours: what may be drawn, how often, and what pixels and masks become of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data import augment, buckets
from library.data.augment import Augmentation, ColorShift, draw
from library.data.buckets import Fit
from library.data.pixels import Picture, cut, read_picture, scaled, shift_color
from library.data.records import ImageRecord
from library.options.specs import DatasetSpec, SubsetSpec

FACE = "cat_0300_0200_0080_0060.png"
RECORDED = [(True, (0, 1)), (True, (10, 0)), (True, (1, 4)), (True, (15, 0))]
SQUARE = Fit((512, 512), (683, 512), (85, 0), 0.0, 0.0)


def drawn(subset: SubsetSpec, fit: Fit, size: tuple[int, int], key: str = "a.png", count: int = 400) -> list:
    return [draw(subset, fit, seed=1, epoch=e, key=key, repeat=0, size=size) for e in range(1, count + 1)]


def test_flips_and_cuts_of_earlier_versions() -> None:
    """Runs that go on must see the same samples: these were recorded before colours and faces existed."""
    fit = Fit((32, 32), (48, 36), (8, 2), 0.0, 0.0)
    both = SubsetSpec(Path(), flip_aug=True, random_crop=True)
    seen = [
        draw(both, fit, seed=1, epoch=e, key="a", repeat=r, size=(48, 36)) for e, r in [(1, 0), (1, 1), (2, 0), (3, 5)]
    ]
    assert [(one.flip, one.crop) for one in seen] == RECORDED
    more = replace(both, color_aug=True, face_crop_aug_range=(1.0, 2.0))
    again = [
        draw(more, fit, seed=1, epoch=e, key="a", repeat=r, size=(48, 36)) for e, r in [(1, 0), (1, 1), (2, 0), (3, 5)]
    ]
    assert [(one.flip, one.crop) for one in again] == RECORDED


def test_how_often_colours_change() -> None:
    seen = [one.color for one in drawn(SubsetSpec(Path(), color_aug=True), SQUARE, (683, 512), count=4000)]
    hues = [one.amount for one in seen if one is not None and one.kind == "hue"]
    gammas = [one.amount for one in seen if one is not None and one.kind == "gamma"]
    assert 560 < len(hues) < 760
    assert 560 < len(gammas) < 760
    assert -8 <= min(hues) < -7.5 < 7.5 < max(hues) <= 8
    assert 0.95 <= min(gammas) < 0.953 < 1.047 < max(gammas) <= 1.05
    assert {one.color for one in drawn(SubsetSpec(Path()), SQUARE, (683, 512))} == {None}


def test_a_gamma_by_hand() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    before = pixels.copy()
    brighter = shift_color(pixels, ColorShift("gamma", 1.05))
    assert np.array_equal(brighter, np.clip(np.rint(np.arange(256.0) ** 1.05), 0, 255).reshape(16, 16, 1).repeat(3, 2))
    assert brighter.dtype == np.uint8
    assert (brighter >= pixels).all()
    assert (shift_color(pixels, ColorShift("gamma", 0.95)) <= pixels).all()
    assert np.array_equal(pixels, before)


def test_a_hue_turns_red_towards_yellow_and_not_towards_blue() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 0] = 200
    turned = shift_color(pixels, ColorShift("hue", 8.0))
    assert np.abs(turned[0, 0].astype(int) - [200, 53, 0]).max() <= 1
    assert np.abs(shift_color(pixels, ColorShift("hue", -8.0))[0, 0].astype(int) - [200, 0, 53]).max() <= 1
    assert (pixels[..., 0] == 200).all()


@given(amount=st.floats(-8, 8), seed=st.integers(0, 1000))
def test_hues_agree_with_opencv_and_keep_lightness(amount: float, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    turned = shift_color(pixels, ColorShift("hue", amount))
    assert np.array_equal(turned.max(2), pixels.max(2))
    assert np.abs(turned.min(2).astype(int) - pixels.min(2)).max() <= 1
    assert np.abs(shift_color(pixels, ColorShift("hue", 0.0)).astype(int) - pixels).max() <= 1
    back = shift_color(turned, ColorShift("hue", -amount))
    assert np.abs(back.astype(int) - pixels).max() <= 3
    colourful = pixels[(pixels.max(2) - pixels.min(2)) > 100][None]
    if colourful.size:
        before = cv2.cvtColor(colourful, cv2.COLOR_RGB2HSV)[..., 0].astype(float)
        after = cv2.cvtColor(shift_color(colourful, ColorShift("hue", amount)), cv2.COLOR_RGB2HSV)[..., 0]
        moved = (after - before - amount + 90) % 180 - 90
        assert np.abs(moved).max() <= 2


def test_a_face_by_hand() -> None:
    """A face of 80x60 at (300, 200) of a picture of 1000x800, into 512x512."""
    fit = buckets.fit((1000, 800), DatasetSpec(1, (512, 512), ()), 8)
    subset = SubsetSpec(Path(), face_crop_aug_range=(4.0, 4.0))
    (only,) = set(drawn(subset, fit, (1000, 800), FACE))
    assert only == Augmentation(False, (300 - 256, 0), (1000, 800))
    subset = SubsetSpec(Path(), face_crop_aug_range=(8.0, 8.0))
    (only,) = set(drawn(subset, fit, (1000, 800), FACE))
    assert only == Augmentation(False, (0, 0), (800, 640))
    subset = SubsetSpec(Path(), face_crop_aug_range=(8.0, 16.0))
    seen = drawn(subset, fit, (1000, 800), FACE)
    assert {one.resized[0] for one in seen} <= set(range(640, 801))
    assert len({one.resized for one in seen}) > 80
    assert set(drawn(subset, fit, (1000, 800), "cat.png")) == {augment.plain(fit)}


def test_only_faces_of_some_size_are_moved() -> None:
    fit = buckets.fit((1000, 800), DatasetSpec(1, (512, 512), ()), 8)
    subset = SubsetSpec(Path(), face_crop_aug_range=(1.0, 2.0))
    seen = drawn(subset, fit, (1000, 800), "cat_0500_0400_0200_0100.png")
    assert {one.resized for one in seen} == {(1000, 800)}
    assert {one.crop[0] for one in seen} == set(range(244 - 10, 244 + 11))
    assert {one.crop[1] for one in seen} == set(range(144 - 10, 144 + 11))
    small = drawn(subset, fit, (1000, 800), "cat_0500_0400_0039_0010.png")
    assert {one.crop for one in small} == {(244, 144)}


def test_random_crops_around_a_face_reach_far() -> None:
    fit = buckets.fit((1000, 800), DatasetSpec(1, (512, 512), ()), 8)
    subset = SubsetSpec(Path(), face_crop_aug_range=(1.0, 1.0), random_crop=True)
    seen = drawn(subset, fit, (1000, 800), "cat_0500_0400_0200_0100.png", 2000)
    lefts, tops = ({one.crop[axis] for one in seen} for axis in (0, 1))
    assert (min(lefts), max(lefts), min(tops), max(tops)) == (0, 488, 0, 288)
    assert len(lefts) > 350
    assert len(tops) > 200


def test_a_picture_smaller_than_its_bucket_is_enlarged_as_ever() -> None:
    fit = buckets.fit((300, 200), DatasetSpec(1, (512, 512), ()), 8)
    subset = SubsetSpec(Path(), face_crop_aug_range=(2.0, 4.0))
    seen = set(drawn(subset, fit, (300, 200), "cat_0010_0100_0005_0005.png"))
    assert seen == {Augmentation(False, (0, 0), fit.resized)}


@given(
    size=st.tuples(st.integers(8, 900), st.integers(8, 900)),
    resolution=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    face=st.tuples(*4 * [st.integers(0, 1000)]),
    reach=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    random_crop=st.booleans(),
    enable_bucket=st.booleans(),
    epoch=st.integers(1, 50),
)
@settings(max_examples=300)
def test_cuts_lie_inside(
    size: tuple[int, int],
    resolution: tuple[int, int],
    face: tuple[int, int, int, int],
    reach: tuple[float, float],
    random_crop: bool,
    enable_bucket: bool,
    epoch: int,
) -> None:
    spec = DatasetSpec(1, (8 * resolution[0], 8 * resolution[1]), (), enable_bucket=enable_bucket, min_bucket_reso=64)
    fit = buckets.fit(size, spec, 8)
    subset = SubsetSpec(Path(), random_crop=random_crop, face_crop_aug_range=(min(reach), max(reach)))
    key = "a_" + "_".join(map(str, face)) + ".png"
    one = draw(subset, fit, seed=3, epoch=epoch, key=key, repeat=2, size=size)
    for start, length, side in zip(one.crop, one.resized, fit.bucket, strict=True):
        assert 0 <= start <= length - side
    ratio = [length / side for length, side in zip(one.resized, size, strict=True)]
    slack = [1 / side for side in size]
    assert abs(ratio[0] - ratio[1]) <= sum(slack) or one.resized == fit.resized or min(one.resized) in fit.bucket


@given(
    size=st.tuples(st.integers(16, 160), st.integers(16, 160)),
    orientation=st.integers(1, 8),
    flip=st.booleans(),
    random_crop=st.booleans(),
    face=st.booleans(),
    interpolation=st.sampled_from([None, "area"]),
    named=st.booleans(),
    epoch=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_a_mask_stays_with_its_picture(
    tmp_path_factory: pytest.TempPathFactory,
    size: tuple[int, int],
    orientation: int,
    flip: bool,
    random_crop: bool,
    face: bool,
    interpolation: str | None,
    named: bool,
    epoch: int,
) -> None:
    """The red of the picture is its mask, as alpha channel or as a picture of its own that is stored upright."""
    folder = tmp_path_factory.mktemp("masks")
    name = "a_20_15_10_8.png" if face else "a.png"
    stored = size if orientation < 5 else size[::-1]
    across, down = np.meshgrid(np.linspace(0, 255, stored[0]), np.linspace(0, 255, stored[1]))
    red = ((across + 2 * down) / 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    layers = [red, np.full_like(red, 9), np.full_like(red, 200), *([] if named else [red])]
    Image.fromarray(np.stack(layers, -1)).save(folder / name, exif=exif)
    if named:
        upright = np.asarray(_upright(Image.fromarray(red), orientation))
        Image.fromarray(upright).save(folder / "mask.png")
    mask = str(folder / "mask.png") if named else None
    record = ImageRecord(folder, name, size, orientation, "", True, 0, 0, 1, False, mask=mask)
    subset = SubsetSpec(
        folder,
        flip_aug=flip,
        random_crop=random_crop,
        alpha_mask=not named,
        face_crop_aug_range=(2.0, 5.0) if face else None,
        resize_interpolation=interpolation,
    )
    fit = buckets.fit(size, DatasetSpec(1, (32, 24), ()), 8)
    one = draw(subset, fit, seed=0, epoch=epoch, key=name, repeat=0, size=size)
    picture = read_picture(record, fit, subset, augmentation=one)
    assert picture.mask is not None
    assert picture.pixels.shape == (24, 32, 3)
    assert picture.mask.shape == (24, 32)
    difference = np.abs(picture.mask.astype(int) - picture.pixels[..., 0])
    assert difference.max() <= (0 if size[0] >= one.resized[0] and size[1] >= one.resized[1] else 12)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import ImageOps

    image.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(image)


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    room=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    start=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    masked=st.booleans(),
)
def test_flipped_twice_is_the_same(
    size: tuple[int, int], room: tuple[int, int], start: tuple[int, int], masked: bool
) -> None:
    resized = (size[0] + room[0], size[1] + room[1])
    crop = (min(start[0], room[0]), min(start[1], room[1]))
    draws = np.random.default_rng(sum(size))
    pixels = draws.integers(0, 256, (resized[1], resized[0], 3), dtype=np.uint8)
    picture = Picture(pixels, pixels[..., 0].copy() if masked else None)
    plain = cut(picture, size, Augmentation(False, crop, resized))
    turned = cut(picture, size, Augmentation(True, crop, resized))
    twice = cut(turned, size, Augmentation(True, (0, 0), size))
    assert np.array_equal(twice.pixels, plain.pixels)
    assert np.array_equal(turned.pixels, plain.pixels[:, ::-1])
    assert (plain.mask is None) is not masked
    if masked:
        assert plain.mask is not None
        assert turned.mask is not None
        assert twice.mask is not None
        assert np.array_equal(turned.mask, turned.pixels[..., 0])
        assert np.array_equal(twice.mask, plain.mask)
    assert scaled(picture, resized).pixels is pixels


def test_colours_leave_the_mask_alone(tmp_path: Path, make_picture: Callable[..., Path]) -> None:
    make_picture(tmp_path / "a.png", (40, 32))
    Image.fromarray(np.arange(40 * 32, dtype=np.uint16).astype(np.uint8).reshape(32, 40)).save(tmp_path / "m.png")
    record = ImageRecord(tmp_path, "a.png", (40, 32), 1, "", True, 0, 0, 1, False, mask=str(tmp_path / "m.png"))
    fit = buckets.fit((40, 32), DatasetSpec(1, (32, 32), ()), 8)
    plain = read_picture(record, fit, SubsetSpec(tmp_path))
    for shift in (ColorShift("hue", 6.0), ColorShift("gamma", 0.96)):
        changed = read_picture(record, fit, SubsetSpec(tmp_path), augmentation=replace(augment.plain(fit), color=shift))
        assert not np.array_equal(changed.pixels, plain.pixels)
        assert np.array_equal(changed.pixels, shift_color(plain.pixels, shift))
        assert changed.mask is not None
        assert plain.mask is not None
        assert np.array_equal(changed.mask, plain.mask)
