"""Helpers of the tests that merge LoRAs into base models: one merge, and the weights of folders and loaded models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from library.weights.checkpoints.merge import MergeReport, merge_into
from library.weights.loras.lora import read
from library.weights.loras.merging import Weighted

TEXTS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}


def merge(model: Path, lora: Path, save_to: Path, ratio: float = 1.0, **more: Any) -> MergeReport:
    """One file at one strength."""
    return merge_into(model, [Weighted(read(lora), ratio)], save_to, **more)


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that a LoRA may change, by `part.name`, text encoders without their outer level."""
    found: dict[str, Tensor] = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for file in sorted((folder / part).glob("*.safetensors")):
            found |= {f"{part}.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    return found


def loaded_weights(unet: Any, encoders: Any) -> dict[str, Tensor]:
    """The same of loaded models."""
    encoders = encoders if isinstance(encoders, list) else [encoders]
    parts = {"unet": unet, **dict(zip(TEXTS["sdxl"], encoders, strict=False))}
    return {
        f"{part}.{name.removeprefix('text_model.')}": value
        for part, model in parts.items()
        for name, value in model.state_dict().items()
        if not name.endswith("position_ids")
    }


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float = 1e-6) -> None:
    """Every tensor that is expected is found, within `limit` of its largest value."""
    missing = expected.keys() - found.keys()
    assert not missing, sorted(missing)[:3]
    for name, value in expected.items():
        assert (found[name].float() - value.float()).abs().max() <= limit * max(1.0, value.abs().max()), name
