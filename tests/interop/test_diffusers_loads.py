"""diffusers, with peft, loads the files that we save, and its fused weights are ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from library.weights.files import read_tensors
from networks import lora

KINDS: dict[str, Any] = {"LierLa": {}, "C3Lier": {"conv_dim": "3", "conv_alpha": "2"}}


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """The tiny base model."""
    loaded = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    loaded.unet.requires_grad_(False)
    loaded.text_encoder.requires_grad_(False)
    return loaded


@pytest.mark.parametrize(("kind", "dtype"), [("LierLa", torch.float16), ("C3Lier", None)])
def test_diffusers_fuses_our_file_into_the_same_weights(
    tiny_sd1: Path, tmp_path: Path, kind: str, dtype: torch.dtype | None
) -> None:
    ours, theirs = pipeline(tiny_sd1), pipeline(tiny_sd1)
    network = lora.create_network(1.0, 4, 2.0, None, ours.text_encoder, ours.unet, **KINDS[kind])
    network.apply_to(ours.text_encoder, ours.unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    path = tmp_path / "ours.safetensors"
    network.save_weights(path, dtype, {"ss_v2": "False"})
    modules = len(network.layers)
    network.remove()

    before = {name: tensor.clone() for name, tensor in ours.unet.state_dict().items()}
    again, tensors = lora.create_network_from_weights(0.8, path, None, ours.text_encoder, ours.unet)
    again.merge_to(ours.text_encoder, ours.unet, tensors)
    theirs.load_lora_weights(tmp_path, weight_name=path.name)
    theirs.fuse_lora(lora_scale=0.8)
    theirs.unload_lora_weights()

    for mine, other in ((ours.unet, theirs.unet), (ours.text_encoder, theirs.text_encoder)):
        expected = dict(other.named_parameters())
        for name, parameter in mine.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5)
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in ours.unet.state_dict().items())
    assert changed == modules - 30
    assert len(read_tensors(path)) == 3 * modules
