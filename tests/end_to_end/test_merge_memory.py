"""A LoRA merged into a full-size SDXL checkpoint: it fits into memory that doesn't grow with the model."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.lora_targets import targets
from library.models.single_configs import packaged
from tests.full_size import write_single_file
from tests.memory import run_measured
from tests.programs import ROOT, environment

LIMIT = 2_000_000_000
RANK = 64


def write_lora(path: Path) -> None:
    """An SDXL LoRA of rank 64 on all that LierLa trains, text encoders too, in float16."""
    from library.models.sgm_names import sgm_key

    texts = [packaged("sdxl", part) for part in ("text_encoder", "text_encoder_2")]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for target in targets(packaged("sdxl", "unet"), texts, conv=False, unet_key=sgm_key):
        for way, shape in zip(("down", "up"), target.shapes(RANK), strict=True):
            tensors[f"{target.name}.lora_{way}.weight"] = (torch.randn(shape, generator=generator) * 0.02).half()
        tensors[f"{target.name}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_sdxl_checkpoint_is_merged_in_two_gigabytes(tmp_path: Path) -> None:
    model, lora, out = (tmp_path / f"{name}.safetensors" for name in ("model", "lora", "out"))
    try:
        write_single_file("sdxl", model, dtype="F16")
        write_lora(lora)
        command = [sys.executable, str(ROOT / "tools/merge_lora.py"), "--sd_model", str(model), "--save_to", str(out)]
        command += ["--models", str(lora), "--ratios", "0.8"]
        run = run_measured(command, environment(), tmp_path / "log", timeout=1500)
        assert run.returncode == 0, run.stderr
        assert out.stat().st_size > 6_900_000_000
        print(f"\npeak {run.anonymous / 1e9:.2f} GB (RssAnon + RssShmem), {run.seconds:.1f} s")
        name = "lora_unet_output_blocks_0_1_transformer_blocks_3_ff_net_0_proj"
        held = load_file(lora)
        change = held[f"{name}.lora_up.weight"].double() @ held[f"{name}.lora_down.weight"].double()
        assert_merged(
            model, out, "model.diffusion_model.output_blocks.0.1.transformer_blocks.3.ff.net.0.proj", 0.8 * change
        )
        assert run.anonymous < LIMIT
    finally:
        for path in (model, lora, out):
            path.unlink(missing_ok=True)


def assert_merged(model: Path, out: Path, name: str, change: torch.Tensor) -> None:
    """One weight is what it was and the change, rounded once; a tensor of the VAE is as it was."""
    from safetensors import safe_open

    with safe_open(model, "pt") as before, safe_open(out, "pt") as after:
        exact = before.get_tensor(f"{name}.weight").double() + change
        found = after.get_tensor(f"{name}.weight")
        assert (found.double() - exact).abs().max() <= 1e-3 * exact.abs().max()
        kept = "first_stage_model.decoder.conv_in.weight"
        assert torch.equal(before.get_tensor(kept), after.get_tensor(kept))
