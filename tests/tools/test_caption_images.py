"""Pictures are described by tiny BLIP and GIT models: what transformers itself says of them, kept and gone on with."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.captioning.captioner import Captioner, find_model, kind_of
from library.data.captioning.metadata_files import read_table
from tests.captioning_models import write_blip, write_git
from tests.hub_stand_in import hub_stand_in
from tests.programs import ROOT, environment, tool

main = tool("caption_images")
SHORT = ("--max_length", "12")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("captioners")
    return {"blip": write_blip(place / "blip"), "git": write_git(place / "git")}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        draws = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(draws).resize((40 + number, 50), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    return folder


def run(folder: Path, *flags: object) -> int:
    return main([str(folder), "--device", "cpu", *map(str, flags)])


def captions(folder: Path, extension: str = ".caption") -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*{extension}"))}


def by_transformers(model: Path, folder: Path, **how: object) -> dict[str, str]:
    """What the model says when it is asked picture by picture, without any of our code."""
    from transformers import AutoProcessor, BlipForConditionalGeneration, GitForCausalLM

    kind = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
    processor = AutoProcessor.from_pretrained(model)
    network = {"blip": BlipForConditionalGeneration, "git": GitForCausalLM}[kind].from_pretrained(model).eval()
    found = {}
    for path in sorted(folder.glob("*.png")):
        words = {"text": "a picture of"} if kind == "blip" else {}
        given = processor(images=Image.open(path).convert("RGB"), return_tensors="pt", **words)
        if kind == "blip":
            tokens = network.generate(given["pixel_values"], given["input_ids"], do_sample=False, **how)
        else:
            tokens = network.generate(pixel_values=given["pixel_values"], do_sample=False, **how)
        text = processor.decode(tokens[0], skip_special_tokens=True)
        found[path.stem] = text.rpartition("a picture of")[2].strip() + "\n"
    return found


def test_blip_searches(models: dict[str, Path], pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model_id", models["blip"], *SHORT, "--beam_search", "--num_beams", 2, "--batch_size", 3)
    assert run(pictures, *flags) == 0
    expected = by_transformers(models["blip"], pictures, num_beams=2, max_length=12, min_length=5)
    assert captions(pictures) == expected
    assert len(set(expected.values())) > 1
    assert "5 pictures got captions" in capsys.readouterr().err


def test_commands_of_guis(
    models: dict[str, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: list[str] = []

    def found(name: str, _: str) -> Path:
        names.append(name)
        return models["blip"]

    monkeypatch.setattr("library.data.captioning.captioner.find_model", found)
    address = "https://storage.example.com/models/BLIP/models/model_large_caption.pth"
    flags = ["--batch_size=1", "--top_p=0.9", "--max_length=12", "--min_length=5", f"--caption_weights={address}"]
    assert run(pictures, *flags, "--num_beams=2", "--beam_search", "--caption_extension=.txt") == 0
    expected = by_transformers(models["blip"], pictures, num_beams=2, max_length=12, min_length=5)
    assert captions(pictures, ".txt") == expected
    told = capsys.readouterr().err
    assert "--top_p: has no effect with --beam_search" in told
    assert "--caption_weights: Salesforce/blip-image-captioning-large is taken" in told
    assert run(pictures, *flags, "--num_beams=3", "--caption_extension=.drawn") == 0
    assert "--num_beams: has no effect without --beam_search" in capsys.readouterr().err
    assert run(pictures, *flags, "--caption_extension=.plain") == 0
    assert captions(pictures, ".drawn") == captions(pictures, ".plain")
    assert set(names) == {"Salesforce/blip-image-captioning-large"}


def test_git_takes_the_likeliest(models: dict[str, Path], pictures: Path) -> None:
    assert run(pictures, "--git", "--model_id", models["git"], *SHORT, "--batch_size", 2) == 0
    expected = by_transformers(models["git"], pictures, max_length=12)
    assert captions(pictures) == expected
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_draws_are_the_same_in_any_batch(models: dict[str, Path], pictures: Path, kind: str) -> None:
    flags = ("--model_id", models[kind], *SHORT, "--top_p", 0.95)
    found = []
    for number, batch in enumerate((1, 2, 5)):
        assert run(pictures, *flags, "--batch_size", batch, "--caption_extension", f".{number}") == 0
        found.append(captions(pictures, f".{number}"))
    assert found[0] == found[1] == found[2]
    (pictures / "0.png").unlink()
    assert run(pictures, *flags, "--caption_extension", ".fewer") == 0
    assert captions(pictures, ".fewer") == {name: text for name, text in found[0].items() if name != "0"}
    assert run(pictures, *flags, "--seed", 43, "--caption_extension", ".other") == 0
    assert captions(pictures, ".other") != captions(pictures, ".fewer")


def test_a_stopped_run_goes_on(
    models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, calls = tmp_path / "meta.jsonl", []
    flags = ("--model_id", models["blip"], *SHORT, "--output_path", output, "--relative_paths", "--batch_size", 2)
    original: Callable[..., list[str]] = Captioner.__call__

    def stopped(self: Captioner, prepared: list[np.ndarray], names: list[str]) -> list[str]:
        calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, prepared, names)

    monkeypatch.setattr(Captioner, "__call__", stopped)
    assert run(pictures, *flags) == 130
    assert list(read_table(output)) == ["0.png", "1.png"]
    assert run(pictures, *flags) == 0
    resumed = read_table(output)
    assert calls == [["0.png", "1.png"], ["2.png", "3.png"], ["2.png", "3.png"], ["4.png"]]
    output.unlink()
    assert run(pictures, *flags) == 0
    assert read_table(output) == resumed
    assert resumed["4.png"]["image_size"] == [44, 50]


def test_done_and_bad_pictures(models: dict[str, Path], pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "0.caption").write_text("mine", encoding="utf-8")
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:-15])
    flags = ("--git", "--model_id", models["git"], *SHORT)
    assert run(pictures, *flags, "--remove_words", "--debug") == 0
    assert captions(pictures)["0"] == "mine"
    assert sorted(captions(pictures)) == ["0", "2", "3", "4"]
    err = capsys.readouterr().err
    assert "1.png: the file is truncated" in err
    assert "3 pictures got captions; 1 had them before" in err
    assert run(pictures, *flags) == 0
    assert "1 picture left out" in capsys.readouterr().err
    (pictures / "1.png").unlink()
    assert run(pictures, *flags) == 0
    assert "all 4 pictures have captions" in capsys.readouterr().err
    assert run(pictures, *flags, "--overwrite") == 0
    assert captions(pictures)["0"] != "mine"


def test_models_that_cannot_be_used(
    models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    broken = write_blip(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for flags, said in (
        (("--model_id", broken), "lack 1 tensors, such as vision_model.encoder.layers.0.mlp.fc1.weight"),
        (("--git", "--model_id", models["blip"]), "--git: "),
        (("--model_id", models["git"], "--prompt", "a"), "--prompt: GIT models take none"),
        (("--model_id", models["blip"], "--max_length", 3, "--min_length", 4), "--min_length: 4 is more than"),
        (("--model_id", models["blip"], "--max_length", 2, "--min_length", 0), "--max_length: 2 tokens leave none"),
        (("--model_id", models["git"], "--max_length", 9000), "--max_length: 9000 tokens are more than"),
        (("--model_id", tmp_path), "is no captioner that is known"),
        (("--model_id", "nobody/nothing"), "nobody/nothing is not here, and HF_HUB_OFFLINE forbids"),
        (("--model_id", models["blip"], "--device", "nowhere"), "--device: nowhere can't be used"),
    ):
        assert run(pictures, *flags) == 2
        assert said in capsys.readouterr().err
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert run(pictures, "--model_id", broken) == 2
    assert "can't be loaded" in capsys.readouterr().err
    assert captions(pictures) == {}


def test_flags_are_checked_together_without_torch(pictures: Path) -> None:
    arguments = [str(pictures), "--caption_weights", "mine.pth", "--batch_size", "0"]
    arguments += ["--top_p", "2", "--caption_extension", ".jpg", "--relative_paths"]
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tools import caption_images
done = caption_images.main({arguments!r})
print(done, [name for name in ("torch", "transformers") if name in sys.modules])
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "2 []"
    for line in (
        "--caption_weights: mine.pth is in the layout of BLIP's authors; use --model_id Salesforce/blip",
        "--batch_size: 0 isn't 1 or more",
        "--top_p: 2.0 isn't above 0",
        "--caption_extension: .jpg is what pictures end in",
        "--relative_paths: has no meaning without --output_path",
    ):
        assert line in result.stderr


def test_a_model_of_the_hub(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_stand_in() as hub:
        hub.add("models/some/git")
        for path in models["git"].iterdir():
            hub.files["models/some/git"][path.name] = path.read_bytes()
        hub.files["models/some/git"]["training_state.bin"] = b"large"
        address = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "ENDPOINT", hub.address)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
            place = find_model("some/git", "--model_id")
    assert sorted(path.name for path in place.iterdir()) == sorted(path.name for path in models["git"].iterdir())
    assert kind_of(place, "--model_id") == "git"
    assert find_model("some/git", "--model_id") == place


def test_a_device_without_memory(
    models: dict[str, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> list[str]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Captioner, "_captions", full)
    assert run(pictures, "--model_id", models["blip"], "--batch_size", 4) == 2
    assert "--batch_size: 4 pictures are more than the memory of cpu takes" in capsys.readouterr().err
