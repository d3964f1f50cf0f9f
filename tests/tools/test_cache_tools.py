"""The tools that cache, verify and prune: with a real model, as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from library.data.caches import npz
from tests.pictures import make_pictures
from tests.programs import ROOT, environment, tool


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven pictures in a folder of sd-scripts' layout."""
    return make_pictures(tmp_path / "data") / "2_thing"


@pytest.fixture
def flags(tiny_sd1: Path, data: Path) -> list[str]:
    """What both tools and a training are given."""
    bucketed = ["--enable_bucket", "--resolution", "64", "--min_bucket_reso", "32", "--max_bucket_reso", "128"]
    more = ["--bucket_reso_steps", "32", "--caption_extension", ".txt"]
    return ["--pretrained_model_name_or_path", str(tiny_sd1), "--train_data_dir", str(data.parent), *bucketed, *more]


def files(folder: Path, ending: str) -> dict[str, int]:
    found = {path.name: path.stat().st_mtime_ns for path in folder.glob(f"*{ending}")}
    return {name: changed for name, changed in found.items() if name != ".lorasmith-index"}


@pytest.mark.parametrize(
    ("name", "ending"), [("cache_latents", "_sd.npz"), ("cache_text_encoder_outputs", "_te_outputs.npz")]
)
def test_cache_verify_and_start_again(
    data: Path, flags: list[str], capsys: pytest.CaptureFixture[str], name: str, ending: str
) -> None:
    main = tool(name)
    assert main([*flags, "--verify"]) == 1
    assert "7 files wanted: 7 missing" in capsys.readouterr().out
    assert not files(data, ".npz")
    assert main(flags) == 0
    made = files(data, ending)
    assert len(made) == 7
    assert main([*flags, "--verify"]) == 0
    assert "7 files wanted: 7 good" in capsys.readouterr().out
    assert main(flags) == 0
    assert files(data, ending) == made


def test_texts_of_a_run_with_embeddings(tmp_path: Path, data: Path, flags: list[str]) -> None:
    """What the tool makes for frozen embeddings is what a training with them takes."""
    from train_network import main as train

    rows = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)
    save_file({"emb_params": rows}, tmp_path / "thing.safetensors")
    for text in data.glob("*.txt"):
        text.write_text("a thingtoken\n")
    base = ["--base_embeddings", f"thingtoken={tmp_path / 'thing.safetensors'}"]
    assert tool("cache_text_encoder_outputs")([*flags, *base]) == 0
    made = files(data, "_te_outputs.npz")
    assert len(made) == 7
    network = ["--network_module", "networks.lora", "--network_train_unet_only", "--max_train_steps", "1"]
    more = ["--output_dir", str(tmp_path / "out"), "--cache_text_encoder_outputs_to_disk"]
    assert train([*flags, *base, *network, *more]) == 0
    assert files(data, "_te_outputs.npz") == made
    assert train([*flags, *network, *more]) == 0
    assert all(made[name] != changed for name, changed in files(data, "_te_outputs.npz").items())


def test_latents_verified_and_pruned(data: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main = tool("cache_latents")
    assert main(flags) == 0
    made = sorted(files(data, "_sd.npz"))
    held = npz.read(data / made[0])
    npz.write(data / made[0], {**held, "latents": held["latents"] + 1})
    (data / made[1]).write_bytes(b"hello")
    Image.new("RGB", (96, 64), "red").resize(Image.open(data / "picture02.jpg").size).save(data / "picture02.jpg")
    (data / "picture03.png").unlink()
    np.savez(data / "picture03_0080x0080_other_sd.npz", latents=np.zeros(3))
    shutil.copy(data / made[4], data / "elsewhere_sd.npz")
    (data / ".old_sd.npz.7.tmp").write_bytes(b"half")
    os.utime(data / ".old_sd.npz.7.tmp", (time.time() - 9999,) * 2)
    before = files(data, "")
    capsys.readouterr()
    assert main([*flags, "--verify"]) == 1
    told = capsys.readouterr().out
    assert told.count(": damaged") == 2
    assert told.count(": no longer fits") == 1
    assert "6 files wanted: 3 good, 1 no longer fits, 2 damaged" in told
    assert main([*flags, "--prune", "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert told.count("would delete") == 5
    assert "5 files would go" in told
    assert files(data, "") == before
    assert main([*flags, "--prune"]) == 0
    told = capsys.readouterr().out
    gone = before.keys() - files(data, "").keys()
    assert gone == {made[0], made[2], made[3], "elsewhere_sd.npz", ".old_sd.npz.7.tmp"}
    assert all(str(data / name) in told for name in gone)
    assert "5 files are gone, " in told
    assert main(flags) == 0
    assert main([*flags, "--verify"]) == 0


def test_files_for_other_settings_stay_unless_they_are_to_go(data: Path, flags: list[str]) -> None:
    main = tool("cache_latents")
    larger = [*flags, "--resolution", "96"]
    assert main(flags) == 0
    small = files(data, "_sd.npz")
    assert main(larger) == 0
    both = files(data, "_sd.npz")
    assert len(both) > len(small) == 7
    for one in (flags, larger):
        assert main([*one, "--prune"]) == 0
        assert main(one) == 0
        assert files(data, "_sd.npz") == both
    assert main([*flags, "--prune_others", "--dry_run"]) == 0
    assert files(data, "_sd.npz") == both
    assert main([*flags, "--prune_others"]) == 0
    assert files(data, "_sd.npz") == small


@pytest.mark.parametrize("name", ["cache_latents", "cache_text_encoder_outputs"])
def test_files_of_pictures_that_cannot_be_read_stay(data: Path, flags: list[str], name: str) -> None:
    main = tool(name)
    assert main(flags) == 0
    made = files(data, ".npz")
    (data / "picture03.png").write_bytes((data / "picture03.png").read_bytes()[:300])
    whole = bytearray((data / "picture05.png").read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    (data / "picture05.png").write_bytes(whole)
    assert main([*flags, "--prune", "--skip_bad_images"]) == 0
    assert files(data, ".npz") == made


@pytest.mark.parametrize("name", ["cache_latents", "cache_text_encoder_outputs"])
def test_a_dry_run_only_says_what_is_missing(
    data: Path, flags: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    main = tool(name)
    before = files(data, "")
    assert main([*flags, "--dry_run"]) == 0
    assert "7 files wanted: 7 missing" in capsys.readouterr().out
    assert files(data, "") == before
    assert main(flags) == 0
    capsys.readouterr()
    assert main([*flags, "--dry_run"]) == 0
    assert capsys.readouterr().out == "7 files wanted: 7 good\n"


@pytest.mark.parametrize("name", ["cache_latents", "cache_text_encoder_outputs"])
def test_what_goes_wrong_in_the_middle_is_one_line(
    data: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save = np.savez
    saved: list[None] = []

    def full(*values: Any, **named: Any) -> None:
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        save(*values, **named)
        saved.append(None)

    monkeypatch.setattr(np, "savez", full)
    assert tool(name)(flags) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(told) == 1
    assert len(files(data, ".npz")) == 3
    assert not list(data.glob(".*.tmp"))


def test_text_files_pruned_by_caption_and_picture(
    data: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main = tool("cache_text_encoder_outputs")
    latents = tool("cache_latents")
    assert main(flags) == 0
    assert latents(flags) == 0
    (data / "picture01.txt").write_text("something else")
    (data / "picture02.jpg").unlink()
    np.savez(data / "foreign_te_outputs.npz", hidden_state1=np.zeros(3))
    held = npz.read(data / "picture03_te_outputs.npz")
    npz.write(data / "picture03_te_outputs.npz", {**held, "hidden_state1": held["hidden_state1"] + 1})
    numbered = "picture04.jpg_2_te_outputs.npz"
    shutil.copy(data / "picture04_te_outputs.npz", data / numbered)
    for flag, gone in (("--prune", {2, 3}), ("--prune_others", {1, 2, 3})):
        assert main([*flags, flag]) == 0
        expected = {f"picture{i:02d}_te_outputs.npz" for i in range(7) if i not in gone}
        expected |= {numbered} if flag == "--prune" else set()
        assert files(data, "_te_outputs.npz").keys() == expected | {"foreign_te_outputs.npz"}
        told = capsys.readouterr().out
        assert all(f"picture{i:02d}_te_outputs.npz" in told for i in (gone if flag == "--prune" else {1}))
    assert len(files(data, "_sd.npz")) == 7


def test_latents_of_a_mask_and_of_the_posterior(data: Path, flags: list[str]) -> None:
    main = tool("cache_latents")
    assert main([*flags, "--alpha_mask", "--latent_sampling", "sample"]) == 0
    held = npz.read(data / min(files(data, "_sd.npz")))
    assert {"alpha_mask", "latents_logvar"} <= held.keys()
    assert json.loads(str(held["lorasmith"]))["mask"] == "alpha"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--pretrained_model_name_or_path", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--train_data_dir", "nowhere"], "nowhere"),
        (["--resolutoin", "64"], "--resolutoin"),
    ],
)
def test_bad_input_is_named(flags: list[str], capsys: pytest.CaptureFixture[str], change: list[str], told: str) -> None:
    assert tool("cache_latents")([*flags, *change]) == 2
    assert told in capsys.readouterr().err


def test_several_processes_share_the_work(data: Path, flags: list[str]) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--quiet", "--num_processes", "2"]
    for name, ending in (("cache_latents", "_sd.npz"), ("cache_text_encoder_outputs", "_te_outputs.npz")):
        process = subprocess.run(
            [*launcher, "--main_process_port", "0", str(ROOT / "tools" / f"{name}.py"), *flags],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert process.returncode == 0, process.stderr
        assert len(files(data, ending)) == 7
        assert tool(name)([*flags, "--verify"]) == 0


@pytest.mark.parametrize("name", ["cache_latents", "cache_text_encoder_outputs"])
def test_old_commands(data: Path, flags: list[str], capsys: pytest.CaptureFixture[str], name: str) -> None:
    main, old = tool(name), ["--dry_run", "--skip_existing"]
    if name == "cache_text_encoder_outputs":
        old += ["--t5xxl_dtype", "fp16"]
    assert main([*flags, *old]) == 0
    told = capsys.readouterr().err
    assert all(f"{flag}: nothing to do" in told for flag in old if flag.startswith(("--s", "--t")))
    assert main([*flags, *old, "--sdxl"]) == 2
    assert "--sdxl: " in (told := capsys.readouterr().err) and "is an SD1 model; leave the flag out" in told
    assert main([*flags, "--flux"]) == 2
    assert "--flux: FLUX isn't trained here" in capsys.readouterr().err


def test_old_commands_for_sdxl(tiny_sdxl: Path, data: Path, flags: list[str]) -> None:
    assert tool("cache_latents")([*flags, "--pretrained_model_name_or_path", str(tiny_sdxl), "--sdxl"]) == 0
    assert len(files(data, "_sdxl.npz")) == 7
