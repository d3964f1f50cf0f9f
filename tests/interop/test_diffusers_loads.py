"""diffusers, with peft, loads the files that we save, and its fused weights are ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from library.models.inspect import inspect
from library.models.load import load
from library.weights.files import read_tensors
from networks import lora
from tests.networks.tiny_families import FAMILIES, Finder, fill

CONV = {"conv_dim": "3", "conv_alpha": "2"}
KINDS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "LierLa": ({}, True, True),
    "C3Lier": (CONV, True, True),
    "U-Net only": (CONV, False, True),
    "text encoders only": ({}, True, False),
}


def pipeline(folder: Path, *, conv_projections: bool = False) -> Any:
    """A tiny base model. `conv_projections`: its U-Net's Linear projections become 1x1 convolutions alike."""
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    loaded = kind.from_pretrained(folder, local_files_only=True)
    if conv_projections:
        unet = UNet2DConditionModel.from_config(loaded.unet.config, use_linear_projection=False)
        shapes = unet.state_dict()
        unet.load_state_dict({name: t.view(shapes[name].shape) for name, t in loaded.unet.state_dict().items()})
        loaded.unet = unet
    for part in parts(loaded).values():
        part.requires_grad_(False)
    return loaded


def parts(loaded: Any) -> dict[str, torch.nn.Module]:
    """What a LoRA can be on, by name."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(loaded, name, None)) is not None}


def compare(ours: dict[str, torch.nn.Module], theirs: Any, path: Path, kind: str, dtype: torch.dtype | None) -> None:
    """Save a LoRA trained on `ours` and merge it there; let diffusers fuse it on `theirs`: the weights are the same."""
    args, train_te, train_unet = KINDS[kind]
    unet, *encoders = ours.values()
    text_encoder: Any = encoders if len(encoders) > 1 else encoders[0]
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, **args)
    network.apply_to(text_encoder, unet, train_te, train_unet)
    fill(network)
    network.save_weights(path, dtype, {"ss_v2": "False"})
    modules = len(network.layers)
    network.remove()
    before = {(name, key): t.clone() for name, part in ours.items() for key, t in part.named_parameters()}
    again, tensors = lora.create_network_from_weights(0.8, path, None, text_encoder, unet)
    again.merge_to(text_encoder, unet, tensors)
    fuse(theirs, path, [name for name in ours if (train_unet if name == "unet" else train_te)])
    same_weights(ours, theirs)
    after = {(name, key): t for name, part in ours.items() for key, t in part.named_parameters()}
    assert sum(not torch.equal(after[place], tensor) for place, tensor in before.items()) == modules
    assert len(read_tensors(path)) == 3 * modules


def fuse(theirs: Any, path: Path, components: list[str]) -> None:
    theirs.load_lora_weights(path.parent, weight_name=path.name)
    theirs.fuse_lora(lora_scale=0.8, components=components)
    theirs.unload_lora_weights()


def same_weights(ours: dict[str, torch.nn.Module], theirs: Any) -> None:
    for name, mine in ours.items():
        expected = {key.removeprefix("text_model."): t for key, t in parts(theirs)[name].named_parameters()}
        for key, parameter in mine.named_parameters():
            other = expected[key.removeprefix("text_model.")].reshape(parameter.shape)
            torch.testing.assert_close(parameter, other, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_fuses_our_file_into_the_same_weights(
    family: str, kind: str, tiny_models: Finder, tmp_path: Path
) -> None:
    folder = tiny_models(family)
    dtype = torch.float16 if kind == "LierLa" else None
    compare(parts(pipeline(folder)), pipeline(folder), tmp_path / "ours.safetensors", kind, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_for_a_model_from_a_single_file(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    """SD2's from a single file has 1x1 convolutions for projections; diffusers loads its LoRA onto such a U-Net."""
    model = load(inspect(str(tiny_models(f"{family}_file"))))
    ours = dict(zip(("unet", "text_encoder", "text_encoder_2"), (model.unet, *model.text_encoders), strict=False))
    theirs = pipeline(tiny_models(family), conv_projections=family == "sd2")
    compare(ours, theirs, tmp_path / "ours.safetensors", "C3Lier", None)


def test_convolutional_projections_are_not_diffusers_linear_ones_but_ours_can_be(
    tiny_sd2: Path, tmp_path: Path
) -> None:
    """diffusers refuses a LoRA of 1x1 convolutions on Linear layers; saved by us on a folder's model, it fits."""
    single, folder = (parts(pipeline(tiny_sd2, conv_projections=conv)) for conv in (True, False))
    path, flat = tmp_path / "single.safetensors", tmp_path / "flat.safetensors"
    network = lora.create_network(1.0, 4, 2.0, None, single["text_encoder"], single["unet"])
    network.apply_to(None, None)
    fill(network)
    network.save_weights(path, None, {})
    theirs = pipeline(tiny_sd2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        theirs.load_lora_weights(path.parent, weight_name=path.name)

    again, tensors = lora.create_network_from_weights(0.8, path, None, folder["text_encoder"], folder["unet"])
    again.apply_to(None, None)
    again.load_weights(path)
    again.save_weights(flat, None, {})
    again.remove()
    again.merge_to(None, None, tensors)
    theirs = pipeline(tiny_sd2)
    fuse(theirs, flat, ["unet", "text_encoder"])
    same_weights(folder, theirs)
