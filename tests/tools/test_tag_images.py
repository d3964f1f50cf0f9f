"""Pictures are tagged by a tagger whose outputs are known, into text files or metadata, and what is done stays."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.captioning.metadata_files import read_table
from library.data.captioning.tagger import Tagger
from library.data.sources.listing import Findings
from library.data.sources.metadata_files import list_metadata
from library.options.specs import SubsetSpec
from tests.captioning_models import LABELS, write_mapped_tagger, write_tagger
from tests.hub_stand_in import hub_stand_in
from tests.programs import ROOT, environment, tool

main = tool("tag_images")
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives the tags of a picture's colour: red 1girl and a character, green long_hair, blue hair_ribbon and ^_^."""
    weights = np.zeros((3, len(LABELS)))
    weights[2, [2, 6]] = weights[1, 3] = weights[0, [4, 5]] = 0.9 / 255
    weights[2, 1] = 0.5 / 255
    bias = np.zeros(len(LABELS))
    bias[0] = 0.1
    return write_tagger(tmp_path_factory.mktemp("tagger"), weights, bias)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "in").mkdir(parents=True)
    for name, colour in (("red.png", RED), ("green.png", GREEN), ("in/blue.png", BLUE)):
        Image.new("RGB", (20, 12), colour).save(folder / name)
    return folder


def run(folder: Path, tagger: Path | str, *flags: object) -> int:
    return main([str(folder), "--repo_id", str(tagger), *map(str, flags)])


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.rglob("*.txt")}


# A picture of 20 x 12 stands in a white square: 0.6 of it has the colour, 0.4 is white, which has all three.
# Tags of the colour reach 0.9, those of other colours 0.36, the second rating 0.5 or 0.2.


def test_tags_go_beside_the_pictures(pictures: Path, tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pictures, tagger, "--thresh", 0.5, "--frequency_tags", "--batch_size", 2) == 0
    assert texts(pictures) == {"red": "1girl, saber_(armor)_(fate)\n", "green": "long_hair\n"}
    out, err = capsys.readouterr()
    assert out == "1girl: 1\nlong_hair: 1\nsaber_(armor)_(fate): 1\n"
    assert "2 pictures got tags" in err
    assert run(pictures, tagger, "--thresh", 0.5, "--recursive", "--caption_separator", "; ") == 0
    assert texts(pictures)["blue"] == "^_^; hair_ribbon\n"
    assert "1 picture got tags; 2 had them before" in capsys.readouterr().err


def test_the_usual_threshold_takes_white_in(pictures: Path, tagger: Path) -> None:
    assert run(pictures, tagger, "--character_threshold", 0.5) == 0
    assert texts(pictures)["green"] == "1girl, long_hair, ^_^, hair_ribbon\n"
    assert run(pictures, tagger, "--general_threshold", 0.5, "--overwrite") == 0
    assert texts(pictures)["green"] == "long_hair, saber_(armor)_(fate)\n"


def test_all_that_can_be_said_of_tags(pictures: Path, tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--remove_underscore", "--character_tags_first", "--character_tag_expand", "--use_rating_tags"]
    flags += ["--undesired_tags", "hair_ribbon, smile", "--tag_replacement", r"long hair,hair\, long;tree,oak"]
    assert run(pictures, tagger, *flags, "--always_first_tags", "^_^", "--recursive") == 0
    expected = "^_^, sensitive, saber (armor), fate, 1girl, hair, long\n"
    assert texts(pictures) == {"red": expected, "green": expected, "blue": expected}
    err = capsys.readouterr().err
    assert "--undesired_tags: this tagger has no smile" in err
    assert "--tag_replacement: this tagger has no tree" in err
    assert run(pictures, tagger, "--overwrite", "--thresh", 0.5, "--use_rating_tags_as_last_tag") == 0
    assert texts(pictures)["red"] == "1girl, saber_(armor)_(fate), sensitive\n"
    both = ["--use_rating_tags", "--use_rating_tags_as_last_tag"]
    assert run(pictures, tagger, "--overwrite", "--thresh", 0.5, *both) == 0
    assert texts(pictures)["red"] == "sensitive, 1girl, saber_(armor)_(fate)\n"
    assert "--use_rating_tags_as_last_tag: has no effect with --use_rating_tags" in capsys.readouterr().err


def test_tags_are_added(pictures: Path, tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "red.txt").write_text("my word,1girl", encoding="utf-8")
    (pictures / "green.txt").write_bytes(b"\xff")
    assert run(pictures, tagger, "--thresh", 0.5, "--append_tags") == 0
    assert (pictures / "red.txt").read_text(encoding="utf-8") == "my word, 1girl, saber_(armor)_(fate)\n"
    assert (pictures / "green.txt").read_bytes() == b"\xff"
    assert "green.txt: caption isn't UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_one_file_of_metadata_trains(pictures: Path, tagger: Path, tmp_path: Path, ending: str) -> None:
    output = tmp_path / f"meta.{ending}"
    flags = ["--thresh", 0.5, "--output_path", output, "--recursive"]
    assert run(pictures, tagger, *flags) == 0
    table = read_table(output)
    assert table[str(pictures / "green.png")] == {"tags": "long_hair", "image_size": [20, 12]}
    assert texts(pictures) == {}
    findings = Findings()
    listed = list_metadata(SubsetSpec(image_dir=pictures, metadata_file=output), findings)
    assert [(one.key, one.caption) for one in listed] == [
        *(("green.png", "long_hair"), ("in/blue.png", "^_^, hair_ribbon"), ("red.png", "1girl, saber_(armor)_(fate)")),
    ]
    assert findings.problems == []


def test_a_stopped_run_goes_on(
    pictures: Path, tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, calls = tmp_path / "meta.json", []
    flags = ["--thresh", 0.5, "--output_path", output, "--relative_paths"]
    original = Tagger.__call__

    def stopped(self: Tagger, prepared: list[np.ndarray]) -> np.ndarray:
        calls.append(len(prepared))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, prepared)

    monkeypatch.setattr(Tagger, "__call__", stopped)
    assert run(pictures, tagger, *flags) == 130
    assert list(read_table(output)) == ["green.png"]
    assert run(pictures, tagger, *flags) == 0
    assert list(read_table(output)) == ["green.png", "red.png"]
    assert len(calls) == 3
    assert run(pictures, tagger, *flags) == 0
    assert len(calls) == 3
    assert "all 2 pictures have tags" in capsys.readouterr().err


def test_bad_pictures_are_left_out(pictures: Path, tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "bad.png").write_bytes((pictures / "red.png").read_bytes()[:-15])
    (pictures / "text.jpg").write_text("no picture", encoding="utf-8")
    assert run(pictures, tagger) == 0
    err = capsys.readouterr().err
    assert "bad.png: the file is truncated" in err
    assert "2 pictures got tags" in err
    assert "2 pictures left out" in err
    assert sorted(texts(pictures)) == ["green", "red"]
    assert run(pictures, tagger) == 0
    assert "0 pictures got tags; 2 had them before" in capsys.readouterr().err
    for name in ("red", "green"):
        (pictures / f"{name}.png").unlink()
    assert run(pictures, tagger) == 2
    assert "none of the 2 pictures could be used" in capsys.readouterr().err


def test_the_other_kind_of_tagger(pictures: Path, tmp_path: Path) -> None:
    weights = np.array([[0.0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 3, 4]])
    tags = [("1girl", "General"), ("cat_girl", "General"), ("hero", "Character"), ("bad quality", "Quality")]
    place = write_mapped_tagger(tmp_path / "mapped", weights, np.zeros(4), tags)
    assert run(pictures, place, "--thresh", 0.6, "--use_quality_tags") == 0
    assert texts(pictures) == {"red": "bad quality, hero, 1girl\n", "green": "bad quality\n"}


def test_a_tagger_of_the_hub(
    pictures: Path, tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    kept, cache = tmp_path / "kept", tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert run(pictures, "some/tagger", "--model_dir", kept) == 2
    assert "some/tagger is not here, and HF_HUB_OFFLINE forbids" in capsys.readouterr().err
    with hub_stand_in() as hub:
        hub.add("models/some/tagger")
        for name in ("model.onnx", "selected_tags.csv"):
            hub.files["models/some/tagger"][name] = (tagger / name).read_bytes()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        assert run(pictures, "some/tagger", "--model_dir", kept, "--thresh", 0.5) == 0
    assert texts(pictures)["green"] == "long_hair\n"
    assert (kept / "some_tagger" / "model.onnx").is_file()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(pictures, "some/tagger", "--model_dir", kept, "--overwrite") == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--thresh", 2, "--batch_size", 0], ["--thresh: 2.0 isn't a probability", "--batch_size: 0 isn't 1 or more"]),
        (["--tag_replacement", "a"], ['--tag_replacement: "a" isn\'t one tag']),
        (["--append_tags", "--overwrite"], ["--append_tags: contradicts --overwrite"]),
        (["--output_path", "a.csv"], ["--output_path: a.csv ends in .csv"]),
        (["--caption_extension", ".png"], ["--caption_extension: .png is what pictures end in"]),
        (["--repo_id", "/nowhere"], ["--repo_id: there is no folder /nowhere"]),
        (["--repo_id", "."], ["--repo_id: . holds no tagger"]),
    ],
)
def test_bad_input(
    pictures: Path, tagger: Path, capsys: pytest.CaptureFixture[str], flags: list[object], said: list[str]
) -> None:
    assert run(pictures, tagger, *flags) == 2
    err = capsys.readouterr().err
    assert all(line in err for line in said)
    assert texts(pictures) == {}


def test_without_onnxruntime(
    pictures: Path, tagger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("library.data.captioning.tagger.find_spec", lambda name: None)
    assert run(pictures, tagger) == 2
    assert "install it with pip install 'lorasmith[tag]'" in capsys.readouterr().err


def test_torch_is_never_imported(pictures: Path, tagger: Path) -> None:
    arguments = [str(pictures), "--repo_id", str(tagger), "--thresh", "0.5"]
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from tools import tag_images
before = "numpy" in sys.modules
done = tag_images.main({arguments!r})
print(json.dumps([before, done, [name for name in ("torch", "transformers", "diffusers") if name in sys.modules]]))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(result.stdout) == [False, 0, []]
    assert texts(pictures)["green"] == "long_hair\n"
