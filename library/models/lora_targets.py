"""Which modules of a base model a LoRA trains, under which key names, from the model's configs alone (no torch).

The tables are ours, because installed libraries rename their modules: transformers dropped a level of `CLIPTextModel`,
yet files keep it. SD1 and SD2 files spell the U-Net as diffusers does; a family that spells it otherwise passes its own
`unet_key` (BEHAVIOUR of the format: `lora_unet_` + module path with dots as underscores, one `lora_te_`, or `lora_te1_`
and `lora_te2_`). How a target is trained, and at which rank, is not decided here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from library.models.families import diffusers_key

Part = Literal["unet", "text_encoder"]
Kernel = Literal["linear", "1x1", "3x3"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoraTarget:
    """One module that may hold a LoRA: a Linear or Conv2d of the diffusers U-Net or of a transformers CLIP text model.

    `name` is the key in files, without `.lora_down.weight` and so on. `path` leads from the U-Net, or from the inner
    text model (`getattr(text_encoder, "text_model", text_encoder)`) number `encoder`, to the module. `conv_only`
    modules belong to LoRA-C3Lier alone; among them Linear and 1x1 ones have the plain rank, 3x3 ones the conv rank.
    """

    name: str
    part: Part
    path: str
    in_features: int
    out_features: int
    kernel: Kernel
    conv_only: bool = False
    encoder: int = 0

    def shapes(self, rank: int) -> tuple[Shape, Shape]:
        """Shapes of `lora_down.weight` and `lora_up.weight` at this rank, as files hold them."""
        size = {"linear": (), "1x1": (1, 1), "3x3": (3, 3)}[self.kernel]
        ones = tuple(1 for _ in size)
        return (rank, self.in_features, *size), (self.out_features, rank, *ones)


def targets(
    unet_config: Mapping[str, Any] | None,
    text_encoder_configs: Sequence[Mapping[str, Any]],
    *,
    conv: bool,
    unet_key: Callable[[str], str] = diffusers_key,
) -> tuple[LoraTarget, ...]:
    """Every module that a LoRA of this base model holds, U-Net first, in the order of the model's own modules.

    `conv` adds what LoRA-C3Lier trains beside LoRA-LierLa. `unet_config` None leaves the U-Net out.
    """
    found: list[LoraTarget] = []
    if unet_config is not None:
        for module in _unet(unet_config):
            if conv or not module.conv_only:
                name = f"lora_unet_{unet_key(module.path)}"
                found.append(LoraTarget(name, "unet", module.path, *module.size, module.kernel, module.conv_only))
    for number, config in enumerate(text_encoder_configs):
        prefix = "lora_te" if len(text_encoder_configs) == 1 else f"lora_te{number + 1}"
        for path, size in _text_encoder(config):
            name = f"{prefix}_text_model_{path.replace('.', '_')}"
            found.append(LoraTarget(name, "text_encoder", path, *size, "linear", encoder=number))
    return tuple(found)


def ranked(chosen: Iterable[LoraTarget], dim: int, conv_dim: int | None) -> Iterator[tuple[LoraTarget, int]]:
    """Each target that is trained, with its rank: `conv_dim` for 3x3 convolutions (without it they are left out)."""
    for target in chosen:
        rank = conv_dim if target.kernel == "3x3" else dim
        if rank and (conv_dim or not target.conv_only):
            yield target, rank


def parameter_count(chosen: Iterable[LoraTarget], dim: int, conv_dim: int | None = None) -> int:
    """Trained numbers in a LoRA of these targets (alphas not counted)."""
    return sum(
        rank * (target.in_features * (9 if target.kernel == "3x3" else 1) + target.out_features)
        for target, rank in ranked(chosen, dim, conv_dim)
    )


@dataclass(frozen=True)
class _Module:
    path: str
    size: tuple[int, int]
    kernel: Kernel
    conv_only: bool


def _text_encoder(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    for layer in range(int(config["num_hidden_layers"])):
        for projection in ("k", "v", "q", "out"):
            yield f"encoder.layers.{layer}.self_attn.{projection}_proj", (width, width)
        yield f"encoder.layers.{layer}.mlp.fc1", (width, inner)
        yield f"encoder.layers.{layer}.mlp.fc2", (inner, width)


_DOWN_TYPES = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_UP_TYPES = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class _Widths:
    """What the modules of every block share: time embedding, cross attention (per block), projection kind."""

    time: int
    context: tuple[int, ...]
    projection: Kernel


def _per_block(value: Any, blocks: int) -> tuple[Any, ...]:
    """diffusers configs give one value for all blocks, or a list with one for each."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * blocks


def _unet(config: Mapping[str, Any]) -> Iterator[_Module]:
    channels = [int(width) for width in config["block_out_channels"]]
    blocks = len(channels)
    layers = _per_block(config.get("layers_per_block", 2), blocks)
    depths = _per_block(config.get("transformer_layers_per_block", 1), blocks)
    widths = _Widths(
        time=int(config.get("time_embedding_dim") or channels[0] * 4),
        context=_per_block(config.get("cross_attention_dim", 1280), blocks),
        projection="linear" if config.get("use_linear_projection") else "1x1",
    )
    previous = channels[0]
    for block, kind in enumerate(config.get("down_block_types") or _DOWN_TYPES):
        here = f"down_blocks.{block}"
        width = channels[block]
        if kind.startswith("CrossAttn"):
            for layer in range(layers[block]):
                yield from _transformer(f"{here}.attentions.{layer}", width, depths[block], widths, block)
        for layer in range(layers[block]):
            yield from _resnet(f"{here}.resnets.{layer}", width if layer else previous, width, widths)
        if block < blocks - 1:
            yield _Module(f"{here}.downsamplers.0.conv", (width, width), "3x3", True)
        previous = width

    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    for block, kind in enumerate(config.get("up_block_types") or _UP_TYPES):
        here = f"up_blocks.{block}"
        mirrored = blocks - 1 - block
        width, skipped = channels[mirrored], channels[max(mirrored - 1, 0)]
        count = layers[mirrored] + 1
        if kind.startswith("CrossAttn"):
            for layer in range(count):
                yield from _transformer(f"{here}.attentions.{layer}", width, up_depths[block], widths, mirrored)
        for layer in range(count):
            entering = (width if layer else previous) + (skipped if layer == count - 1 else width)
            yield from _resnet(f"{here}.resnets.{layer}", entering, width, widths)
        if mirrored:
            yield _Module(f"{here}.upsamplers.0.conv", (width, width), "3x3", True)
        previous = width

    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn":
        yield from _transformer("mid_block.attentions.0", channels[-1], depths[-1], widths, blocks - 1)
        for layer in range(2):
            yield from _resnet(f"mid_block.resnets.{layer}", channels[-1], channels[-1], widths)


def _transformer(path: str, width: int, depth: int, widths: _Widths, block: int) -> Iterator[_Module]:
    """A `Transformer2DModel`; its feed-forward is a GEGLU of four times the width, so its first Linear has eight."""
    yield _Module(f"{path}.proj_in", (width, width), widths.projection, False)
    for layer in range(depth):
        here = f"{path}.transformer_blocks.{layer}"
        sizes = {
            "attn1.to_q": (width, width),
            "attn1.to_k": (width, width),
            "attn1.to_v": (width, width),
            "attn1.to_out.0": (width, width),
            "ff.net.0.proj": (width, width * 8),
            "ff.net.2": (width * 4, width),
            "attn2.to_q": (width, width),
            "attn2.to_k": (widths.context[block], width),
            "attn2.to_v": (widths.context[block], width),
            "attn2.to_out.0": (width, width),
        }
        for name, size in sizes.items():
            yield _Module(f"{here}.{name}", size, "linear", False)
    yield _Module(f"{path}.proj_out", (width, width), widths.projection, False)


def _resnet(path: str, entering: int, width: int, widths: _Widths) -> Iterator[_Module]:
    yield _Module(f"{path}.conv1", (entering, width), "3x3", True)
    yield _Module(f"{path}.time_emb_proj", (widths.time, width), "linear", True)
    yield _Module(f"{path}.conv2", (width, width), "3x3", True)
    if entering != width:
        yield _Module(f"{path}.conv_shortcut", (entering, width), "1x1", True)
