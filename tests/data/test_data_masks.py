"""Mask pictures: found by name in every layout, and judged before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from library.data.sources.index import remember_damages
from library.data.sources.listing import Findings, Listed
from library.data.sources.masks import Masked, check_masks, pair_masks
from library.data.sources.scan import survey
from library.options.specs import DatasetSpec, SubsetSpec
from tests.data.conftest import MakePicture


def spec_of(tmp_path: Path, **settings: Any) -> SubsetSpec:
    return SubsetSpec(image_dir=tmp_path / "10_cat", mask_dir=tmp_path / "masks", **settings)


def listed(*keys: str) -> list[Listed]:
    return [Listed(key) for key in keys]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("10_cat", "masks"):
        (tmp_path / name).mkdir()


def test_by_name_whatever_the_extension(tmp_path: Path, make_picture: MakePicture) -> None:
    masks = tmp_path / "masks"
    for name in ("a.png", "b.JPG", "c d.webp", "ü.PNG"):
        make_picture(masks / name)
    findings = Findings()
    found = pair_masks(spec_of(tmp_path), listed("a.jpg", "b.png", "c d.webp", "ü.jpeg"), findings)
    names = {"a.jpg": "a.png", "b.png": "b.JPG", "c d.webp": "c d.webp", "ü.jpeg": "ü.PNG"}
    assert found == {key: str(masks / name) for key, name in names.items()}
    assert findings == Findings()


def test_without_a_folder_nothing_is_paired(tmp_path: Path) -> None:
    findings = Findings()
    assert pair_masks(SubsetSpec(image_dir=tmp_path), listed("a.png"), findings) == {}
    assert findings == Findings()


def test_folder_named_like_the_subset(tmp_path: Path, make_picture: MakePicture) -> None:
    make_picture(tmp_path / "masks/a.png")
    inner = make_picture(tmp_path / "masks/10_cat/a.png")
    assert pair_masks(spec_of(tmp_path), listed("a.jpg"), Findings()) == {"a.jpg": str(inner)}


def test_sub_folders(tmp_path: Path, make_picture: MakePicture) -> None:
    """The same relative folder, so that pictures of one name don't share a mask."""
    for name in ("a.png", "x/a.png", "x/y/a.png"):
        make_picture(tmp_path / "masks" / name)
    found = pair_masks(spec_of(tmp_path, recursive=True), listed("a.jpg", "x/a.jpg", "x/y/a.jpg"), Findings())
    assert found == {f"{name}.jpg": str(tmp_path / f"masks/{name}.png") for name in ("a", "x/a", "x/y/a")}


def test_pictures_from_elsewhere_have_theirs_in_the_folder(tmp_path: Path, make_picture: MakePicture) -> None:
    mask = make_picture(tmp_path / "masks/a.png")
    assert pair_masks(spec_of(tmp_path), listed("/elsewhere/a.jpg"), Findings()) == {"/elsewhere/a.jpg": str(mask)}


def test_masks_of_the_source_come_first(tmp_path: Path) -> None:
    findings = Findings()
    assert pair_masks(spec_of(tmp_path), [Listed("a.png", mask="/x/a.png")], findings) == {}
    assert not findings.problems


def test_missing_masks_are_told_together(tmp_path: Path, make_picture: MakePicture) -> None:
    make_picture(tmp_path / "masks/p00.png")
    (tmp_path / "masks/p01.txt").write_text("no picture")
    findings = Findings()
    pair_masks(spec_of(tmp_path, where="data.toml:7 image_dir"), listed(*(f"p{i:02}.jpg" for i in range(14))), findings)
    (problem,) = findings.problems
    assert problem.where == "data.toml:7 image_dir"
    assert f"pictures without a mask in {tmp_path / 'masks'} (13 of 14): p01.jpg, p02.jpg," in problem.wrong
    assert problem.wrong.endswith("p10.jpg and 3 more")


def test_masks_without_a_picture_are_counted(tmp_path: Path, make_picture: MakePicture) -> None:
    for i in range(5):
        make_picture(tmp_path / f"masks/p{i}.png")
    findings = Findings()
    pair_masks(spec_of(tmp_path), listed("p0.jpg"), findings)
    assert not findings.problems
    assert findings.notices == [
        f"{tmp_path / 'masks'}: 4 masks belong to no picture: p1.png, p2.png, p3.png and 1 more"
    ]


def test_two_masks_of_one_name(tmp_path: Path, make_picture: MakePicture) -> None:
    make_picture(tmp_path / "masks/a.png")
    make_picture(tmp_path / "masks/a.jpg")
    findings = Findings()
    pair_masks(spec_of(tmp_path), listed("a.png"), findings)
    assert ["a.png (a.jpg, a.png)" in problem.wrong for problem in findings.problems] == [True]
    assert not findings.notices


def test_folder_of_masks_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "masks").rmdir()
    findings = Findings()
    pair_masks(spec_of(tmp_path), listed("a.png"), findings)
    assert ["there is no such folder" in problem.wrong for problem in findings.problems] == [True]


def test_folder_of_masks_is_that_of_the_pictures(tmp_path: Path) -> None:
    spec = SubsetSpec(image_dir=tmp_path / "10_cat", mask_dir=tmp_path / "masks/../10_cat")
    findings = Findings()
    assert pair_masks(spec, listed("a.png"), findings) == {}
    assert ["folder of the pictures" in problem.wrong for problem in findings.problems] == [True]


def test_headers_are_judged(tmp_path: Path, make_picture: MakePicture) -> None:
    """Upright sizes count: a mask may be turned by EXIF where its picture isn't."""
    good = make_picture(tmp_path / "masks/good.png", (80, 64))
    turned = make_picture(tmp_path / "masks/turned.jpg", (64, 80), orientation=6)
    small = make_picture(tmp_path / "masks/small.png", (40, 32))
    broken = tmp_path / "masks/broken.png"
    broken.write_bytes(good.read_bytes()[:-30])
    empty = tmp_path / "masks/empty.png"
    empty.touch()
    paths = (good, turned, small, broken, empty, tmp_path / "masks/gone.png")
    findings = Findings()
    lengths = check_masks([Masked(f"/p/{path.name}", (80, 64), str(path)) for path in paths], findings)
    assert lengths == [good.stat().st_size, turned.stat().st_size, 0, 0, 0, 0]
    told = [str(problem) for problem in findings.problems]
    assert told[0].startswith(f"{small}: mask has 40x32 pixels, but its picture /p/small.png has 80x64")
    assert [path.name in line for path, line in zip(paths[2:], told, strict=True)] == [True] * 4
    assert "truncated" in told[1]
    assert "empty" in told[2]


def test_many_bad_masks_are_counted(tmp_path: Path, make_picture: MakePicture) -> None:
    mask = make_picture(tmp_path / "masks/a.png", (8, 8))
    findings = Findings()
    assert check_masks([Masked("/p/a.png", (9, 9), str(mask))] * 25, findings, threads=4) == [0] * 25
    assert len(findings.problems) == 11
    assert "15 more of 25" in str(findings.problems[-1])


def test_damage_that_decoding_found_is_told(tmp_path: Path, make_picture: MakePicture) -> None:
    """Until the mask is replaced; also where a whole scan asks."""
    make_picture(tmp_path / "10_cat/a.png")
    mask = make_picture(tmp_path / "masks/a.png")
    remember_damages({mask: "its data is damaged"})
    spec = DatasetSpec(1, (64, 64), (spec_of(tmp_path),))
    wanted = f"{mask}: mask can't be used: its data is damaged; replace or remove it"
    findings = Findings()
    assert check_masks([Masked("/p/a.png", (80, 64), str(mask))], findings) == [0]
    assert list(map(str, findings.problems)) == [wanted]
    assert list(map(str, survey([spec]).problems)) == [wanted]
    make_picture(tmp_path / "new.png").replace(mask)
    found = survey([spec])
    assert found.problems == ()
    assert found.records[0].mask_bytes == mask.stat().st_size
