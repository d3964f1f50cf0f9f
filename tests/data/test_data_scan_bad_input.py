"""Folders as they really are: broken, strange and hostile files. Everything is named, nothing hangs or crashes."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.sources.index import NAME
from library.data.sources.scan import scan, survey
from library.errors import UserError
from library.options.specs import DatasetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def text(path: Path) -> None:
    path.write_text("I am a text\n" * 20)


def huge(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))


def no_pixels(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[16:24] = bytes(8)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere.png"))


def link_round(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (empty, "the file is empty"),
        (cut, "truncated"),
        (text, "not a picture"),
        (huge, "more than 178 million pixels; scale it down"),
        (no_pixels, ""),
        (pipe, "not an ordinary file"),
        (link_nowhere, "No such file"),
        (link_round, "symbolic links"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_kind_of_bad_picture_is_named(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec, spoil: Callable[[Path], None], words: str
) -> None:
    make_picture(tmp_path / "good.png", caption="good")
    bad = make_picture(tmp_path / "bad.png")
    spoil(bad)
    with pytest.raises(UserError) as error:
        scan([make_spec(tmp_path)])
    (problem,) = error.value.problems
    assert problem.where == str(bad)
    assert words in f"{problem.wrong}; {problem.advice}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything: run the tests as another user")
def test_files_without_permission(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png", caption="a").chmod(0)
    (make_picture(tmp_path / "b.png", caption="b").with_suffix(".txt")).chmod(0)
    with pytest.raises(UserError, match="Permission denied") as error:
        scan([make_spec(tmp_path)])
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    "name", ["two words.png", "Kätzchen \u732b.png", "line\nbreak.png", "tab\t'quote\".jpg", "%s{}.png"]
)
def test_strange_names_work(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec, name: str) -> None:
    make_picture(tmp_path / name, caption="found")
    (record,) = scan([make_spec(tmp_path)]).records
    assert (record.key, record.caption, record.path.is_file()) == (name, "found", True)
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(UserError) as error:
        scan([make_spec(tmp_path)])
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_unicode(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    whole = make_picture(tmp_path / "a.png")
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        whole.rename(os.fsdecode(strange))
    except OSError:
        pytest.skip("this file system has unicode names only: use another")
    (record,) = scan([make_spec(tmp_path)]).records
    assert record.path.is_file()


def test_folders_named_like_pictures(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png")
    make_picture(tmp_path / "folder.png" / "b.png")
    found = scan([make_spec(tmp_path)])
    assert [one.key for one in found.records] == ["a.png"]
    assert any("folder.png not used: a folder that is named like a picture" in notice for notice in found.notices)
    deep = scan([make_spec(tmp_path, recursive=True)])
    assert [one.key for one in deep.records] == ["a.png", "folder.png/b.png"]


def test_captions_that_are_no_texts(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        make_picture(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfec\0a\0t\0")
    (tmp_path / "b.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    (tmp_path / "c.txt").write_text(" \n\n ")
    (tmp_path / "d.txt").write_text("x" * 200_000 + "\nsecond")
    found = survey([make_spec(tmp_path)])
    assert [Path(one.where).name for one in found.problems] == ["a.txt", "b.txt"]
    assert all("UTF-8" in one.wrong for one in found.problems)
    assert any("captions are empty" in notice for notice in found.notices)
    assert [len(one.caption) for one in found.records][2:] == [0, 200_000]


def test_bad_pictures_are_left_out_when_that_is_asked_for(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    make_picture(tmp_path / "good.png", caption="good")
    for i in range(12):
        (tmp_path / f"bad{i:02d}.png").write_text("text")
    found = scan([make_spec(tmp_path)], skip_bad=True)
    assert [one.key for one in found.records] == ["good.png"]
    told = [notice for notice in found.notices if notice.startswith("left out")]
    assert len(told) == 11
    assert "bad00.png: not a picture" in told[0]
    assert "2 more of 12" in told[-1]
    assert found.counts[0].unreadable == 12
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="none of the pictures can be used"):
        scan([make_spec(tmp_path)], skip_bad=True)


def spoil_pixels(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, len(data) // 2 + 60):
        data[i] = 0
    path.write_bytes(bytes(data))


def test_verifying_finds_what_only_decoding_can_and_remembers_it(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    for i in range(20):
        make_picture(tmp_path / f"{i:02d}.png", (90, 60))
    for i in (3, 17):
        spoil_pixels(tmp_path / f"{i:02d}.png")
    spec = make_spec(tmp_path)
    assert len(scan([spec]).records) == 20
    with pytest.raises(UserError) as error:
        scan([spec], verify=True)
    assert [Path(one.where).name for one in error.value.problems] == ["03.png", "17.png"]
    assert (tmp_path / NAME).is_file()
    again = survey([spec])
    assert [Path(one.where).name for one in again.unreadable] == ["03.png", "17.png"]
    assert len(scan([spec], skip_bad=True).records) == 18


def test_pictures_in_formats_that_are_not_used(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png")
    for name in ("b.gif", "c.svg", "d.TIF"):
        (tmp_path / name).touch()
    found = scan([make_spec(tmp_path)])
    assert any("1 .gif, 1 .svg, 1 .tif not used" in notice for notice in found.notices)
