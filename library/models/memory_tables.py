"""How many numbers the parts of a base model hold, and how many they keep for the backward pass: from configs alone.

Weights are counted exactly. Activations are counted tensor by tensor, as autograd keeps them for a frozen model with
adapters; both are checked against models on torch's fake devices. What else a run needs, and when, is
library.training.memory_plan's. Imports no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Weights:
    """Numbers in a part's weights: `matrices` of Linear and convolution layers, `others` such as norms, biases,
    embeddings."""

    matrices: int = 0
    others: int = 0

    def __add__(self, more: "Weights") -> "Weights":
        return Weights(self.matrices + more.matrices, self.others + more.others)

    @property
    def count(self) -> int:
        """All of them."""
        return self.matrices + self.others

    def size(self, item: int, matrix_item: int | None = None) -> int:
        """Bytes, at `item` for each number and `matrix_item` for those of matrices where it differs."""
        return self.matrices * (item if matrix_item is None else matrix_item) + self.others * item


@dataclass(frozen=True)
class Resnet:
    """A residual block from `entering` to `width` channels, where `level` halvings of the side lie above it."""

    entering: int
    width: int
    level: int


@dataclass(frozen=True)
class Transformer:
    """A `Transformer2DModel`: `depth` blocks of `width` channels that look at texts of `context` channels."""

    width: int
    depth: int
    context: int
    heads: int
    level: int


@dataclass(frozen=True)
class Resize:
    """The convolution that halves or doubles the side; `level` is that of its input when it halves, of its output when
    it doubles: where its larger picture stands."""

    width: int
    level: int
    way: Literal["down", "up"]


Stage = Resnet | Transformer | Resize


@dataclass(frozen=True)
class Saved:
    """What a forward pass keeps for the backward pass, in numbers of the compute dtype where nothing else is said.

    Attributes:
        kept: all of it but statistics.
        statistics: of norms and of attention's softmax, in float32 whatever the dtype.
        block: the most that one recomputed block keeps while it goes backward; 0 without checkpointing.
        widest: the largest single tensor.
    """

    kept: int
    statistics: int
    block: int
    widest: int

    def size(self, item: int) -> int:
        """Bytes of what is kept, at `item` for each number."""
        return self.kept * item + self.statistics * 4


Checkpointing = Literal["none", "all", "attention"]


def unet_stages(config: Config) -> tuple[Stage, ...]:
    """The blocks of a diffusers U-Net in the order in which data goes through them."""
    widths = [int(width) for width in config["block_out_channels"]]
    count = len(widths)
    layers = _each(config.get("layers_per_block", 2), count)
    depths = _each(config.get("transformer_layers_per_block", 1), count)
    contexts = _each(config.get("cross_attention_dim", 1280), count)
    heads = _each(config.get("num_attention_heads") or config.get("attention_head_dim", 8), count)

    def transformer(number: int, depth: int, level: int) -> Transformer:
        return Transformer(widths[number], depth, contexts[number], heads[number], level)

    stages: list[Stage] = []
    skips, previous = [widths[0]], widths[0]
    down = config.get("down_block_types") or ("CrossAttnDownBlock2D",) * (count - 1) + ("DownBlock2D",)
    for number, kind in enumerate(down):
        for _ in range(layers[number]):
            stages.append(Resnet(previous, widths[number], number))
            previous = widths[number]
            if kind.startswith("CrossAttn"):
                stages.append(transformer(number, depths[number], number))
            skips.append(previous)
        if number < count - 1:
            stages.append(Resize(previous, number, "down"))
            skips.append(previous)
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn":
        middle = Resnet(previous, previous, count - 1)
        stages += [middle, transformer(count - 1, depths[-1], count - 1), middle]
    up = config.get("up_block_types") or ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (count - 1)
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    for place, kind in enumerate(up):
        number = count - 1 - place
        for _ in range(layers[number] + 1):
            stages.append(Resnet(previous + skips.pop(), widths[number], number))
            previous = widths[number]
            if kind.startswith("CrossAttn"):
                stages.append(transformer(number, up_depths[place], number))
        if number:
            stages.append(Resize(previous, number - 1, "up"))
    return tuple(stages)


def _each(value: Any, count: int) -> tuple[int, ...]:
    """diffusers' configs give one value for all blocks, or a list with one for each."""
    return tuple(value) if isinstance(value, Sequence) else (int(value),) * count


def unet_weights(config: Config) -> Weights:
    """The weights of a `UNet2DConditionModel`."""
    first = int(config["block_out_channels"][0])
    time = int(config.get("time_embedding_dim") or first * 4)
    parts = [
        _conv(int(config.get("in_channels", 4)), first),
        _linear(first, time),
        _linear(time, time),
        Weights(others=2 * first),
        _conv(first, int(config.get("out_channels", 4))),
    ]
    if config.get("addition_embed_type") == "text_time":
        parts += [_linear(int(config["projection_class_embeddings_input_dim"]), time), _linear(time, time)]
    return _total([*parts, *(_stage_weights(stage, time) for stage in unet_stages(config))])


def vae_weights(config: Config) -> Weights:
    """The weights of an `AutoencoderKL`, both halves."""
    widths = [int(width) for width in config.get("block_out_channels", (64,))]
    layers, latent = int(config.get("layers_per_block", 1)), int(config.get("latent_channels", 4))
    pictures = int(config.get("in_channels", 3)), int(config.get("out_channels", 3))
    last = widths[-1]
    attention = Weights(others=2 * last) + _linear(last, last, 4)
    middle = [_resnet(last, last, None)] * 2 + [attention] * bool(config.get("mid_block_add_attention", True))
    parts = [_conv(pictures[0], widths[0]), *middle, Weights(others=2 * last), _conv(last, 2 * latent)]
    previous = widths[0]
    for number, width in enumerate(widths):
        parts += [_resnet(previous if layer == 0 else width, width, None) for layer in range(layers)]
        parts += [_conv(width, width)] * (number < len(widths) - 1)
        previous = width
    parts += [_conv(latent, last), *middle, Weights(others=2 * widths[0]), _conv(widths[0], pictures[1])]
    for number, width in enumerate(reversed(widths)):
        parts += [_resnet(previous if layer == 0 else width, width, None) for layer in range(layers + 1)]
        parts += [_conv(width, width)] * (number < len(widths) - 1)
        previous = width
    if config.get("use_quant_conv", True):
        parts.append(_conv(2 * latent, 2 * latent, 1))
    if config.get("use_post_quant_conv", True):
        parts.append(_conv(latent, latent, 1))
    return _total(parts)


def text_encoder_weights(config: Config, *, projects: bool) -> Weights:
    """The weights of a `CLIPTextModel`, or of one with its projection."""
    text = _Text.of(config)
    layer = Weights(others=4 * text.width) + _linear(text.width, text.width, 4)
    layer += _linear(text.width, text.inner) + _linear(text.inner, text.width)
    embeddings = int(config.get("vocab_size", 49408)) + int(config.get("max_position_embeddings", 77))
    projection = Weights(int(config.get("projection_dim", 512)) * text.width if projects else 0)
    return _total([layer] * text.layers) + projection + Weights(others=(embeddings + 2) * text.width)


def widest_kernel(config: Config) -> int:
    """Numbers in the largest convolution of a U-Net, which CPU kernels lay out anew while they compute."""
    stages = unet_stages(config)
    resnets = [9 * stage.width * max(stage.entering, stage.width) for stage in stages if isinstance(stage, Resnet)]
    return max([*resnets, *(9 * stage.width**2 for stage in stages if isinstance(stage, Resize))])


def unet_saved(
    config: Config,
    *,
    batch: int,
    cells: tuple[int, int],
    tokens: int,
    rank: int = 0,
    conv_rank: int = 0,
    checkpointing: Checkpointing = "none",
    every: int = 1,
    outputs: bool = False,
    pooled: bool = False,
) -> Saved:
    """What a forward pass of a U-Net with frozen weights keeps for a backward pass.

    Args:
        cells: height and width of the latents.
        tokens: of a text.
        rank: of adapters on attention layers; 0 where the U-Net has none and only texts have gradients.
        conv_rank: of adapters on 3x3 convolutions; 0 without.
        checkpointing: which blocks are computed again; `every` n-th of them.
        outputs: adapters keep the results of their layers as well, as DoRA does, whose magnitudes multiply them.
        pooled: gradients go to a pooled text, which every residual block is told with the time.
    """
    kept = statistics = block = widest = again = 0
    tracked, texts = conv_rank > 0 or pooled, batch * tokens
    for stage in unet_stages(config):
        places = batch * _area(cells, stage.level)
        if isinstance(stage, Transformer):
            projected = rank > 0 or not config.get("use_linear_projection")
            kept += stage.width * places * (tracked + 2 * projected + 2 * outputs) + 2 * rank * places
            inside = _transformer_saved(stage, places, texts, rank)
            inside += outputs * stage.width * (15 * places + 2 * texts)
            entry, units = stage.width * places, stage.depth
            chosen, tracked = checkpointing != "none", True
            softmax = 2 * (stage.heads + 3) * places
            widest = max(widest, 8 * stage.width * places)
        elif tracked:
            (inside, entry), units, softmax = _convolution_saved(stage, places, conv_rank), 1, 0
            inside += _convolved(stage, places) if outputs and conv_rank else 0
            chosen = checkpointing == "all" and isinstance(stage, Resnet)
            widest = max(widest, entry)
        else:
            continue
        for _ in range(units):
            recomputed = chosen and again % every == 0
            again += chosen
            kept += entry if recomputed else inside
            statistics += 0 if recomputed else softmax
            block = max(block, inside if recomputed else 0)
    first = int(config["block_out_channels"][0])
    return Saved(kept + 3 * first * batch * _area(cells, 0), statistics, block, widest)


def _transformer_saved(stage: Transformer, places: int, texts: int, rank: int) -> int:
    """Kept within each block.

    In units of the picture's tokens x width: both attentions keep query and result, self-attention key and value too;
    the three norms their inputs; GEGLU both halves (8) and the gate (4). Where layers have adapters, their inputs are
    kept as well: of q, k, v together 1, of the second q 1, of the feed-forward 1 and 4; and their rank-wide results.
    (The results of all layers would be 15: 8 of the feed-forward's first, 1 of each other.)
    """
    adapted = 8 * rank * places + 2 * rank * texts
    return places * stage.width * (28 if rank else 21) + 2 * stage.width * texts + adapted


def _convolution_saved(stage: Resnet | Resize, places: int, rank: int) -> tuple[int, int]:
    """Kept inside, and when it is computed again. Each norm, activation and convolution keeps its input.

    On the way up a block's input was put together from two, and its shortcut shares that copy.
    """
    if isinstance(stage, Resize):
        return places * stage.width + rank * (places if stage.way == "up" else places // 4), places * stage.width
    inside = places * (3 * stage.entering + 3 * stage.width + 2 * rank)
    if stage.entering < stage.width:
        inside += places * stage.entering
    return inside + (places * rank if stage.entering != stage.width else 0), places * stage.entering


def _convolved(stage: Resnet | Resize, places: int) -> int:
    """The results of its convolutions."""
    if isinstance(stage, Resize):
        return stage.width * (places if stage.way == "up" else places // 4)
    return stage.width * places * (2 + (stage.entering != stage.width))


def unet_forward(config: Config, *, batch: int, cells: tuple[int, int]) -> Saved:
    """What a forward pass without gradients keeps: the skip connections from the way down to the way up."""
    first = int(config["block_out_channels"][0])
    kept, widest = batch * first * _area(cells, 0), 0
    for stage in unet_stages(config):
        places = batch * _area(cells, stage.level)
        widest = max(widest, places * stage.width * (8 if isinstance(stage, Transformer) else 1))
        if isinstance(stage, Resize) and stage.way == "up":
            break
        kept += places * stage.width if isinstance(stage, Resnet) else 0
    return Saved(kept, 0, 0, max(widest, 8 * batch * first * _area(cells, 0)))


def text_encoder_saved(
    config: Config, *, rows: int, tokens: int, checkpointing: bool = False, adapted: bool = True
) -> Saved:
    """What a forward pass of a CLIP text encoder keeps, with adapters or with gradients of its tokens' vectors alone.

    Of each layer: the inputs of both norms; q, k, v and the attention's result; the activation's input, for OpenAI's
    approximation its sigmoid too. With adapters also the inputs of their layers: of q, k, v together, of the
    feed-forward, and the activation's result.
    """
    text = _Text.of(config)
    inside = rows * tokens * (6 * text.width + (2 if text.act == "quick_gelu" else 1) * text.inner)
    if adapted:
        inside += rows * tokens * (2 * text.width + text.inner)
    entry = rows * tokens * text.width
    kept = text.layers * (entry if checkpointing else inside) + entry
    return Saved(kept, 0, inside if checkpointing else 0, rows * tokens * text.inner)


def vae_widest(config: Config, pixels: int) -> tuple[int, int]:
    """The largest tensors of encoding and of decoding a picture of that many pixels, in numbers.

    Decoding is the larger: the topmost residual blocks but one still have the second level's width when they stand at
    the full size.
    """
    widths = [int(width) for width in config.get("block_out_channels", (64,))]
    return pixels * widths[0], pixels * widths[min(1, len(widths) - 1)]


@dataclass(frozen=True)
class _Text:
    """The sizes of a CLIP text encoder; where a config names none, transformers' defaults."""

    width: int
    inner: int
    layers: int
    act: str

    @classmethod
    def of(cls, config: Config) -> "_Text":
        return cls(
            int(config.get("hidden_size", 512)),
            int(config.get("intermediate_size", 2048)),
            int(config.get("num_hidden_layers", 12)),
            str(config.get("hidden_act", "quick_gelu")),
        )


def _area(cells: tuple[int, int], level: int) -> int:
    """Places of a picture after `level` halvings, which round up."""
    return -(-cells[0] // 2**level) * -(-cells[1] // 2**level)


def _linear(entering: int, leaving: int, times: int = 1) -> Weights:
    return Weights(times * entering * leaving, times * leaving)


def _conv(entering: int, leaving: int, side: int = 3) -> Weights:
    return Weights(entering * leaving * side**2, leaving)


def _resnet(entering: int, width: int, time: int | None) -> Weights:
    parts = [Weights(others=2 * (entering + width)), _conv(entering, width), _conv(width, width)]
    if time is not None:
        parts.append(_linear(time, width))
    if entering != width:
        parts.append(_conv(entering, width, 1))
    return _total(parts)


def _stage_weights(stage: Stage, time: int) -> Weights:
    if isinstance(stage, Resnet):
        return _resnet(stage.entering, stage.width, time)
    if isinstance(stage, Resize):
        return _conv(stage.width, stage.width)
    return _total(_transformer_weights(stage))


def _transformer_weights(stage: Transformer) -> Iterator[Weights]:
    width, square = stage.width, stage.width**2
    yield Weights(others=2 * width)
    yield _linear(width, width, 2)
    for _ in range(stage.depth):
        yield Weights(6 * square + 2 * stage.context * width, 6 * width + 2 * width)
        yield _linear(width, 8 * width)
        yield _linear(4 * width, width)


def _total(parts: Sequence[Weights] | Iterator[Weights]) -> Weights:
    return reduce(Weights.__add__, parts, Weights())
