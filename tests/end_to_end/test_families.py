"""Every family from every source, with every kind of LoRA: trains, resumes exactly, draws, and diffusers loads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.original_layout import folder_as_single_file
from tests.pictures import make_pictures
from tests.programs import launch, without_network

KINDS = {
    "lierla": (),
    "c3lier": ("--network_args", "conv_dim=2", "conv_alpha=1"),
    "unet": ("--network_train_unet_only",),
    "text": ("--network_train_text_encoder_only",),
}
# Two levels of the tiny SD1 and SDXL have one width, so that one shortcut convolution fewer is there than at full size.
MODULES = {
    "sd1": {"unet": 192, "conv": 85, "text": 5 * 6},
    "sd2": {"unet": 192, "conv": 86, "text": 5 * 6},
    "sdxl": {"unet": 11 * 2 + 10 * (2 * 2 + 2 * 3 + 3 + 3 * 3 + 3 * 2), "conv": 65, "text": 2 * 5 * 6},
}


def arguments(model: Path, place: Path, name: str, *more: str) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(place / "pictures")),
        *("--output_dir", str(place / "output"), "--output_name", name, "--network_module", "networks.lora"),
        *("--resolution", "64", "--caption_extension", ".txt", "--shuffle_caption", "--flip_aug", "--seed", "3"),
        *("--network_dim", "2", "--network_alpha", "1", "--learning_rate", "5e-2", "--max_train_steps", "3"),
        *("--max_data_loader_n_workers", "0", *more),
    ]


def run(*given: Any) -> dict[str, np.ndarray]:
    """One run in this process; its file's tensors."""
    from train_network import main

    line = arguments(*given)
    assert main(line) == 0
    return load_file(given[1] / f"output/{given[2]}.safetensors")


def fused_by_diffusers(folder: Path, file: Path, conv_projections: bool) -> dict[str, torch.Tensor]:
    """The weights of a diffusers pipeline with our file fused into it, by part and name."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    several = (folder / "text_encoder_2").is_dir()
    kind = StableDiffusionXLPipeline if several else StableDiffusionPipeline
    more: dict[str, Any] = {} if several else {"safety_checker": None}
    pipeline = kind.from_pretrained(folder, local_files_only=True, **more)
    if conv_projections:
        plain = UNet2DConditionModel.from_config({**pipeline.unet.config, "use_linear_projection": False})
        shapes = {name: value.shape for name, value in plain.state_dict().items()}
        plain.load_state_dict({n: v.reshape(shapes[n]) for n, v in pipeline.unet.state_dict().items()})
        pipeline.unet = plain
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    parts = ["unet", "text_encoder", *(["text_encoder_2"] if several else [])]
    return {
        f"{part}.{name}": value.detach() for part in parts for name, value in getattr(pipeline, part).named_parameters()
    }


def fused_by_us(model: Path, file: Path) -> dict[str, torch.Tensor]:
    """The weights of our own model with the file merged into it."""
    from library.models.info import Said
    from library.models.inspect import inspect
    from library.models.load import load
    from networks import lora

    loaded = load(inspect(str(model), said=Said(v_parameterization=None)), device="cpu")
    network, tensors = lora.create_network_from_weights(1.0, file, None, loaded.network_text_encoder, loaded.unet)
    network.merge_to(loaded.network_text_encoder, loaded.unet, tensors)
    encoders = {f"text_encoder{'' if n == 0 else f'_{n + 1}'}": e for n, e in enumerate(loaded.text_encoders)}
    return {
        f"{part}.{name}": value.detach()
        for part, module in {"unet": loaded.unet, **encoders}.items()
        for name, value in module.named_parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["folder", "file"])
@pytest.mark.parametrize("family", MODULES)
def test_trains_resumes_draws_and_loads(
    family: str, source: str, kind: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_models(family)
    model = folder if source == "folder" else tiny_models(f"{family}_file")
    make_pictures(tmp_path / "pictures", count=3)
    (tmp_path / "prompts.txt").write_text("a red shape --s 2 --w 64 --h 64 --d 1\n")
    more = list(KINDS[kind])
    if family == "sd2" and source == "file":
        more += ["--v_parameterization"]
    previews = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "3"]
    states = ["--save_state", "--save_every_n_steps", "2"]
    whole = run(model, tmp_path, "whole", *more, *previews, *states)

    counts = MODULES[family]
    expected = {"unet": counts["unet"], "text": counts["text"], "lierla": counts["unet"] + counts["text"]}
    expected["c3lier"] = expected["lierla"] + counts["conv"]
    assert len(whole) == 3 * expected[kind]
    ups = [value for key, value in whole.items() if key.endswith("lora_up.weight")]
    assert sum(bool(np.any(up)) for up in ups) > 0.75 * len(ups)
    (drawn,) = (tmp_path / "output/sample").glob("whole_0*.png")
    assert np.asarray(Image.open(drawn)).shape == (64, 64, 3)

    state = tmp_path / "output/whole-step00000002-state"
    resumed = run(model, tmp_path, "resumed", *more, "--resume", str(state))
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)

    file = tmp_path / "output/whole.safetensors"
    theirs = fused_by_diffusers(folder, file, conv_projections=family == "sd2" and source == "file")
    ours = fused_by_us(model, file)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", MODULES)
def test_one_real_run_from_a_single_file_without_network(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    model = tiny_models(f"{family}_file")
    command = arguments(model, tmp_path, "alone", "--v_parameterization" if family == "sd2" else "--cache_latents")
    result = launch(*command, around=without_network())
    assert result.returncode == 0, result.stderr
    with safe_open(tmp_path / "output/alone.safetensors", "np") as file:
        metadata = file.metadata()
    versions = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
    assert metadata["ss_base_model_version"] == versions[family]
    assert metadata["ss_v2"] == str(family == "sd2")


def test_markers_of_a_single_file_decide_prediction_and_schedule(tiny_sdxl: Path, tmp_path: Path) -> None:
    """A NoobAI-like file: velocity, zero terminal SNR; previews start from pure noise and space steps trailing."""
    model = tmp_path / "noob.safetensors"
    marks = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    folder_as_single_file(tiny_sdxl, model, extra=marks)
    make_pictures(tmp_path / "pictures", count=2)
    (tmp_path / "prompts.txt").write_text("a red shape --s 2 --w 64 --h 64 --d 1\n")
    previews = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "3"]
    run(model, tmp_path, "noob", "--network_train_unet_only", *previews)
    with safe_open(tmp_path / "output/noob.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["ss_zero_terminal_snr"] == "True"
    assert list((tmp_path / "output/sample").glob("noob_0*.png"))


def test_two_text_encoders_have_rates_of_their_own(tiny_sdxl: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    tensors = run(tiny_sdxl, tmp_path, "second", "--unet_lr", "0", "--text_encoder_lr", "0", "1e-2")
    assert {key.split("_")[1] for key in tensors} == {"te2"}
    tensors = run(tiny_sdxl, tmp_path, "both", "--unet_lr", "0", "--text_encoder_lr", "1e-2", "1e-4")
    sizes = {
        name: max(float(np.abs(v).max()) for k, v in tensors.items() if k.startswith(f"lora_{name}_") and "up" in k)
        for name in ("te1", "te2")
    }
    assert sizes["te1"] > 30 * sizes["te2"] > 0


def test_settings_that_were_found_are_in_the_state(tiny_sd2: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    run(tiny_sd2, tmp_path, "state", "--save_state_on_train_end", "--network_train_unet_only")
    manifest = json.loads((tmp_path / "output/state-state/manifest.json").read_text())
    assert manifest["settings"]["prediction type"] == "v_prediction"
    assert manifest["settings"]["zero terminal SNR"] == "False"


def test_a_probed_run_goes_on_with_what_was_found(
    tiny_sd2_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    states = ("--save_state", "--save_every_n_steps", "2", "--network_train_unet_only")
    whole = run(tiny_sd2_file, tmp_path, "whole", *states)
    assert "one forward pass gave" in capsys.readouterr().err
    state = str(tmp_path / "output/whole-step00000002-state")
    resumed = run(tiny_sd2_file, tmp_path, "resumed", "--network_train_unet_only", "--resume", state)
    assert "one forward pass" not in capsys.readouterr().err
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
    flagged = run(
        *(tiny_sd2_file, tmp_path, "flagged", "--network_train_unet_only", "--resume", state, "--v_parameterization")
    )
    assert all(np.array_equal(whole[key], flagged[key]) for key in whole)


def test_another_vae_makes_the_latents_and_is_named_in_the_file(tiny_sd1: Path, tmp_path: Path) -> None:
    from tests.tiny_models import save_tiny_sd1

    save_tiny_sd1(tmp_path / "other", seed=9)
    folder_as_single_file(tmp_path / "other", tmp_path / "other.safetensors", parts=["vae"])
    make_pictures(tmp_path / "pictures", count=2)
    more = ("--network_train_unet_only", "--cache_latents_to_disk")
    own = run(tiny_sd1, tmp_path, "own", *more)
    latents = {path: path.read_bytes() for path in (tmp_path / "pictures").rglob("*_sd.npz")}
    for source in (tmp_path / "other", tmp_path / "other.safetensors"):
        other = run(tiny_sd1, tmp_path, "other", *more, "--vae", str(source))
        assert any(not np.array_equal(own[key], other[key]) for key in own)
        assert latents and all(path.read_bytes() != before for path, before in latents.items())
        with safe_open(tmp_path / "output/other.safetensors", "np") as file:
            metadata = file.metadata()
        assert metadata["ss_vae_name"] == source.name
        assert len(metadata["ss_new_vae_hash"]) == (64 if source.is_file() else len("IsADirectory"))
