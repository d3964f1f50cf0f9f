"""What a scan makes of each kind of source: sub-folders, names as captions, masks, pictures held out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from library.data.sources.scan import scan, survey
from library.errors import UserError
from library.options.specs import DatasetSpec, SubsetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


def test_sub_folders(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    for name in ("b.png", "deep/a.png", "deep/er/c.jpg", "a/z.webp", ".hidden/d.png", "deep/.e.png"):
        make_picture(tmp_path / name, caption=f"caption of {name}")
    make_picture(tmp_path / "deep" / "face_1_2_3_4.png")
    (tmp_path / "deep" / "face.txt").write_text("a face")
    flat = scan([make_spec(tmp_path)]).records
    assert [one.key for one in flat] == ["b.png"]
    found = scan([make_spec(tmp_path, recursive=True)])
    assert [(one.key, one.caption) for one in found.records] == [
        ("a/z.webp", "caption of a/z.webp"),
        ("b.png", "caption of b.png"),
        ("deep/a.png", "caption of deep/a.png"),
        ("deep/er/c.jpg", "caption of deep/er/c.jpg"),
        ("deep/face_1_2_3_4.png", "a face"),
    ]
    assert all(one.path.is_file() for one in found.records)
    assert found.counts[0].found == 5


def test_links_in_a_circle_are_told_and_not_followed(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "top" / "sub" / "a.png")
    make_picture(tmp_path / "outside" / "b.png")
    (tmp_path / "top" / "sub" / "round").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "again").symlink_to(tmp_path / "top" / "sub")
    (tmp_path / "top" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(tmp_path)
    found = scan([make_spec(tmp_path / "top", recursive=True)])
    assert [one.key for one in found.records] == ["out/b.png", "sub/a.png"]
    (notice,) = [one for one in found.notices if "not followed" in one]
    assert "again, out/back, sub/round" in notice


def test_captions_from_names(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    for name in ("red_car.png", "sub/a_small__cat_120_130_50_60.jpg", "dog_1_2.png", "1_2_3_4_5.png"):
        make_picture(tmp_path / name, caption="not used")
    found = scan([make_spec(tmp_path, recursive=True, caption_from="filename")])
    assert {one.key: one.caption for one in found.records} == {
        "red_car.png": "red car",
        "sub/a_small__cat_120_130_50_60.jpg": "a small cat",
        "dog_1_2.png": "dog 1 2",
        "1_2_3_4_5.png": "1",
    }
    assert all(one.captioned for one in found.records)


def test_class_tokens_for_all(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png", caption="not used")
    found = scan([make_spec(tmp_path, caption_from="class_tokens", class_tokens="sks cat")])
    assert [(one.caption, one.captioned) for one in found.records] == [("sks cat", False)]
    assert found.notices == ()
    empty = scan([make_spec(tmp_path, caption_from="class_tokens")])
    assert [one.caption for one in empty.records] == [""]
    assert any("every caption is empty" in notice for notice in empty.notices)


def jsonl(path: Path, rows: list[dict[str, str]]) -> SubsetSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SubsetSpec(image_dir=path.parent, source="jsonl", metadata_file=path, caption_extension=".txt")


def test_rows_of_a_file(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "pictures" / "a.png", caption="not used")
    elsewhere = make_picture(tmp_path / "elsewhere" / "b.png", (70, 40))
    rows = [{"image": "pictures/a.png", "text": "first"}, {"image": str(elsewhere), "text": "second"}]
    found = scan([make_spec(jsonl(tmp_path / "rows.jsonl", rows))])
    assert {(one.path, one.caption, one.size) for one in found.records} == {
        (tmp_path / "pictures" / "a.png", "first", (80, 64)),
        (elsewhere, "second", (70, 40)),
    }
    assert found.counts[0].name == str(tmp_path / "rows.jsonl")


def test_a_bad_picture_of_a_file_is_named_with_its_line(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    rows = [{"image": "a.png", "text": "first"}, {"image": "b.png", "text": "second"}]
    with pytest.raises(UserError, match=r"b\.png .*rows\.jsonl.*2.*not a picture"):
        scan([make_spec(jsonl(tmp_path / "rows.jsonl", rows))])


def test_metadata_beside_a_folder(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "pictures" / "a.png")
    make_picture(tmp_path / "folder" / "b.png", caption="from a file")
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"a.png": {"caption": "a cat", "tags": "red, small"}}))
    listed = SubsetSpec(image_dir=tmp_path / "pictures", source="metadata", metadata_file=path)
    found = scan([make_spec(listed), make_spec(tmp_path / "folder")])
    assert [(one.dataset, one.caption) for one in found.records] == [(0, "a cat,red, small"), (1, "from a file")]


def test_masks_of_a_folder(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    for name in ("a.png", "b.jpg"):
        make_picture(tmp_path / "pictures" / name)
        make_picture((tmp_path / "masks" / name).with_suffix(".png"))
    spec = make_spec(tmp_path / "pictures", mask_dir=tmp_path / "masks")
    records = scan([spec]).records
    assert [one.mask for one in records] == [str(tmp_path / "masks" / name) for name in ("a.png", "b.png")]
    assert all(one.mask and one.mask_bytes == Path(one.mask).stat().st_size for one in records)
    make_picture(tmp_path / "masks" / "b.png", (30, 30))
    with pytest.raises(UserError, match=r"b\.png: mask has 30x30 pixels"):
        scan([spec])
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(UserError):
        scan([spec])


def test_held_out_pictures_do_not_train(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    for i in range(10):
        make_picture(tmp_path / "train" / f"{i}.png", (16, 16))
    for i in range(4):
        make_picture(tmp_path / "reg" / f"{i}.png", (16, 16))
    reg = SubsetSpec(image_dir=tmp_path / "reg", num_repeats=2, is_reg=True, validation_split=0.3)
    found = scan([make_spec(tmp_path / "train", reg, num_repeats=3, validation_split=0.3)])
    training = [one for one in found.records if not one.is_reg]
    assert len(found.held_out) == 3
    assert {one.key for one in found.held_out}.isdisjoint(one.key for one in training)
    assert len(training) == 7
    assert [one.repeats for one in found.held_out] == [1] * 3
    assert not any(one.is_reg for one in found.held_out)
    assert [one.repeats for one in found.records if one.is_reg] == [6, 5, 5, 5]
    assert [(row.found, row.held_out, row.repeats) for row in found.counts] == [(10, 3, 21), (4, 0, 21)]


def test_a_dataset_for_validation_alone(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "train" / "a.png")
    make_picture(tmp_path / "check" / "b.png")
    found = scan([make_spec(tmp_path / "train"), make_spec(tmp_path / "check", validation_split=1.0)])
    assert [one.key for one in found.records] == ["a.png"]
    assert [(one.key, one.dataset) for one in found.held_out] == [("b.png", 1)]


def test_one_file_in_two_subsets_is_not_a_folder_twice(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "a.png")
    make_picture(tmp_path / "b.png")
    first = jsonl(tmp_path / "one.jsonl", [{"image": "a.png", "text": "a"}])
    second = jsonl(tmp_path / "two.jsonl", [{"image": "b.png", "text": "b"}])
    found = scan([make_spec(first, second, replace(first, where="again"))])
    assert [one.key for one in found.records] == ["a.png", "b.png"]
    assert sum("stands twice" in notice for notice in found.notices) == 1


def test_a_hundred_shared_captions_are_counted(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    for i in range(14):
        make_picture(tmp_path / f"{i:02d}.png", (8, 8), caption="c")
        make_picture(tmp_path / f"{i:02d}.jpg", (8, 8))
    notices = [notice for notice in survey([make_spec(tmp_path)]).notices if "share" in notice]
    assert len(notices) == 11
    assert "4 more caption files are shared" in notices[-1]
