"""A full-size SD1.5 single file in the original key layout, with random weights: `python tests/full_size.py PATH`.

1,130 tensors, 4.27 GB in float32. Pictures drawn with it are noise, but every activation is finite.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.original_layout import ITEM_SIZE, Tensor, original_name, original_shape, write

_POOL = 1 << 23
_STD = 0.02


def sd15_shapes() -> dict[str, tuple[int, ...]]:
    """The original names of SD1.5's 1,130 tensors, and their shapes."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    from library.models.single_configs import packaged

    configs = {part: packaged("sd1", part) for part in ("unet", "vae", "text_encoder")}
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
    attends = (True, True, True, False)
    shapes = {}
    for part, module in modules.items():
        for name, value in module.state_dict().items():
            target = original_name(part, name, 4, 2, attends)
            shapes[target] = original_shape(target, tuple(value.shape))
    return shapes


def write_sd15_single_file(path: Path, seed: int = 0, dtype: str = "F32") -> None:
    """Write the file, holding one tensor at a time.

    Args:
        dtype: F32, F16 or BF16.
    """
    draws = np.random.Generator(np.random.Philox(key=seed))
    pool = draws.standard_normal(_POOL, dtype=np.float32) * np.float32(_STD)
    tensors = []
    for name, shape in sd15_shapes().items():
        offset = int(draws.integers(_POOL))
        tensors.append(Tensor(name, dtype, shape, partial(_stored, dtype, pool, name, shape, offset)))
    write(path, tensors, {"format": "pt"})


def _stored(dtype: str, pool: np.ndarray, name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    return _as(_values(pool, name, shape, offset), dtype)


def _values(pool: np.ndarray, name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Norms 1 and 0, biases 0, everything else from the pool of normal draws, started anew where it ends."""
    if name.endswith("bias"):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    count = int(np.prod(shape))
    return np.take(pool, np.arange(offset, offset + count), mode="wrap").reshape(shape)


def _as(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype("<f2" if dtype == "F16" else "<f4", copy=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(ITEM_SIZE), default="F32")
    arguments = parser.parse_args()
    write_sd15_single_file(arguments.path, arguments.seed, arguments.dtype)
