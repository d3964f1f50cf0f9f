"""Paths in a diffusers SDXL U-Net -> paths in the original (sgm) layout, which is how SDXL LoRA files spell them.

Torch-free. The numbers of blocks come from SDXL's own shape: two layers a level down, three up.
"""

import re

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)(?:\.(.+))?")


def sgm_path(path: str) -> str:
    """The original path of a module (a container or a leaf) of a diffusers SDXL U-Net, dotted.

    Raises:
        ValueError: no such module is in an SDXL U-Net.
    """
    if path in _ENDS:
        return _ENDS[path]
    if found := _MIDDLE.fullmatch(path):
        kind, number, rest = found[1], int(found[2]), found[3]
        return _with(f"middle_block.{1 if kind == 'attentions' else 2 * number}", kind, rest)
    found = _BLOCK.fullmatch(path)
    if found is None:
        raise ValueError(f"{path} is no module of an SDXL U-Net")
    way, level, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    if way == "down":
        number = 3 * (level + 1) if kind == "downsamplers" else 3 * level + layer + 1
        return _with(f"input_blocks.{number}.{place}", kind, rest)
    number = 3 * level + (2 if kind == "upsamplers" else layer)
    return _with(f"output_blocks.{number}.{place}", kind, rest)


def sgm_key(path: str) -> str:
    """The same as it stands in the key of a LoRA file, with underscores."""
    return sgm_path(path).replace(".", "_")


def _with(block: str, kind: str, rest: str | None) -> str:
    if rest is None:
        return block
    if kind == "resnets":
        first, dot, last = rest.partition(".")
        return f"{block}.{_RESNET[first]}{dot}{last}"
    return f"{block}.{rest.replace('conv', 'op', 1)}" if kind == "downsamplers" else f"{block}.{rest}"
