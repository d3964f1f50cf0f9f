"""Every family against diffusers' own pipelines: text conditioning, the U-Net call, previews."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import library.models.model
import library.models.sdxl
from library.conditioning import Conditioning
from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model
from library.models.sd1 import SD1
from library.models.sd2 import SD2
from library.models.sdxl import SDXL

CAPTIONS = [
    "a photo of a cat",
    "",
    "hello! a cat!!! (!) !cat?!",
    'é, "x" & <y> :-)',
    "1girl, solo, " * 10,
    "word " * 75,
    "word " * 100,
]
CLASSES: dict[str, type[Model]] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
Find = Callable[[str], Path]


def pipeline_of(folder: Path, family: str) -> Any:
    """Diffusers' pipeline, which a tiny folder was saved from."""
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(pipeline: Any, family: str, captions: list[str], clip_skip: int | None = None) -> Conditioning:
    """Captions by the pipeline's `encode_prompt`."""
    with torch.no_grad():
        if family == "sdxl":
            states, _, pooled, _ = pipeline.encode_prompt(
                captions, do_classifier_free_guidance=False, clip_skip=clip_skip
            )
            return Conditioning(states, pooled)
        return Conditioning(pipeline.encode_prompt(captions, "cpu", 1, False, clip_skip=clip_skip)[0])


@pytest.mark.parametrize("layout", ["", "_file"])
@pytest.mark.parametrize("family", CLASSES)
def test_each_family_has_its_class(tiny_models: Find, family: str, layout: str) -> None:
    model = load(inspect(str(tiny_models(family + layout))), with_vae=False)
    assert type(model) is CLASSES[family] and model.family.name == family
    assert model.vae is None and model.vae_factor == 8
    assert model.latent_scale == (0.13025 if family == "sdxl" else 0.18215)


def test_versions(tiny_models: Find) -> None:
    versions = {
        family: load(inspect(str(tiny_models(family))), with_vae=False).base_model_version for family in CLASSES
    }
    assert versions == {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [*[(family, None, None) for family in CLASSES], ("sdxl", 2, None), ("sdxl", 3, 1)],
)
def test_text_is_that_of_the_pipeline(tiny_models: Find, family: str, ours: int | None, theirs: int | None) -> None:
    """Diffusers counts SDXL's clip skip from the layer before the last, so that its 1 is our 3. (Its other pipelines
    can't skip layers with these transformers; test_prompts holds theirs.)"""
    folder = tiny_models(family)
    model = load(inspect(str(folder)), with_vae=False, clip_skip=ours)
    expected = encoded(pipeline_of(folder, family), family, CAPTIONS, theirs)
    with torch.no_grad():
        found = model.encode_prompts(CAPTIONS)
    assert found.states.shape == expected.states.shape
    assert torch.allclose(found.states, expected.states, atol=1e-5)
    assert (found.pooled is None) == (expected.pooled is None) == (family != "sdxl")
    if found.pooled is not None and expected.pooled is not None:
        assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_unet_call_is_the_pipeline_s(tiny_models: Find, family: str) -> None:
    folder = tiny_models(family)
    model, pipeline = load(inspect(str(folder)), with_vae=False), pipeline_of(folder, family)
    noisy, times = torch.randn(2, 4, 8, 12), torch.tensor([3, 900])
    text = encoded(pipeline, family, ["a cat", "a dog"])
    with torch.no_grad():
        expected = pipeline.unet(noisy, times, encoder_hidden_states=text.states).sample
        ignoring_sizes = model.predict(noisy, times, text, torch.zeros(2, 6))
        assert torch.allclose(model.predict(noisy, times, text), expected, atol=1e-5)
        assert torch.equal(model.predict(noisy, times, text), ignoring_sizes)


def test_the_unet_call_is_the_sdxl_pipeline_s(tiny_sdxl: Path) -> None:
    model, pipeline = load(inspect(str(tiny_sdxl)), with_vae=False), pipeline_of(tiny_sdxl, "sdxl")
    noisy, times = torch.randn(2, 4, 8, 12), torch.tensor([3, 900])
    text = encoded(pipeline, "sdxl", ["a cat", "a dog"])
    sizes = [((1013, 787), (4, 31), (64, 96)), ((64, 96), (0, 0), (64, 96))]
    ids = [pipeline._get_add_time_ids(*three, dtype=torch.float32, text_encoder_projection_dim=48) for three in sizes]
    assert text.pooled is not None
    with torch.no_grad():
        expected = pipeline.unet(
            noisy,
            times,
            encoder_hidden_states=text.states,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": torch.cat(ids)},
        ).sample
        flat = torch.tensor([[side for pair in three for side in pair] for three in sizes], dtype=torch.float32)
        found = model.predict(noisy, times, text, flat)
        assert torch.allclose(found, expected, atol=1e-5)
        unsized = model.predict(noisy, times, text)
    assert torch.allclose(unsized[1], found[1], atol=1e-6)
    assert not torch.allclose(unsized[0], found[0], atol=1e-6)
    with pytest.raises(ValueError, match="pooled"):
        model.predict(noisy, times, Conditioning(text.states))


def test_a_gpu_is_not_waited_for_to_copy_sizes_and_captions(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[int, ...]] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(tuple(tensor.shape))
        return tensor.to(device)

    monkeypatch.setattr(library.models.model, "to_device", to_device)
    monkeypatch.setattr(library.models.sdxl, "to_device", to_device)
    model = load(inspect(str(tiny_sdxl)), with_vae=False)
    with torch.no_grad():
        text = model.encode_prompts(["a cat", "a dog"])
        model.predict(torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), text, torch.zeros(2, 6))
    assert copied == [(2, 1, 77), (2, 1, 77), (2, 6)]


def test_sizes_keep_their_pixels_in_16_bits(tiny_sdxl: Path) -> None:
    model = load(inspect(str(tiny_sdxl)), with_vae=False, dtype=torch.bfloat16)
    seen = []
    model.unet.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    sizes = torch.tensor([[1023, 1025, 3, 5, 1021, 1019]], dtype=torch.float32)
    with torch.no_grad():
        model.predict(torch.randn(1, 4, 8, 8), torch.tensor([3]), model.encode_prompts(["a cat"]), sizes)
    assert seen == [sizes[0].tolist()]


@pytest.mark.parametrize("family", CLASSES)
def test_gradients_reach_the_unet_under_checkpointing(tiny_models: Find, family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(inspect(str(tiny_models(family))), with_vae=False)
        if checkpointing:
            model.enable_gradient_checkpointing()
        weight = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.requires_grad_(True)
        noisy = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)
        model.predict(noisy, torch.tensor([500]), model.encode_prompts(["a cat"])).square().mean().backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("family", CLASSES)
def test_ddim_previews_are_the_pipeline_s(tiny_models: Find, tmp_path: Path, family: str, rescaled: bool) -> None:
    """Also of a model whose schedule ends in pure noise: trailing timesteps, rescaled betas."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models(family), folder)
    config = folder / "scheduler/scheduler_config.json"
    values = json.loads(config.read_text())
    if rescaled:
        values |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        config.write_text(json.dumps(values))
    model, theirs = load(inspect(str(folder))), pipeline_of(folder, family)
    assert model.zero_terminal_snr is rescaled
    if rescaled:
        assert model.alphas_cumprod[-1] == 0
        assert isinstance(theirs.scheduler, DDIMScheduler) and theirs.scheduler.config.rescale_betas_zero_snr
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 5, "guidance_scale": 4.0}
    expected = theirs(prompt="a cat", negative_prompt="bad", latents=noise, **arguments).images[0]
    (drawn,) = model.pipeline("ddim")("a cat", "bad", latents=noise, **arguments).images
    difference = np.asarray(drawn).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 1


def test_previews_take_another_encoder(tiny_sdxl: Path) -> None:
    model = load(inspect(str(tiny_sdxl)))
    asked: list[list[str]] = []

    def encode(captions: Any) -> Conditioning:
        asked.append(list(captions))
        return model.encode_prompts(captions)

    draw = model.pipeline("euler", encode)
    (image,) = draw("a cat", None, width=64, height=96, num_inference_steps=2).images
    assert image.size == (64, 96) and asked == [["a cat", ""]]
