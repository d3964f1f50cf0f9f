"""merge_captions_to_metadata.py, merge_tags_to_metadata.py and clean_captions.py: from sidecar files to a metadata file
that trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from library.data.captioning.cleaning import clean_caption, clean_tags
from tests.pictures import make_pictures
from tests.programs import ROOT, environment, tool


def call(name: str, *words: object) -> int:
    return tool(name)([str(word) for word in words])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures with tags, two of them with captions too."""
    folder = make_pictures(tmp_path / "made", count=3, sizes=((64, 64),)) / "2_thing"
    for path in sorted(folder.glob("*.txt"))[:2]:
        path.with_suffix(".caption").write_text(f"a thing, {path.stem}\nand more\n", encoding="utf-8")
    return folder


def test_captions_and_tags_join_what_is_there(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "meta.json"
    out.write_text('{"picture00": {"caption": "old", "train_resolution": [64, 64]}, "other": {"tags": "x"}}')
    assert call("merge_captions_to_metadata", pictures, out) == 0
    assert "1 of 3 pictures have no .caption file: picture02.jpg" in capsys.readouterr().err
    assert call("merge_tags_to_metadata", pictures, out) == 0
    found = json.loads(out.read_text())
    first = {
        "caption": "a thing, picture00\nand more",
        "train_resolution": [64, 64],
        "tags": "thing, tag0, red, a place",
    }
    assert found["picture00"] == first
    assert found["other"] == {"tags": "x"} and found["picture02"] == {"tags": "thing, tag2, red, a place"}


def test_the_file_trains(pictures: Path, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "meta.jsonl"
    assert call("merge_tags_to_metadata", pictures.parent, out, "--recursive", "--full_path") == 0
    import train_network

    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--network_module", "networks.lora", "--resolution", "64"]
    flags += ["--train_data_dir", pictures, "--in_json", out, "--output_dir", tmp_path / "out", "--dry_run"]
    assert train_network.main([str(flag) for flag in flags]) == 0
    assert "thing, tag0, red, a place" in capsys.readouterr().out


def test_entries_keep_the_names_that_they_have(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    near = pictures.relative_to(tmp_path)
    names = [str(pictures / "picture00.jpg"), "picture01.png", str(near / "picture02.jpg")]
    (tmp_path / "meta.json").write_text(json.dumps({name: {"caption": "old"} for name in names}))
    assert call("merge_tags_to_metadata", near, "meta.json") == 0
    found = json.loads((tmp_path / "meta.json").read_text())
    assert list(found) == names
    assert [entry["tags"].split(", ")[1] for entry in found.values()] == ["tag0", "tag1", "tag2"]
    assert call("merge_tags_to_metadata", near, "meta.json", "--full_path", "--recursive") == 0
    assert list(json.loads((tmp_path / "meta.json").read_text())) == names


def test_input_of_its_own_and_other_endings(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('{"picture00": {"tags": "kept"}}')
    words = [pictures, tmp_path / "out.json", "--in_json", tmp_path / "in.json", "--caption_extention", "txt"]
    assert call("merge_captions_to_metadata", *words) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["picture00"] == {"tags": "kept", "caption": "thing, tag0, red, a place"}
    assert json.loads((tmp_path / "in.json").read_text()) == {"picture00": {"tags": "kept"}}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["{none}", "{out}.json"], "there is no folder"),
        (["{pictures}", "{out}.json", "--recursive"], "needs --full_path"),
        (["{pictures}", "{out}.toml"], "name a .json or .jsonl file"),
        (["{pictures}", "{out}.json", "--in_json", "{none}"], "--in_json: there is no file"),
        (["{pictures}", "{out}.json", "--caption_extension", ".nothing"], "no picture has a .nothing file"),
        (["{tmp}", "{out}.json"], "no pictures there"),
    ],
)
def test_bad_input(
    flags: list[str], told: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"none": tmp_path / "none", "out": tmp_path / "out", "pictures": pictures, "tmp": tmp_path}
    assert call("merge_captions_to_metadata", *(flag.format(**places) for flag in flags)) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_pictures_of_one_name_and_captions_that_are_no_text(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "picture00.png").write_bytes((pictures / "picture00.jpg").read_bytes())
    (pictures / "picture01.txt").write_bytes(b"\xff\xfe")
    assert call("merge_tags_to_metadata", pictures, tmp_path / "meta.json") == 2
    told = capsys.readouterr().err
    assert "another picture has the same name" in told and "isn't UTF-8 text" in told


@pytest.mark.parametrize(
    ("tags", "clean"),
    [
        ("long_hair, ^_^, blue_eyes, rating:safe", "long hair, ^_^, blue eyes"),
        ("shirt, white shirt, hair ornament, red hair ornament", "white shirt, red hair ornament"),
        ("shirt, t-shirt", "shirt, t-shirt"),
        ("1girl, blue eyes, red eyes, black hair, long hair", "1girl, blue eyes, red eyes, black hair, long hair"),
        ("2girls, blue eyes, red eyes, black hair, blonde hair, long hair", "2girls, long hair"),
        ("2boys, blue eyes, black hair, long hair, short hair", "2boys, blue eyes, black hair"),
        ("multiple girls, ponytail, twin braid, long sleeves", "multiple girls, long sleeves"),
        ("a, a,, b ,", "a, b"),
        ("", ""),
    ],
)
def test_tags_are_tidied(tags: str, clean: str) -> None:
    assert clean_tags(tags) == clean


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("a young woman and a lady", "a girl and a girl"),
        ("two cartoon women, people", "two girls, girls"),
        ("anime characters", "girls"),
        ("anime anime anime female", "girl"),
        ("a cartoon image of a personal computer", "an image of a personal computer"),
        ("a female woman", "a girl"),
    ],
)
def test_captions_are_tidied_by_whole_words(caption: str, clean: str) -> None:
    assert clean_caption(caption) == clean


def test_a_file_is_cleaned_and_the_rest_of_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    entries = {"a": {"tags": "long_hair", "caption": "a woman", "x": 1}, "b": {"tags": None}}
    source.write_text(json.dumps(entries))
    assert call("clean_captions", source, target, "--debug") == 0
    assert json.loads(target.read_text()) == {
        "a": {"tags": "long hair", "caption": "a girl", "x": 1},
        "b": {"tags": None},
    }
    told = capsys.readouterr().err
    assert "from: long_hair" in told and "2 texts of 2 entries changed" in told and "1 of 2 entries have no" in told
    assert call("clean_captions", source, source, "--only_tags") == 0
    assert json.loads(source.read_text())["a"] == {"tags": "long hair", "caption": "a woman", "x": 1}
    assert call("clean_captions", "folder", source, target) == 0
    assert "left aside" in capsys.readouterr().err
    source.write_text('{"a": {"tags": ["x"]}}')
    assert call("clean_captions", source, target) == 2
    assert "tags of a is no text" in capsys.readouterr().err
    assert call("clean_captions", source) == 2
    assert call("clean_captions", source, target, "--only_tags", "--only_captions") == 2


def test_nothing_heavy_is_imported_where_an_interrupt_would_not_be_told() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tools import clean_captions, merge_captions_to_metadata, merge_tags_to_metadata
print([name for name in ("numpy", "PIL", "pydantic") if name in sys.modules])
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
