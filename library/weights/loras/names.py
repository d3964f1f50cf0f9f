"""The names of a LoRA's modules: a file's underscored key <-> the dotted path of the module in diffusers or
transformers. Imports no torch.

Underscores stand for dots and stand in names as well, so a key is taken apart by the words that these models are made
of. The original (sgm) spelling of SDXL's blocks is turned into diffusers' by their numbers.
"""

import re
from functools import lru_cache

_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "proj_in", "proj_out", "to_q", "to_k", "to_v"),
    *("to_out", "time_emb_proj", "conv_shortcut", "time_embedding", "add_embedding", "linear_1", "linear_2", "conv_in"),
    *("conv_out", "conv_norm_out", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("final_layer_norm", "token_embedding", "position_embedding", "text_projection", "group_norm", "layer_norm1"),
    *("layer_norm2", "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "label_emb", "time_embed"),
)
_SPLIT = re.compile("|".join((*sorted(_WORDS, key=len, reverse=True), "[^_]+")))
_LEVEL = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)(?:\.(.+))?")
_MIDDLE = re.compile(r"middle_block\.(\d+)(?:\.(.+))?")
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_3X3 = re.compile(
    r".*_(conv[12]|in_layers_2|out_layers_3|conv_in|conv_out|input_blocks_0_0|out_2|input_blocks_\d+_0_op"
    r"|(down|up)samplers_0_conv|output_blocks_\d+_[12]_conv)"
)
_1X1 = re.compile(r".*_(conv_shortcut|skip_connection)")


def kernel_of(name: str) -> tuple[int, ...]:
    """The window of a U-Net's convolution, by a module's name in a file; () of a Linear, and of `proj_in` and
    `proj_out`, which are 1x1 convolutions in some models and Linear in others."""
    if _3X3.fullmatch(name):
        return (3, 3)
    return (1, 1) if _1X1.fullmatch(name) else ()


@lru_cache(maxsize=8192)
def dotted(key: str) -> str:
    """An underscored module path, as in `lora_unet_<path>`, with its dots: `a_0_to_out_0` -> `a.0.to_out.0`."""
    return ".".join(_SPLIT.findall(key))


def diffusers_path(path: str) -> str:
    """The diffusers path of a module of an SDXL U-Net in the original spelling; other paths as they are."""
    if path in _ENDS:
        return _ENDS[path]
    if found := _MIDDLE.fullmatch(path):
        number, rest = int(found[1]), found[2]
        return (
            f"mid_block.attentions.0{_after(rest)}"
            if number == 1
            else _resnet(f"mid_block.resnets.{number // 2}", rest)
        )
    found = _LEVEL.fullmatch(path)
    if found is None:
        return path
    number, place, rest = int(found[2]), int(found[3]), found[4]
    if found[1] == "input_blocks":
        level, layer = divmod(number - 1, 3)
        if layer == 2:
            return f"down_blocks.{level}.downsamplers.0{_after((rest or '').replace('op', 'conv', 1) or None)}"
        way = f"down_blocks.{level}"
    else:
        level, layer = divmod(number, 3)
        way = f"up_blocks.{level}"
        if place == 2 or (place == 1 and rest == "conv"):
            return f"{way}.upsamplers.0{_after(rest)}"
    return _resnet(f"{way}.resnets.{layer}", rest) if place == 0 else f"{way}.attentions.{layer}{_after(rest)}"


def _after(rest: str | None) -> str:
    return f".{rest}" if rest else ""


def _resnet(block: str, rest: str | None) -> str:
    return f"{block}{_after(_RESNET.get(rest or '', rest))}"
