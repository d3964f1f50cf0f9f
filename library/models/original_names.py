"""Names of diffusers' and transformers' modules -> names of the original layout, in which one file holds a base model.

Torch-free, and nothing but names: the way back is models.single_file, which asks diffusers' converters. How blocks are
numbered follows from a part's config, so smaller or deeper models of a family are named right, too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.models.families import Family, Part, TextEncoder
from library.models.recognise import UNET, VAE
from library.models.sgm_names import sgm_path
from library.models.single_configs import packaged

EMA = "model_ema."
"""What the names of averaged copies begin with, which no pipeline uses."""
PART_PREFIXES = (UNET, VAE, "cond_stage_model.", "conditioner.")
"""What the names of all weights in a file begin with; copies, buffers of schedules and marks have other names."""
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_LEAVES = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
_VAE_CONTAINERS = {"resnets": "block", "downsamplers": "downsample", "upsamplers": "upsample"}
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
_QUERY_KEY_VALUE = ("q", "k", "v")
_UNET_ENDS = (
    *("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1"),
    *("add_embedding.linear_2", "conv_norm_out", "conv_out"),
)
_RESNET_MODULES = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
_ATTENTION_MODULES = ("norm", "proj_in", "proj_out")
_TRANSFORMER_MODULES = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
)
_KNOWN = "models of SD1, SD2 and SDXL have that layout"


@dataclass(frozen=True)
class Original:
    """One tensor of the original layout.

    Attributes:
        name: with the part's prefix.
        targets: the tensors of the module that it holds, one below the other (by rows).
        turned: it holds the matrix transposed.
        dims: how many dimensions it has; a matrix is a 1x1 convolution's kernel where there are more. None: as many as
            the module's tensor.
    """

    name: str
    targets: tuple[str, ...]
    turned: bool = False
    dims: int | None = None

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape, from those of `targets`."""
        rows, *rest = shapes[0]
        shape = (sum(one[0] for one in shapes), *rest) if len(shapes) > 1 else (rows, *rest)
        if self.turned:
            return shape[::-1]
        if self.dims is None:
            return shape
        return (*shape[: self.dims], *(1,) * (self.dims - len(shape)))


def prefix(family: Family, part: Part) -> str:
    """What precedes the names of a part in a file."""
    usual = {"unet": UNET, "vae": VAE}
    return usual.get(part) or _encoder(family, part).prefix


def originals(family: Family, part: Part, config: Mapping[str, Any], names: Iterable[str]) -> Iterator[Original]:
    """The tensors that hold a part in the original layout.

    Args:
        config: the part's, of diffusers or transformers.
        names: of the module's state dict; those of text encoders without `text_model.`.

    Raises:
        UserError: a tensor that has no name there, or one of q, k and v is missing.
    """
    before = prefix(family, part)
    if part == "unet":
        blocks = _Blocks(packaged(family.name, "unet") | dict(config))
        dims = 2 if linear_projections(family) else 4
        for name in names:
            yield Original(before + blocks.original(name), (name,), dims=dims if _projects(name) else None)
    elif part == "vae":
        levels = len(config["block_out_channels"])
        for name in names:
            found = _vae(name, levels)
            kernel = ".mid.attn_1." in found and found.endswith(".weight") and ".norm." not in found
            yield Original(before + found, (name,), dims=4 if kernel else None)
    elif _encoder(family, part).open_clip:
        for one in _open_clip(list(names)):
            yield Original(before + one.name, one.targets, one.turned)
    else:
        for name in names:
            yield Original(f"{before}text_model.{name}", (name,))


def unet_names(family: Family, config: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Every name that a tensor of a U-Net with this config may have in diffusers; a U-Net has not all of them.

    Args:
        depth: transformer blocks in the deepest attention.
    """
    whole = packaged(family.name, "unet") | dict(config)
    layers = _layers(whole)
    places = [f"mid_block.{kind}" for kind in ("resnets.0", "attentions.0", "resnets.1")]
    for level, (down, up) in enumerate(zip(layers, reversed(layers), strict=True)):
        for way, count, sampler in (("down", down, "downsamplers"), ("up", up + 1, "upsamplers")):
            block = f"{way}_blocks.{level}"
            places += [f"{block}.{kind}.{layer}" for kind in ("resnets", "attentions") for layer in range(count)]
            places.append(f"{block}.{sampler}.0")
    inside = {
        "resnets": _RESNET_MODULES,
        "attentions": (
            *_ATTENTION_MODULES,
            *(f"transformer_blocks.{number}.{name}" for number in range(depth) for name in _TRANSFORMER_MODULES),
        ),
    }
    modules = [*_UNET_ENDS]
    for place in places:
        modules += [f"{place}.{name}" for name in inside.get(place.split(".")[-2], ("conv",))]
    for module in modules:
        yield from (f"{module}.weight", f"{module}.bias")


def open_clip_names(layers: int) -> Iterator[str]:
    """Every name that a tensor of OpenCLIP's text encoder has in transformers, without `text_model.`."""
    yield from _OPEN_CLIP
    yield "text_projection.weight"
    modules = [*_OPEN_CLIP_LAYER, *(f"self_attn.{letter}_proj" for letter in _QUERY_KEY_VALUE)]
    for number in range(layers):
        for module in modules:
            yield from (f"encoder.layers.{number}.{module}.{leaf}" for leaf in ("weight", "bias"))


def linear_projections(family: Family) -> bool:
    """Whether files of a family have matrices around the U-Net's transformers, as all since OpenCLIP, or 1x1 kernels.

    Diffusers' configs of SD2 may say either; the values are the same.
    """
    return any(encoder.open_clip for encoder in family.text_encoders)


def _encoder(family: Family, part: Part) -> TextEncoder:
    return next(encoder for encoder in family.text_encoders if encoder.part == part)


def _projects(name: str) -> bool:
    return name.endswith((".proj_in.weight", ".proj_out.weight"))


def _layers(config: Mapping[str, Any]) -> list[int]:
    """How many each level of a U-Net has, going down."""
    each = config["layers_per_block"]
    return list(each) if isinstance(each, Sequence) else [each] * len(config["block_out_channels"])


class _Blocks:
    """Where the blocks of a U-Net with a diffusers config stand in the original one's two lists."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        layers = _layers(config)
        self._down_starts, self._up_starts = [1], [0]
        for count in layers:
            self._down_starts.append(self._down_starts[-1] + count + 1)
        for count in reversed(layers):
            self._up_starts.append(self._up_starts[-1] + count + 1)
        self._attends = [str(kind).startswith("CrossAttn") for kind in config["up_block_types"]]

    def original(self, name: str) -> str:
        """The original name of a tensor, without prefix."""
        try:
            return self._block(name) if name.startswith(("down_blocks.", "up_blocks.")) else _named(name)
        except (KeyError, ValueError, IndexError) as error:
            wrong = "has no name in the original layout"
            raise UserError.single(f"the U-Net's tensor {name}", wrong, _KNOWN) from error

    def _block(self, name: str) -> str:
        way, level_text, kind, layer_text, rest = name.split(".", 4)
        level, layer = int(level_text), int(layer_text)
        if way == "down_blocks" and kind == "downsamplers":
            return f"input_blocks.{self._down_starts[level + 1] - 1}.0.{rest.replace('conv', 'op', 1)}"
        if way == "up_blocks" and kind == "upsamplers":
            return f"output_blocks.{self._up_starts[level + 1] - 1}.{2 if self._attends[level] else 1}.{rest}"
        place = {"resnets": 0, "attentions": 1}[kind]
        inner = _named(f"mid_block.{kind}.0.{rest}").split(".", 2)[2]
        if way == "down_blocks":
            return f"input_blocks.{self._down_starts[level] + layer}.{place}.{inner}"
        return f"output_blocks.{self._up_starts[level] + layer}.{place}.{inner}"


def _named(name: str) -> str:
    """A tensor outside of the two lists, or in its block: there all families are alike."""
    module, _, leaf = name.rpartition(".")
    return f"{sgm_path(module)}.{leaf}"


def _vae(name: str, levels: int) -> str:
    """The original name of a VAE's tensor; its decoder's levels are counted from the other end."""
    side, _, rest = name.partition(".")
    pieces = rest.split(".")
    if pieces[0] == "mid_block" and pieces[1] == "attentions":
        *module, leaf = pieces[3:]
        return f"{side}.mid.attn_1.{_VAE_ATTENTION['.'.join(module)]}.{leaf}"
    pieces = [_VAE_LEAVES.get(piece, piece) for piece in pieces]
    if pieces[0] == "mid_block":
        return ".".join([side, "mid", f"block_{int(pieces[2]) + 1}", *pieces[3:]])
    if pieces[0] in ("down_blocks", "up_blocks"):
        down = pieces[0] == "down_blocks"
        level = int(pieces[1]) if down else levels - 1 - int(pieces[1])
        container = _VAE_CONTAINERS[pieces[2]]
        numbered = [container, pieces[3]] if container == "block" else [container]
        return ".".join([side, "down" if down else "up", str(level), *numbered, *pieces[4:]])
    return ".".join([side, *pieces])


def _open_clip(names: Sequence[str]) -> Iterator[Original]:
    """A text encoder as OpenCLIP has it: q, k and v in one tensor, and the projection from the other side."""
    there = set(names)
    for name in names:
        if name == "text_projection.weight":
            yield Original("text_projection", (name,), turned=True)
        elif name in _OPEN_CLIP:
            yield Original(_OPEN_CLIP[name], (name,))
        else:
            yield from _open_clip_layer(name, there)


def _open_clip_layer(name: str, there: set[str]) -> Iterator[Original]:
    pieces = name.split(".")
    layer, module, leaf = f"transformer.resblocks.{pieces[2]}", ".".join(pieces[3:-1]), pieces[-1]
    if module in _OPEN_CLIP_LAYER:
        yield Original(f"{layer}.{_OPEN_CLIP_LAYER[module]}.{leaf}", (name,))
        return
    stem = ".".join(pieces[:4])
    three = tuple(f"{stem}.{letter}_proj.{leaf}" for letter in _QUERY_KEY_VALUE)
    if name not in three or not there.issuperset(three):
        wrong = "has no name in the original layout"
        raise UserError.single(f"the text encoder's tensor {name}", wrong, _KNOWN)
    if name == three[0]:
        yield Original(f"{layer}.attn.in_proj_{leaf}", three)
