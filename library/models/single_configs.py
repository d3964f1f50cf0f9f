"""The configs of a single file: the packaged ones of its family, with the sizes that its tensors have; torch-free."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models.families import Family, TextEncoder
from library.models.headers import Header
from library.models.recognise import UNET, context_width

_PACKAGED = Path(__file__).parent / "configs"
_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_HEAD_WIDTH = 64
SIZES = 6
_VAE_NAMES = {
    True: ("encoder.down.{}.block.{}.conv1.weight", "decoder.conv_in.weight"),
    False: ("encoder.down_blocks.{}.resnets.{}.conv1.weight", "decoder.conv_in.weight"),
}


def packaged(family: str, part: str) -> dict[str, Any]:
    """A packaged config: part is `unet`, `vae`, `text_encoder`, `text_encoder_2` or `scheduler`."""
    config: dict[str, Any] = json.loads((_PACKAGED / family / f"{part}.json").read_text(encoding="utf-8"))
    return config


def unet_config(header: Header, family: Family, projection: int, where: str) -> dict[str, Any]:
    """Widths, levels, layers per level and attention as the file has them; norm groups by the widths.

    Args:
        projection: the width of the pooled text that the U-Net takes beside the sizes; of no use to families without.

    Raises:
        UserError: a U-Net with levels that diffusers' config can't tell, as pruned models have.
    """
    levels: list[list[int]] = [[]]
    depths: list[list[int]] = [[]]
    block = 1
    stem = f"{UNET}input_blocks."
    counts = _depths(header)
    while f"{stem}{block}.0.op.weight" in header.entries or f"{stem}{block}.0.out_layers.3.weight" in header.entries:
        if f"{stem}{block}.0.op.weight" in header.entries:
            levels.append([])
            depths.append([])
        else:
            levels[-1].append(header.shape(f"{stem}{block}.0.out_layers.3.weight")[0])
            depths[-1].append(counts.get(f"input_blocks.{block}", 0))
        block += 1
    attends = [bool(level and level[0]) for level in depths]
    widths = [level[0] for level in levels if level]
    config = packaged(family.name, "unet")
    config |= {
        "block_out_channels": widths,
        "norm_num_groups": _groups(widths),
        "layers_per_block": len(levels[0]),
        "cross_attention_dim": context_width(header),
        "in_channels": header.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": (header.shape(f"{UNET}out.2.weight") or (config["out_channels"],))[0],
        "down_block_types": [_CROSS_DOWN if has else _DOWN for has in attends],
        "up_block_types": [_CROSS_UP if has else _UP for has in reversed(attends)],
    }
    if isinstance(config["attention_head_dim"], list):
        config["attention_head_dim"] = [max(1, width // _HEAD_WIDTH) for width in widths]
    deep = [level[0] or 1 if level else 1 for level in depths]
    even = all(len(set(level)) == 1 for level in depths) and counts.get("middle_block", 0) == deep[-1]
    if not even or (set(deep) != {1} and "transformer_layers_per_block" not in config):
        wrong = f"a U-Net like {family.title}'s, but with other attention layers, as pruned models have"
        raise UserError.single(where, wrong, "take the whole model")
    if "transformer_layers_per_block" in config:
        config["transformer_layers_per_block"] = deep
    if config.get("addition_embed_type"):
        inputs = (header.shape(f"{UNET}label_emb.0.0.weight") or (0, 0))[1]
        config["projection_class_embeddings_input_dim"] = inputs
        config["addition_time_embed_dim"] = (inputs - projection) // SIZES
    return config


def _groups(widths: Sequence[int]) -> int:
    """Groups of the group norms, which no tensor tells: 32, as in every published model, of at least 4 channels."""
    return max(1, min(32, min(widths, default=0) // 4))


def _depths(header: Header) -> dict[str, int]:
    """How many transformer layers each block has: `input_blocks.4` -> 2; blocks without attention aren't there."""
    found: dict[str, int] = {}
    for name in header.entries:
        if name.startswith(UNET) and name.endswith(".attn1.to_q.weight"):
            block, _, rest = name.removeprefix(UNET).partition(".1.transformer_blocks.")
            found[block] = max(found.get(block, 0), int(rest.split(".")[0]) + 1)
    return found


def vae_config(header: Header, family: Family, prefix: str, original: bool) -> dict[str, Any]:
    """Widths, levels and latent channels as the file has them, `original`'s or diffusers' names behind `prefix`."""
    conv, inner = _VAE_NAMES[original]
    widths: list[int] = []
    while shape := header.shape(prefix + conv.format(len(widths), 0)):
        widths.append(shape[0])
    layers = 0
    while header.shape(prefix + conv.format(0, layers)):
        layers += 1
    config = packaged(family.name, "vae")
    return config | {
        "block_out_channels": widths,
        "norm_num_groups": _groups(widths),
        "layers_per_block": layers,
        "latent_channels": (header.shape(prefix + inner) or (0, config["latent_channels"]))[1],
        "down_block_types": config["down_block_types"][:1] * len(widths),
        "up_block_types": config["up_block_types"][:1] * len(widths),
        "scaling_factor": family.latent_scale,
    }


def holds_text_encoder(header: Header, encoder: TextEncoder) -> bool:
    """Is this text encoder in the file?"""
    return bool(_tokens(header, encoder))


def text_encoder_config(header: Header, family: Family, encoder: TextEncoder) -> dict[str, Any]:
    """Width, depth, vocabulary and projection as the file has them; heads of 64, as every CLIP has them.

    An OpenCLIP encoder without pooled output is read up to its last but one layer, which is what its U-Net knows.
    """
    vocabulary, width = _tokens(header, encoder)
    prefix = encoder.prefix if encoder.open_clip else _clip_prefix(header, encoder)
    layer = "transformer.resblocks.{}.mlp.c_fc.weight" if encoder.open_clip else "encoder.layers.{}.mlp.fc1.weight"
    inner = (header.shape(prefix + layer.format(0)) or (4 * width,))[0]
    count = 0
    while header.shape(prefix + layer.format(count)):
        count += 1
    config = packaged(family.name, encoder.part)
    if encoder.open_clip and not encoder.projects:
        known = config["num_hidden_layers"] if width == config["hidden_size"] else count - 1
        count = min(count, known)
    turned = header.shape(f"{encoder.prefix}text_projection")
    straight = header.first(f"{encoder.prefix}text_projection.weight")
    return config | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": turned[1] if len(turned) == 2 else (straight or (width,))[0],
        "num_hidden_layers": count,
        "intermediate_size": inner,
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
    }


def _tokens(header: Header, encoder: TextEncoder) -> tuple[int, ...]:
    """The shape of its token embedding, (vocabulary, width); () where there is none."""
    if encoder.open_clip:
        found = header.shape(f"{encoder.prefix}token_embedding.weight")
    else:
        found = header.shape(f"{_clip_prefix(header, encoder)}embeddings.token_embedding.weight")
    return found if len(found) == 2 else ()


def _clip_prefix(header: Header, encoder: TextEncoder) -> str:
    """A CLIP encoder's prefix as this file has it, with or without `text_model.`."""
    full = f"{encoder.prefix}text_model."
    return full if f"{full}embeddings.token_embedding.weight" in header.entries else encoder.prefix
