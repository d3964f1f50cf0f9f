"""Folders of pictures and captions as a user lays them out, well or badly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from library.data.captions import tag_frequency
from library.data.sources.scan import scan, survey
from library.errors import UserError
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


def test_pictures_are_sorted_and_found_flat(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    for name in ("b.png", "a.JPG", "c.webp", ".hidden.png", "deeper/d.png"):
        make_picture(tmp_path / "cats" / name, caption=name)
    records = scan([make_spec(tmp_path / "cats", num_repeats=3)]).records
    assert [(r.key, r.caption, r.repeats, r.captioned) for r in records] == [
        ("a.JPG", "a.JPG", 3, True),
        ("b.png", "b.png", 3, True),
        ("c.webp", "c.webp", 3, True),
    ]
    assert [r.size for r in records] == [(80, 64)] * 3


def test_captions_with_byte_order_mark_and_blank_lines(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("\ufeff\n  first ünit \r\n\r\nsecond\n".encode())
    assert scan([make_spec(tmp_path)]).records[0].caption == "first ünit"
    wild = make_spec(tmp_path, caption=CaptionSpec(wildcards=True))
    assert scan([wild]).records[0].caption == "first ünit\nsecond"


def test_class_tokens_stand_in_and_their_use_is_said(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "a.png", caption="my caption")
    make_picture(tmp_path / "b.png")
    found = scan([make_spec(tmp_path, class_tokens="sks cat")])
    assert [(r.caption, r.captioned) for r in found.records] == [("my caption", True), ("sks cat", False)]
    assert any("1 of 2 pictures have no .txt file" in notice and "sks cat" in notice for notice in found.notices)
    assert (found.counts[0].found, found.counts[0].captioned) == (2, 1)
    empty = scan([make_spec(tmp_path)])
    assert empty.records[1].caption == ""
    assert any("empty caption" in notice for notice in empty.notices)


def test_names_of_face_detection_share_a_caption(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "anna_120_130_50_60.png")
    (tmp_path / "anna.txt").write_text("a face")
    assert scan([make_spec(tmp_path)]).records[0].caption == "a face"


def test_txt_is_used_when_no_extension_was_named(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "a.png", caption="from txt")
    found = scan([make_spec(SubsetSpec(image_dir=tmp_path))])
    assert found.records[0].caption == "from txt"
    assert any("no .caption captions; its 1 .txt files are used" in notice for notice in found.notices)


def test_templates_in_place_of_captions_are_told_once(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "a.png", caption="from txt")
    make_picture(tmp_path / "b.png")
    about = CaptionSpec(templates=("a photo of {}",), subject="mycat")
    around = f"{tmp_path}: captions are templates around mycat"
    unused = f"{around}; its caption files aren't used (--keep_original_captions would)"
    for named in (False, True):
        subset = SubsetSpec(image_dir=tmp_path, caption=about, class_tokens="mycat", caption_extension_named=named)
        assert scan([make_spec(subset)]).notices == ((around,) if named else (unused,))
    kept = SubsetSpec(image_dir=tmp_path, caption=replace(about, keep_original=True), class_tokens="mycat")
    told = " / ".join(scan([make_spec(kept)]).notices)
    assert "its 1 .txt files are used" in told and "1 of 2 pictures have no .txt file" in told and "around" not in told
    (tmp_path / "a.txt").write_text("")
    assert scan([make_spec(replace(kept, caption=about))]).notices == (around,)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "a.png", "text": "one"}\n{"image": "b.png", "text": ""}\n')
    listed = replace(kept, caption=about, metadata_file=rows, source="jsonl")
    own = f"{rows}: captions are templates around mycat; its own captions aren't used (--keep_original_captions would)"
    assert scan([make_spec(listed)]).notices == (own,)


def test_a_named_extension_that_nothing_has_stops_the_run(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "a.png", caption="from txt")
    (tmp_path / "a.tags").write_text("tag")
    subset = SubsetSpec(image_dir=tmp_path, caption_extension=".caption", caption_extension_named=True)
    with pytest.raises(UserError, match=r"no picture in .* has a \.caption caption, but there are 1 \.txt, 1 \.tags"):
        scan([make_spec(subset)])
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.tags").unlink()
    assert scan([make_spec(subset)]).records[0].caption == ""


def test_caption_in_another_encoding_names_the_file(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: caption isn't UTF-8 text \(byte 0xe9 at 3\)") as error:
        scan([make_spec(tmp_path)])
    assert len(error.value.problems) == 1


def test_every_unreadable_picture_is_named_up_to_ten(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("I am a text")
    with pytest.raises(UserError) as error:
        scan([make_spec(tmp_path)])
    assert [problem.where for problem in error.value.problems] == [str(tmp_path / "text.png")]
    for i in range(14):
        (tmp_path / f"zero{i:02d}.jpg").touch()
    with pytest.raises(UserError, match="5 more of 15") as error:
        scan([make_spec(tmp_path)])
    assert len(error.value.problems) == 11
    found = survey([make_spec(tmp_path)])
    assert (found.counts[0].found, found.counts[0].unreadable, len(found.records)) == (16, 15, 1)


def test_no_pictures_and_missing_folders(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.heic").touch()
    with pytest.raises(UserError, match=r"no pictures to train on in .*empty") as error:
        scan([make_spec(tmp_path / "empty")])
    assert len(error.value.problems) == 1
    assert any("1 .heic not used" in notice for notice in survey([make_spec(tmp_path / "empty")]).notices)
    with pytest.raises(UserError, match=r"missing can't be read as a folder") as error:
        scan([make_spec(tmp_path / "missing")])
    assert len(error.value.problems) == 1
    make_picture(tmp_path / "good" / "a.png")
    found = scan([make_spec(tmp_path / "good", tmp_path / "empty")])
    assert any("empty: no pictures there; ignored" in notice for notice in found.notices)
    assert [row.ignored for row in found.counts] == ["", "no pictures"]
    with pytest.raises(UserError, match="missing"):
        scan([make_spec(tmp_path / "good", tmp_path / "missing")])
    with pytest.raises(UserError, match="no folder of pictures was named"):
        scan([])


def test_only_regularization_pictures(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="only regularization pictures"):
        scan([make_spec(tmp_path, is_reg=True)])


def test_a_folder_twice_counts_once_per_dataset(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "cats" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "cats")
    found = scan([make_spec(tmp_path / "cats", tmp_path / "link")])
    assert len(found.records) == 1
    assert any("stands twice" in notice for notice in found.notices)
    both = scan([make_spec(tmp_path / "cats"), make_spec(tmp_path / "cats", resolution=(96, 96))])
    assert [(r.dataset, r.key) for r in both.records] == [(0, "a.png"), (1, "a.png")]


def test_folders_without_repeats_are_ignored(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "cats" / "a.png")
    make_picture(tmp_path / "dogs" / "a.png")
    dogs = SubsetSpec(image_dir=tmp_path / "dogs", num_repeats=0)
    found = scan([make_spec(tmp_path / "cats", dogs)])
    assert [r.path.parent.name for r in found.records] == ["cats"]
    assert any("num_repeats is 0" in notice for notice in found.notices)


def test_pictures_with_one_stem_are_noticed(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png")
    make_picture(tmp_path / "a.jpg", caption="both")
    found = scan([make_spec(tmp_path)])
    assert [r.caption for r in found.records] == ["both", "both"]
    assert any("a.jpg and a.png share one caption file" in notice for notice in found.notices)


@pytest.mark.parametrize(
    ("train", "repeats", "reg", "reg_repeats", "expected"),
    [
        (10, 3, 4, 2, [8, 8, 7, 7]),
        (2, 1, 4, 1, [1, 1]),
        (2, 5, 3, 4, [4, 4, 4]),
        (3, 2, 2, 3, [3, 3]),
        (1, 5, 3, 1, [2, 2, 1]),
    ],
)
def test_regularization_is_balanced(
    tmp_path: Path,
    make_picture: MakePicture,
    make_spec: MakeSpec,
    train: int,
    repeats: int,
    reg: int,
    reg_repeats: int,
    expected: list[int],
) -> None:
    for i in range(train):
        make_picture(tmp_path / "train" / f"{i:02d}.png", (16, 16))
    for i in range(reg):
        make_picture(tmp_path / "reg" / f"{i:02d}.png", (16, 16))
    subset = SubsetSpec(image_dir=tmp_path / "reg", num_repeats=reg_repeats, is_reg=True)
    found = scan([make_spec(tmp_path / "train", subset, num_repeats=repeats)])
    assert [r.repeats for r in found.records if r.is_reg] == expected
    assert all(r.repeats == repeats for r in found.records if not r.is_reg)
    assert found.counts[1].repeats == sum(expected)
    assert any("not used" in notice for notice in found.notices) == (len(expected) < reg)


def test_tag_frequency(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "5_cat" / "a.png", caption="Cat, Red fur , moon,")
    make_picture(tmp_path / "5_cat" / "b.png", caption="cat, sun")
    specs = [make_spec(tmp_path / "5_cat", num_repeats=5)]
    assert tag_frequency(scan(specs).records, specs) == {"5_cat": {"cat": 2, "red fur": 1, "moon": 1, "sun": 1}}
    two = [*specs, make_spec(tmp_path / "5_cat", resolution=(96, 96))]
    assert tag_frequency(scan(two).records, two) == {"5_cat": {"cat": 2, "red fur": 1, "moon": 1, "sun": 1}}


def test_captions_are_cut_at_line_ends_only(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    """Other signs that some take for line ends, such as U+2028, stay within the line."""
    make_picture(tmp_path / "a.png")
    odd = "one\u2028two\x85three\x0bfour\x1cfive"
    (tmp_path / "a.txt").write_bytes(f" \r{odd}\rsecond\r\n\n third \n".encode())
    assert scan([make_spec(tmp_path)]).records[0].caption == odd
    wild = make_spec(tmp_path, caption=CaptionSpec(wildcards=True))
    assert scan([wild]).records[0].caption == f"{odd}\nsecond\nthird"


def test_many_captions_that_cannot_be_read_are_counted(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    for i in range(25):
        make_picture(tmp_path / f"{i:02d}.png", (8, 8))
        (tmp_path / f"{i:02d}.txt").write_bytes(b"caf\xe9")
    found = survey([make_spec(tmp_path), make_spec(tmp_path, resolution=(96, 96))])
    assert len(found.problems) == 11
    assert str(found.problems[-1]) == "captions: 15 more of 25 that can't be used; mend them all"
