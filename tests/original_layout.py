"""The original (single-file) names of tensors of SD1, SD2 and SDXL models, written down apart from diffusers'
converters, and a writer of such files that holds one tensor at a time."""

import json
import re
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
TEXT_PREFIX = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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


_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def family_of_folder(folder: Path) -> str:
    """`sd1`, `sd2` or `sdxl`, of one of the tiny folders."""
    if (folder / "text_encoder_2").is_dir():
        return "sdxl"
    return "sd2" if json.loads((folder / "unet/config.json").read_text()).get("use_linear_projection") else "sd1"


def open_clip_tensors(
    tensors: Mapping[str, np.ndarray], *, spare_layer: bool, text_projection: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """A transformers text encoder's tensors under OpenCLIP's names: q, k and v in one, the projection transposed.

    Args:
        spare_layer: repeat the last layer, as SD2 files have one more than their U-Net is conditioned on.
        text_projection: what stands there if the encoder has none.
    """
    plain = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    found = {new: plain[old] for old, new in _OPEN_CLIP.items()}
    count = 1 + max(int(name.split(".")[2]) for name in plain if name.startswith("encoder.layers."))
    for layer in [*range(count), *([count] if spare_layer else [])]:
        here, there = f"encoder.layers.{min(layer, count - 1)}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [plain[f"{here}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{there}attn.in_proj_{kind}"] = np.concatenate(parts)
            for old, new in _OPEN_CLIP_LAYER.items():
                found[f"{there}{new}.{kind}"] = plain[f"{here}{old}.{kind}"]
    if "text_projection.weight" in plain:
        text_projection = plain["text_projection.weight"].T
    if text_projection is not None:
        found["text_projection"] = text_projection
    found["logit_scale"] = np.array(1.0, dtype=np.float32)
    return found


def folder_as_single_file(
    folder: Path,
    path: Path,
    *,
    text_model: bool = True,
    dtype: str = "F32",
    parts: Collection[str] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a diffusers folder's weights as one file in the original layout.

    Args:
        text_model: False drops that level from CLIP's names, as some files do.
        dtype: F32, F16 or BF16.
        parts: only these, such as `unet`; None takes all.
        extra: more tensors, as they are, such as `{"v_pred": np.zeros(0, np.float32)}`.
    """
    found = original_tensors(folder, text_model=text_model, parts=parts)
    tensors = [_in_memory(name, array, dtype) for name, array in found.items()]
    tensors += [_in_memory(name, np.asarray(array, dtype="<f4"), "F32") for name, array in (extra or {}).items()]
    write(path, tensors, metadata)


def original_tensors(
    folder: Path, *, text_model: bool = True, parts: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """A diffusers folder's weights by their original names, float32."""
    from safetensors.numpy import load_file

    family, found = family_of_folder(folder), {}
    for part, file in _FILES.items():
        if not (folder / file).is_file() or (parts is not None and part not in parts):
            continue
        config = json.loads((folder / part / "config.json").read_text())
        stored = {n: a for n, a in load_file(folder / file).items() if not n.endswith("position_ids")}
        if part.startswith("text"):
            for name, array in _text_tensors(family, part, stored).items():
                found[name if text_model else name.replace("transformer.text_model.", "transformer.")] = array
            continue
        levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
        attends = tuple(kind.startswith("Cross") for kind in config["down_block_types"])
        for name, array in stored.items():
            target = original_name(part, name, levels, layers, attends)
            found[target] = array.reshape(original_shape(target, array.shape))
    return {name: np.ascontiguousarray(array, dtype="<f4") for name, array in found.items()}


def _text_tensors(family: str, part: str, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = TEXT_PREFIX[family, part]
    if not prefix.endswith("model."):
        return {f"{prefix}text_model.{name.removeprefix('text_model.')}": array for name, array in stored.items()}
    ones = None
    if family == "sd2":
        ones = np.ones((stored["final_layer_norm.weight"].shape[0],) * 2, dtype=np.float32)
    renamed = open_clip_tensors(stored, spare_layer=family == "sd2", text_projection=ones)
    return {f"{prefix}{name}": array for name, array in renamed.items()}


def _in_memory(name: str, array: np.ndarray, dtype: str) -> Tensor:
    stored = np.ascontiguousarray(as_stored(array, dtype)).reshape(array.shape)
    return Tensor(name, dtype, array.shape, lambda: stored)


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as the bytes of another dtype; BF16, which numpy lacks, cut off, as uint16."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values, dtype="<f4").view(np.uint32) >> 16).astype(np.uint16)
    return values.astype("<f2" if dtype == "F16" else "<f4", copy=False)
