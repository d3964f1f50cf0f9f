"""Captions and tags in files: metadata tables as sd-scripts writes them, and text files beside pictures."""

import json
import os
from pathlib import Path

import pytest

from library.data.captioning.metadata_files import Table, problem_with_output, read_table, write_table, write_text
from library.data.captioning.pictures import find_work
from library.data.captioning.store import Sidecars, TableFile, open_store, problem_with_extension
from library.errors import UserError

TABLE: Table = {
    "b.png": {"tags": "a girl, 愛", "image_size": [64, 32], "extra": {"nested": [1, None, True]}},
    "a.png": {"caption": 'with "quotes"\nand lines'},
}


@pytest.mark.parametrize("name", ["meta.json", "META.JSONL"])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    write_table(path, TABLE)
    assert read_table(path) == TABLE
    assert list(read_table(path)) == ["b.png", "a.png"]
    assert "愛" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_what_other_programs_read(tmp_path: Path) -> None:
    write_table(tmp_path / "a.json", TABLE)
    write_table(tmp_path / "a.jsonl", TABLE)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == TABLE
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"image_path": name, **entry} for name, entry in TABLE.items()]


def test_names_that_are_no_unicode_stay(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    write_table(tmp_path / "a.json", {name: {"tags": "x"}})
    assert read_table(tmp_path / "a.json") == {name: {"tags": "x"}}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "", "the file is empty"),
        ("a.json", '{"a": {}, "a": {}}', '"a" stands twice'),
        ("a.json", '{"a": "text"}', "a is a text, not a table"),
        ("a.json", "[1]", "holds a list"),
        ("a.json", '{"a": {}\n', "a.json:2: isn't valid JSON"),
        ("a.json", '{"a": {}}\n{"b": {}}', "name a file with one object a line .jsonl"),
        ("a.json", "[" * 100_000, "tables within tables"),
        ("a.jsonl", '{"image_path": "a"}\n\n{"image_path": "a"}', 'a.jsonl:3: "a" stands twice'),
        ("a.jsonl", '{"caption": "a"}', "has no image_path"),
        ("a.jsonl", '{\n"a": {}}', "name a file that is one table .json"),
        ("a.jsonl", "3", "holds a number"),
    ],
)
def test_damaged_tables(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / name)
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": "\xe4"}')
    for name, said in (("a.json", "isn't UTF-8"), ("none.json", "there is no such file"), ("", "can't be read")):
        with pytest.raises(UserError, match=said):
            read_table(tmp_path / name)


def test_a_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_table(path, TABLE)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"can't be written \(No space left"):
        write_table(path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text(encoding="utf-8") == "new"


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    assert problem_with_output(tmp_path / "in" / "deep" / "a.json", "--out") is None
    (tmp_path / "file").touch()
    (tmp_path / "d.json").mkdir()
    for path, said in (("a.txt", "ends in .txt"), ("a", "no ending"), ("d.json", "a folder"), ("file/a.json", "not a")):
        assert said in str(problem_with_output(tmp_path / path, "--out"))


@pytest.mark.parametrize("key", ["{folder}/in/a.png", "in/a.png", "in/a", "{folder}/in/a"])
def test_a_table_is_continued_under_its_own_names(tmp_path: Path, key: str) -> None:
    path, picture = tmp_path / "m.json", tmp_path / "in" / "a.png"
    named = key.format(folder=tmp_path)
    write_table(path, {named: {"caption": "kept", "tags": " old\n\n older "}, "x.png": {"tags": "other"}})
    store = TableFile(path, tmp_path, "tags", relative=False)
    assert store.has(picture)
    assert store.read(picture) == "old\nolder"
    assert not store.has(tmp_path / "in" / "b.png")
    store.write(picture, "new", (6, 4))
    assert read_table(path)[named]["tags"] == " old\n\n older "
    store.close()
    assert read_table(path) == {
        named: {"caption": "kept", "tags": "new", "image_size": [6, 4]},
        "x.png": {"tags": "other"},
    }


def test_what_somebody_wrote_as_a_list_is_not_replaced(tmp_path: Path) -> None:
    write_table(tmp_path / "m.json", {"a.png": {"tags": ["mine"]}})
    store = TableFile(tmp_path / "m.json", tmp_path, "tags", relative=True)
    assert store.has(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"tags of a.png is no text"):
        store.read(tmp_path / "a.png")


@pytest.mark.parametrize("relative", [False, True])
def test_new_names_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(Path("pics"), ".txt", Path("m.jsonl"), "caption", relative=relative)
    store.write(Path("pics/in/a.png"), "text", (6, 4))
    store.close()
    named = "in/a.png" if relative else str(tmp_path / "pics/in/a.png")
    assert read_table(Path("m.jsonl")) == {named: {"caption": "text", "image_size": [6, 4]}}


def test_text_files(tmp_path: Path) -> None:
    store, picture = Sidecars("caption"), tmp_path / "a.b.png"
    assert not store.has(picture)
    assert store.read(picture) == ""
    store.write(picture, "a cat", (1, 1))
    assert (tmp_path / "a.b.caption").read_text(encoding="utf-8") == "a cat\n"
    assert store.read(picture) == "a cat"
    (tmp_path / "a.b.caption").write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        store.read(picture)


def test_extensions_that_would_destroy_something() -> None:
    assert problem_with_extension("txt", "--e") is None
    for extension in ("", ".", ".PNG", "jpg", "/x"):
        assert problem_with_extension(extension, "--e") is not None


def test_what_is_left_to_do(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "a.png", "in/c.webp", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b.txt").touch()
    store = Sidecars(".txt")
    work = find_work(tmp_path, store, recursive=False, again=False)
    assert [path.name for path in work.todo] == ["a.jpg"]
    assert work.done == 1
    assert "a.png differ" in work.notices[0]
    again = find_work(tmp_path, store, recursive=True, again=True)
    assert [path.name for path in again.todo] == ["a.jpg", "b.png", "c.webp"]
    table = TableFile(tmp_path / "m.json", tmp_path, "tags", relative=True)
    assert len(find_work(tmp_path, table, recursive=True, again=False).todo) == 4
    with pytest.raises(UserError, match="there is no such folder"):
        find_work(tmp_path / "none", store, recursive=False, again=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--recursive"):
        find_work(tmp_path / "empty", store, recursive=False, again=False)


def test_pictures_that_share_an_entry_share_its_text(tmp_path: Path) -> None:
    pictures = [tmp_path / "a.jpg", tmp_path / "a.png"]
    for picture in pictures:
        picture.touch()
    (tmp_path / "meta.json").write_text('{"a": {"caption": "mine"}}', encoding="utf-8")
    store = TableFile(tmp_path / "meta.json", tmp_path, "tags", relative=False)
    work = find_work(tmp_path, store, recursive=False, again=False)
    assert work.todo == (pictures[0],)
    assert "a.png" in "".join(work.notices)
    (tmp_path / "meta.json").write_text("{}", encoding="utf-8")
    store = TableFile(tmp_path / "meta.json", tmp_path, "tags", relative=False)
    work = find_work(tmp_path, store, recursive=False, again=False)
    assert work.todo == tuple(pictures)
