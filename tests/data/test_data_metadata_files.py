"""Metadata files and JSONL lists: every spelling of a name, exact captions, and one clear line for what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.data.sources.listing import Findings, Listed
from library.data.sources.metadata_files import join_tags, list_jsonl, list_metadata
from library.options.specs import CaptionSpec, Columns, SubsetSpec
from tests.data.conftest import MakePicture

Write = Callable[[str, Any], SubsetSpec]


@pytest.fixture
def folder(tmp_path: Path, make_picture: MakePicture) -> Path:
    """Pictures a.png, b.jpg, sub/c.webp."""
    for name in ("a.png", "b.jpg", "sub/c.webp"):
        make_picture(tmp_path / "pictures" / name, (8, 8))
    return tmp_path / "pictures"


def spec_of(folder: Path, name: str, content: Any, **how: Any) -> SubsetSpec:
    """A subset with a metadata file beside the folder: text or bytes as they are, a list as JSONL, a table as JSON."""
    path = folder.parent / name
    if isinstance(content, list):
        content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in content)
    elif isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False, indent=1)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = how.pop("source", "metadata")
    return SubsetSpec(image_dir=how.pop("image_dir", folder), source=source, metadata_file=path, **how)


def read(spec: SubsetSpec) -> tuple[list[Listed], Findings]:
    findings = Findings()
    return (list_jsonl if spec.source == "jsonl" else list_metadata)(spec, findings), findings


def good(spec: SubsetSpec) -> dict[str, str | None]:
    """Captions by key."""
    listed, findings = read(spec)
    assert not findings.problems, findings.problems
    assert [one.key for one in listed] == sorted(one.key for one in listed)
    return {one.key: one.caption for one in listed}


def wrong(spec: SubsetSpec) -> str:
    """The only problem."""
    _, findings = read(spec)
    assert len(findings.problems) == 1, findings.problems
    return str(findings.problems[0])


def test_captions_and_tags(folder: Path) -> None:
    entries: dict[str, dict[str, Any]] = {
        "b.jpg": {"caption": "a photo", "tags": "red, blue", "image_size": [1, 1]},
        "a.png": {"caption": "", "tags": "red, blue"},
        "sub/c.webp": {"caption": "only a caption", "train_resolution": [8, 8], "unknown": {"x": [1]}},
    }
    expected = {"a.png": "red, blue", "b.jpg": "a photo,red, blue", "sub/c.webp": "only a caption"}
    assert good(spec_of(folder, "meta.json", entries)) == expected
    lines = [{"image_path": name, **entry} for name, entry in entries.items()]
    assert good(spec_of(folder, "meta.jsonl", lines)) == expected
    spaced = spec_of(folder, "meta.json", entries, caption=CaptionSpec(separator=" | "))
    assert good(spaced)["b.jpg"] == "a photo | red, blue"


@pytest.mark.parametrize(
    ("caption", "tags", "wildcards", "expected"),
    [
        ("a", "t", False, "a;t"),
        ("", "t", False, "t"),
        ("", "", True, ""),
        ("a", "", False, "a"),
        ("a", "t\nu", True, "a;t;u"),
        ("a", "t\r\n\nu\n", False, "a;t;u"),
        ("a\n\nb\n", "t", True, "a;t\nb;t"),
        ("\na\nb", "t", False, "a;t"),
        (" \n ", "t", True, "t"),
        ("a {x|y}\nb", "t", True, "a {x|y};t\nb;t"),
    ],
)
def test_joining(caption: str, tags: str, wildcards: bool, expected: str) -> None:
    assert join_tags(caption, tags, ";", wildcards) == expected


@given(caption=st.text("ab ,{|}\n", max_size=12), tags=st.text("xy, \n", max_size=12), wildcards=st.booleans())
def test_every_line_gets_the_tags(caption: str, tags: str, wildcards: bool) -> None:
    joined = join_tags(caption, tags, "#", wildcards)
    lines = [line.strip() for line in caption.split("\n") if line.strip()]
    lines = lines if wildcards else lines[:1]
    flat = "#".join(line.strip() for line in tags.split("\n") if line.strip())
    assert "\n" not in joined or wildcards
    if not lines:
        assert joined == flat
    else:
        assert joined.split("\n") == [f"{line}#{flat}" if flat else line for line in lines]


@pytest.mark.parametrize("wildcards", [False, True])
def test_lines_end_where_those_of_caption_files_do(folder: Path, wildcards: bool) -> None:
    odd = "a\u2028b\x85c\x0bd\x1ce"
    assert join_tags(f"{odd}\rnext", f"{odd}\ru", ";", wildcards).split("\n")[0] == f"{odd};{odd};u"
    texts = [f" \n  {odd} \r\n\nsecond\n", " \n\t", "plain"]
    caption = CaptionSpec(wildcards=wildcards)
    names = ["a.png", "b.jpg", "sub/c.webp"]
    expected = [f"{odd}\nsecond" if wildcards else odd, "", "plain"]
    rows = [{"image": f"pictures/{name}", "text": text} for name, text in zip(names, texts, strict=True)]
    listed, findings = read(spec_of(folder, "rows.jsonl", rows, source="jsonl", caption=caption))
    assert [one.caption for one in listed] == expected
    assert ["1 of 3 captions are empty" in notice for notice in findings.notices] == [True]
    entries = {name: {"caption": text} for name, text in zip(names, texts, strict=True)}
    listed, findings = read(spec_of(folder, "meta.json", entries, caption=caption))
    assert [one.caption for one in listed] == expected
    assert ["1 of 3 pictures have neither" in notice for notice in findings.notices] == [True]


def test_every_spelling_of_a_name(folder: Path, make_picture: MakePicture) -> None:
    elsewhere = make_picture(folder.parent / "elsewhere" / "d e.PNG", (8, 8))
    spellings = {
        "a.png": ["a.png", "a", "./a.png", "sub/../a.png", str(folder / "a.png"), str(folder / "a"), ".\\a.png"],
        "sub/c.webp": ["sub/c.webp", "sub/c", "sub\\c.webp", "sub\\c", "sub//c", str(folder / "sub/c")],
        str(elsewhere): ["../elsewhere/d e.PNG", "../elsewhere/d e", str(elsewhere), "..\\elsewhere\\d e"],
    }
    for key, names in spellings.items():
        for name in names:
            assert good(spec_of(folder, "meta.json", {name: {"caption": "x"}})) == {key: "x"}, name
            assert good(spec_of(folder, "meta.jsonl", [{"image_path": name, "caption": "x"}])) == {key: "x"}, name


def test_names_are_found_through_links(folder: Path, make_picture: MakePicture) -> None:
    """An absolute name that spells the folder differently still gives the short key."""
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert good(spec_of(folder, "meta.json", {str(folder / "a.png"): {"caption": "x"}}, image_dir=link)) == {
        "a.png": "x"
    }


def test_odd_names(folder: Path, make_picture: MakePicture) -> None:
    names = ["ü 猫.png", "back\\slash.png", "two\nlines.png", "dots.v1.2.png", "sub/.hidden.png"]
    for name in names:
        make_picture(folder / name, (8, 8))
    assert set(good(spec_of(folder, "meta.json", {name: {"caption": "x"} for name in names}))) == set(names)
    assert list(good(spec_of(folder, "meta.json", {"dots.v1.2": {"caption": "x"}}))) == ["dots.v1.2.png"]


def test_relative_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    entries = {"a": {"caption": "x"}, str(folder / "b.jpg"): {"caption": "y"}}
    assert good(spec_of(folder, "meta.json", entries, image_dir=Path("pictures"))) == {"a.png": "x", "b.jpg": "y"}


def test_places_in_the_file(folder: Path) -> None:
    listed, _ = read(spec_of(folder, "meta.jsonl", '\n{"image_path": "a", "caption": "x"}\r\n\r\n{"image_path": "b"}'))
    assert [(one.key, one.where) for one in listed] == [("a.png", "meta.jsonl:2"), ("b.jpg", "meta.jsonl:4")]


def test_a_stem_of_several_pictures(folder: Path, make_picture: MakePicture) -> None:
    make_picture(folder / "a.webp", (8, 8))
    spec = spec_of(folder, "meta.json", '{\n "b": {},\n "a": {}\n}')
    assert "meta.json:3: a may be a.png, a.webp" in wrong(spec)
    assert good(spec_of(folder, "meta.json", {"a.png": {}, "a.webp": {}})) == {"a.png": "", "a.webp": ""}


def test_missing_pictures_are_told_together(folder: Path) -> None:
    message = wrong(spec_of(folder, "meta.json", {**{f"gone{i:02}": {} for i in range(13)}, "a": {}}))
    assert "it names pictures that aren't there (13 of 14): gone00, gone01," in message
    assert "gone09 and 3 more" in message
    assert str(folder) in message
    lines = [{"image_path": "a"}, {"image_path": "C:\\data\\x.png"}, {"image_path": "/gone/y.png"}]
    message = wrong(spec_of(folder, "meta.jsonl", lines))
    assert "C:\\data\\x.png (line 2), /gone/y.png (line 3)" in message
    assert "there is no folder" in wrong(spec_of(folder, "meta.json", {"a": {}}, image_dir=folder / "no"))


def test_no_picture_format(folder: Path) -> None:
    (folder / "x.tiff").write_bytes(b"x")
    assert "x.tiff isn't a picture that can be read" in wrong(spec_of(folder, "meta.json", {"x.tiff": {}}))


def test_pictures_that_are_not_named(folder: Path, make_picture: MakePicture) -> None:
    for i in range(3):
        make_picture(folder / f"more{i}.png", (8, 8))
    (folder / "a.txt").write_text("no picture")
    _, findings = read(spec_of(folder, "meta.json", {"a": {"caption": "x"}, "sub/c": {"caption": "x"}}))
    assert findings.notices == [f"{folder}: 4 pictures there aren't named in meta.json, and not used"]


def test_empty_entries_are_counted(folder: Path) -> None:
    _, findings = read(spec_of(folder, "meta.json", {"a": {}, "b": {"caption": None, "tags": ""}}))
    assert not findings.problems
    assert "2 of 2 pictures have neither caption nor tags there" in findings.notices[-1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("meta.json", "", "meta.json: the file is empty"),
        ("meta.jsonl", "\ufeff\n \n", "meta.jsonl: the file is empty"),
        ("meta.json", "{}", "meta.json: it names no pictures"),
        ("meta.json", '[{"image_path": "a"}]', "it holds a list; write a table"),
        ("meta.json", '{"a": {},\n "b": {"caption": "x",}}', "meta.json:2: isn't valid JSON"),
        ("meta.json", '{"a": {}}\n{"b": {}}', "a line .jsonl"),
        ("meta.json", b'{"a":\n {"caption": "\xe4"}}', "meta.json:2: it isn't UTF-8 text (byte 0xe4)"),
        ("meta.json", '{"a": {},\n"b": "x"}', "meta.json:2: b is a text, not a table"),
        ("meta.json", '{"a": {},\n"b": {"caption": 5}}', "meta.json:2: caption of b is a number, not a text"),
        ("meta.json", '{"a": {"tags": ["x"]}}', "meta.json:1: tags of a is a list, not a text"),
        ("meta.json", '{"a": {},\n"a": {}}', 'meta.json:2: "a" stands twice'),
        ("meta.json", '{"a": {},\n"a.png": {}}', "meta.json:2: a.png stands twice: its name is written two ways"),
        ("meta.json", '{\n"a": {"tags": "", "tags": "x"}}', 'meta.json:2: "tags" stands twice in "a"'),
        ("meta.json", '{"": {}}', "meta.json:1: image_path is empty"),
        ("meta.json", "[" * 100000, "without end"),
        ("meta.jsonl", '{"image_path": "a"}\n{"image_path": "b"', "meta.jsonl:2: isn't valid JSON"),
        ("meta.jsonl", '{"image_path": "a"}\n["b"]', "meta.jsonl:2: holds a list, not a table"),
        ("meta.jsonl", '{"image_path": "a"} {"image_path": "b"}', "meta.jsonl:1: more than one JSON object"),
        (
            "meta.jsonl",
            '{"image_path": "a"}\n\n{"image_path": "a.png"}',
            "meta.jsonl:3: a.png stands twice, see meta.js",
        ),
        ("meta.jsonl", '{"image_path": "a", "tags": 1}', "meta.jsonl:1: tags of a is a number"),
        ("meta.jsonl", '{"image_path": 1}', "meta.jsonl:1: image_path is a number"),
        ("meta.jsonl", '{"image": "a", "text": "x"}', "meta.jsonl:1: there is no image_path, but image, text"),
        ("meta.jsonl", '{"image_path": "a", "image_path": "b"}', 'meta.jsonl:1: "image_path" stands twice'),
    ],
)
def test_what_is_wrong(name: str, content: str | bytes, words: str, folder: Path) -> None:
    assert words in wrong(spec_of(folder, name, content))


def test_no_such_file(folder: Path) -> None:
    spec = spec_of(folder, "meta.json", {})
    (folder.parent / "meta.json").unlink()
    assert wrong(spec).endswith("meta.json: there is no such file")


def test_many_bad_entries_are_counted(folder: Path) -> None:
    _, findings = read(spec_of(folder, "meta.json", {f"x{i}": 1 for i in range(30)}))
    assert len(findings.problems) == 11
    assert "20 more of 30" in str(findings.problems[-1])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(content=st.one_of(st.binary(max_size=60), st.text('{}[]":,a\n1\\', max_size=40).map(str.encode)))
def test_garbage_never_crashes(content: bytes, folder: Path) -> None:
    for name, source in (("meta.json", "metadata"), ("meta.jsonl", "metadata"), ("list.jsonl", "jsonl")):
        listed, findings = read(spec_of(folder, name, content, source=source))
        assert listed or findings.problems
        assert all("\n" not in str(problem) for problem in findings.problems)


def test_columns(folder: Path, make_picture: MakePicture) -> None:
    """Paths are relative to the file, keys to the subset's folder."""
    mask = make_picture(folder.parent / "masks/a.png", (8, 8))
    lines = [
        {"picture": "pictures/b.jpg", "words": "second", "extra": 1},
        {"picture": str(folder / "a.png"), "words": "first", "matte": "masks/a.png"},
        {"picture": "pictures/sub/c.webp", "words": "", "matte": None},
    ]
    columns = Columns("picture", "words", "matte")
    listed, findings = read(spec_of(folder, "list.jsonl", lines, source="jsonl", columns=columns, masks=True))
    assert listed == [
        Listed("a.png", "first", str(mask), "list.jsonl:2"),
        Listed("b.jpg", "second", None, "list.jsonl:1"),
        Listed("sub/c.webp", "", None, "list.jsonl:3"),
    ]
    assert [line.rpartition(": ")[2] for line in findings.notices] == ["1 of 3 captions are empty"]
    beside = spec_of(folder, "list.jsonl", lines, source="jsonl", columns=columns, image_dir=folder.parent)
    listed, findings = read(beside)
    assert [(one.key, one.mask) for one in listed] == [
        (f"pictures/{x}", None) for x in ("a.png", "b.jpg", "sub/c.webp")
    ]
    assert "--masked_loss uses it" in findings.notices[0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"image": "a", "caption": "x"}], "list.jsonl:1: there is no column text, but caption, image"),
        ([{"imag": "a", "text": "x"}], "list.jsonl:1: there is no column image, but imag, text; did you mean imag?"),
        ([{"image": "pictures/a", "text": "x"}, {"image": "b", "text": None}], "list.jsonl:2: column text is null"),
        ([{"image": ["a"], "text": "x"}], "list.jsonl:1: column image is a list, not a text"),
        ([{"image": "", "text": "x"}], "list.jsonl:1: column image is empty"),
        ([{"image": "a", "text": "x"}], "it names pictures that aren't there (1 of 1): a (line 1)"),
        ([{"image": "pictures/a", "text": "x", "mask": "no.png"}], "it names masks that aren't there (1 of 1): no.png"),
        ([{"image": "pictures/a", "text": "x", "mask": 3}], "column mask is a number"),
        ([{"image": f"pictures/{x}", "text": "x"} for x in ("a", "a.png")], "pictures/a.png stands twice, see list.js"),
    ],
)
def test_what_is_wrong_with_columns(lines: list[dict[str, Any]], words: str, folder: Path) -> None:
    assert words in wrong(spec_of(folder, "list.jsonl", lines, source="jsonl", masks=True))


def test_mask_column_of_another_name_must_be_there(folder: Path) -> None:
    spec = spec_of(
        folder,
        "list.jsonl",
        [{"image": "pictures/a", "text": "x"}],
        source="jsonl",
        masks=True,
        columns=Columns(mask="matte"),
    )
    assert "no line has the column matte" in wrong(spec)
