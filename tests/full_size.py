"""Full-size single files in the original key layout, with random weights: `python tests/full_size.py FAMILY PATH`.

SD1.5 has 1,130 tensors, 4.27 GB in float32; SDXL takes 6.9 GB in float16. Pictures drawn with them are noise, but every
activation is finite.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.original_layout import (
    ITEM_SIZE,
    TEXT_PREFIX,
    Tensor,
    as_stored,
    open_clip_tensors,
    original_name,
    original_shape,
    write,
)

_POOL = 1 << 23
_STD = 0.02
FAMILIES = ("sd1", "sd2", "sdxl")


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """The original names of a family's tensors, and their shapes."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from library.models.single_configs import packaged

    found = {}
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        config = packaged(family, part)
        with torch.device("meta"):
            module = kind.from_config(config)
        levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
        attends = tuple(block.startswith("Cross") for block in config["down_block_types"])
        for name, value in module.state_dict().items():
            target = original_name(part, name, levels, layers, attends)
            found[target] = original_shape(target, tuple(value.shape))
    for (owner, part), prefix in TEXT_PREFIX.items():
        if owner == family:
            inside = _text_shapes(family, packaged(family, part), open_clip=prefix.endswith("model."))
            found |= {prefix + name: shape for name, shape in inside.items()}
    return found


def _text_shapes(family: str, config: dict[str, Any], *, open_clip: bool) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if family == "sdxl" and open_clip else CLIPTextModel
    with torch.device("meta"):
        encoder = kind(CLIPTextConfig(**config))
    plain = {name.removeprefix("text_model."): tuple(value.shape) for name, value in encoder.state_dict().items()}
    if not open_clip:
        return {f"text_model.{name}": shape for name, shape in plain.items()}
    stand_ins = {name: np.empty(shape, np.int8) for name, shape in plain.items()}
    spare = family == "sd2"
    square = np.empty((config["hidden_size"],) * 2, np.int8) if spare else None
    renamed = open_clip_tensors(stand_ins, spare_layer=spare, text_projection=square)
    return {name: value.shape for name, value in renamed.items()}


def write_single_file(family: str, path: Path, seed: int = 0, dtype: str = "F32") -> None:
    """Write the file, holding one tensor at a time.

    Args:
        dtype: F32, F16 or BF16.
    """
    draws = np.random.Generator(np.random.Philox(key=seed))
    pool = draws.standard_normal(_POOL, dtype=np.float32) * np.float32(_STD)
    tensors = []
    for name, shape in shapes(family).items():
        offset = int(draws.integers(_POOL))
        tensors.append(Tensor(name, dtype, shape, partial(_stored, dtype, pool, name, shape, offset)))
    write(path, tensors, {"format": "pt"})


def _stored(dtype: str, pool: np.ndarray, name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    return as_stored(_values(pool, name, shape, offset), dtype)


def _values(pool: np.ndarray, name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Norms 1 and 0, biases 0, everything else from the pool of normal draws, started anew where it ends."""
    if name.endswith("bias"):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) < 2:
        return np.ones(shape, dtype=np.float32)
    count = int(np.prod(shape))
    return np.take(pool, np.arange(offset, offset + count), mode="wrap").reshape(shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(ITEM_SIZE), default="F32")
    arguments = parser.parse_args()
    write_single_file(arguments.family, arguments.path, arguments.seed, arguments.dtype)
