"""The original (single-file) names of an SD1 model's tensors, written down apart from diffusers' converters, and a
writer of such files that holds one tensor at a time."""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}


def original_name(part: str, name: str, levels: int, layers: int, attends: tuple[bool, ...] = ()) -> str:
    """The original name, with its prefix, of a diffusers tensor.

    Args:
        levels, layers: of the part's config; attends: which of the U-Net's levels attend to text, first to last.
    """
    if part == "text_encoder":
        return PREFIX[part] + "text_model." + name.removeprefix("text_model.")
    return PREFIX[part] + (_unet(name, levels, layers, attends) if part == "unet" else _vae(name, levels))


def _unet(name: str, levels: int, layers: int, attends: tuple[bool, ...]) -> str:
    stem, _, end = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{end}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{_inside(found[1], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
    assert found, name
    way, level, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if way == "down":
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
        if kind == "downsamplers":
            return f"input_blocks.{block}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{block}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
    block = level * (layers + 1) + (layers if kind == "upsamplers" else index)
    if kind == "upsamplers":
        return f"output_blocks.{block}.{2 if attends[levels - 1 - level] else 1}.{rest}"
    return f"output_blocks.{block}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    stem, _, end = rest.rpartition(".")
    return f"{_RESNET[stem]}.{end}" if kind == "resnets" else rest


def _vae(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        return f"{found[1]}.mid.attn_1.{_VAE_ATTENTION[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d)\.(.+)", name):
        return f"encoder.down.{found[1]}." + found[2].replace("resnets.", "block.").replace(
            "downsamplers.0", "downsample"
        )
    if found := re.fullmatch(r"decoder\.up_blocks\.(\d)\.(.+)", name):
        level = levels - 1 - int(found[1])
        return f"decoder.up.{level}." + found[2].replace("resnets.", "block.").replace("upsamplers.0", "upsample")
    return name


def original_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """VAE attention is 1x1 convolutions there."""
    return (*shape, 1, 1) if ".attn_1." in name and len(shape) == 2 else shape


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `values` gives its contiguous little-endian array when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def write(path: Path, tensors: list[Tensor], metadata: dict[str, str] | None = None) -> None:
    """A `.safetensors` file, tensor by tensor."""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for tensor in tensors:
        end = place + ITEM_SIZE[tensor.dtype] * int(np.prod(tensor.shape, dtype=np.int64))
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in tensors:
            file.write(tensor.values().data)


def folder_as_single_file(folder: Path, path: Path, *, text_model: bool = True) -> None:
    """Write a diffusers folder's weights as one file in the original layout, as float32.

    Args:
        text_model: False drops that level from the text encoder's names, as some files do.
    """
    from safetensors.numpy import load_file

    files = {
        "unet": "unet/diffusion_pytorch_model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "text_encoder": "text_encoder/model.safetensors",
    }
    tensors = []
    for part, file in files.items():
        config = json.loads((folder / part / "config.json").read_text())
        levels, layers = len(config.get("block_out_channels", ())), config.get("layers_per_block", 0)
        attends = tuple(kind.startswith("Cross") for kind in config.get("down_block_types", ()))
        for name, array in load_file(folder / file).items():
            if name.endswith("position_ids"):
                continue
            target = original_name(part, name, levels, layers, attends)
            if not text_model:
                target = target.replace("transformer.text_model.", "transformer.")
            tensors.append(_in_memory(target, np.ascontiguousarray(array, dtype="<f4")))
    write(path, tensors)


def _in_memory(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, "F32", original_shape(name, array.shape), lambda: array)
