"""Ranks, alphas and learning-rate weights by block of the U-Net, and which block a module stands in. Imports no torch.

What users may write is in options.block_lists; how many blocks a family counts is in models.families. An entry for a
block counts as follows: input, then `down`, `mid` and `up` blocks in the order of the original layout, then output.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import Problem, UserError
from library.models.families import Family, UnetBlocks
from library.models.lora_targets import LoraTarget
from library.options.block_lists import ALPHAS, BLOCK_LISTS, DIMS, WEIGHTS, BlockWeights
from library.options.modules import MODULE_ARGS, read_settings
from networks.lora_args import LoraArgs

_ORIGINAL = re.compile(r"_(input_blocks|middle_block|output_blocks)_(\d+)_")
_DIFFUSERS = re.compile(r"_(down|up)_blocks_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)_")


def block_index(target: LoraTarget, blocks: UnetBlocks) -> int:
    """Where a U-Net module's settings stand in a list for all blocks.

    Raises:
        UserError: the U-Net has more blocks than its family.
    """
    name = f"{target.name}_"
    down, up = blocks.ends, blocks.ends + blocks.down + blocks.mid
    if found := _ORIGINAL.search(name):
        first = {"input_blocks": down, "middle_block": down + blocks.down, "output_blocks": up}
        index = first[found[1]] + int(found[2])
    elif found := _DIFFUSERS.search(name):
        layer = 2 if found[3].endswith("samplers") else int(found[4])
        index = 3 * int(found[2]) + layer + (down + 1 if found[1] == "down" else up)
    else:
        index = down + blocks.down
    if index >= blocks.length:
        wrong = f"{target.name} is in block {index}, and lists for this family end at {blocks.length - 1}"
        raise UserError.single("--network_args", wrong, "leave out the settings for blocks")
    return index


def block_name(target: LoraTarget, blocks: UnetBlocks) -> str:
    """The block of any target, as parameter groups and logs name it."""
    if target.part == "unet":
        return f"unet_block{block_index(target, blocks)}"
    layer = re.search(r"layers\.(\d+)", target.path)
    return f"{owner(target)}_layer{layer[1] if layer else 0}"


def owner(target: LoraTarget) -> str:
    """The model that a target belongs to, as parameter groups name it: unet, textencoder, textencoder1 or 2."""
    return "unet" if target.part == "unet" else "textencoder" + target.name.split("_")[1].removeprefix("te")


@dataclass(frozen=True)
class BlockShapes:
    """Ranks and alphas for each block; rank 0 trains nothing there. `weights` None: one learning rate for all."""

    dims: tuple[int, ...]
    alphas: tuple[float, ...]
    conv_dims: tuple[int, ...]
    conv_alphas: tuple[float, ...]
    weights: tuple[float, ...] | None


def block_shapes(args: LoraArgs, blocks: UnetBlocks) -> BlockShapes:
    """What each block of the U-Net gets: its own settings, else those of the whole network.

    Raises:
        UserError: a list hasn't as many entries as the family has blocks.
    """
    problems = list(_wrong_lengths(vars(args), blocks, lambda name: f"--network_args {name}"))
    if problems:
        raise UserError(problems)
    length, weights = blocks.length, block_weights(args, blocks)
    dims = args.block_dims or (args.dim,) * length
    conv_dims = args.conv_block_dims or (args.conv_dim or 0,) * length
    if weights:
        dims = tuple(dim if weight else 0 for dim, weight in zip(dims, weights, strict=True))
        conv_dims = tuple(dim if weight else 0 for dim, weight in zip(conv_dims, weights, strict=True))
    return BlockShapes(
        dims=dims,
        alphas=args.block_alphas or (args.alpha,) * length,
        conv_dims=conv_dims,
        conv_alphas=args.conv_block_alphas or (args.conv_alpha,) * length,
        weights=weights,
    )


def block_weights(args: LoraArgs, blocks: UnetBlocks) -> tuple[float, ...] | None:
    """What the U-Net's learning rate is multiplied by in each block; None where nothing was said.

    Weights up to `block_lr_zero_threshold` count as 0.
    """
    given = (args.down_lr_weight, args.mid_lr_weight, args.up_lr_weight)
    if all(one is None for one in given):
        return None
    lengths = (blocks.down, blocks.mid, blocks.up)
    inner = [
        weight if weight > args.block_lr_zero_threshold else 0.0
        for one, length in zip(given, lengths, strict=True)
        for weight in (one or BlockWeights()).values(length)
    ]
    ends = (1.0,) * blocks.ends
    return (*ends, *inner, *ends)


def shaped(found: Iterable[LoraTarget], args: LoraArgs, blocks: UnetBlocks) -> Iterator[tuple[LoraTarget, int, float]]:
    """Each of these targets that the settings train, with its rank and alpha.

    3x3 convolutions have the rank for convolutions; other modules of ResNet blocks, which are trained beside them, the
    plain one. An alpha of 0 means the rank.

    Raises:
        UserError: see `block_shapes`.
    """
    shapes = block_shapes(args, blocks)
    convolutions = bool(args.conv_dim or any(args.conv_block_dims or ()))
    for target in found:
        if target.conv_only and not convolutions:
            continue
        conv = target.kernel == "3x3"
        if target.part == "unet":
            index = block_index(target, blocks) if _by_block(args) else 0
            rank = shapes.conv_dims[index] if conv else shapes.dims[index]
            alpha = shapes.conv_alphas[index] if conv else shapes.alphas[index]
        else:
            rank, alpha = args.dim, args.alpha
        if rank:
            yield target, rank, alpha or float(rank)


def _by_block(args: LoraArgs) -> bool:
    return any(getattr(args, name) is not None for name in BLOCK_LISTS)


def block_problems(
    network_args: Mapping[str, str], family: Family, module: str = "networks.lora", where: str = "--network_args"
) -> Iterator[Problem]:
    """What is wrong with lists for blocks as soon as the family is known: their lengths.

    Settings that can't be read at all are left to the checks of the options.
    """
    values = _values(network_args, module)
    yield from _wrong_lengths(values, family.blocks, lambda _: where, family.title)


def block_notices(
    network_args: Mapping[str, str], family: Family, module: str = "networks.lora", where: str = "--network_args"
) -> Iterator[str]:
    """Lines about learning-rate weights that don't match the family's blocks, which still count: see `BlockWeights`."""
    values, blocks = _values(network_args, module), family.blocks
    for name, length in zip(WEIGHTS, (blocks.down, blocks.mid, blocks.up), strict=True):
        given = values.get(name)
        if not isinstance(given, BlockWeights) or given.preset or len(given.numbers) == length:
            continue
        what = "the rest count as 1" if len(given.numbers) < length else "the last ones are left out"
        yield f"{where}: {name} has {len(given.numbers)} numbers for the {length} blocks of {family.title}; {what}"


def _values(network_args: Mapping[str, str], module: str) -> dict[str, Any]:
    return read_settings(module, network_args, str).values if module in MODULE_ARGS else {}


def _wrong_lengths(
    values: Mapping[str, Any], blocks: UnetBlocks, place: Callable[[str], str], title: str = "this model"
) -> Iterator[Problem]:
    for name in (*DIMS, *ALPHAS):
        given = values.get(name)
        if given is not None and len(given) != blocks.length:
            ends = f"{blocks.ends} + " if blocks.ends else ""
            parts = f"{ends}{blocks.down} down + {blocks.mid} mid + {blocks.up} up" + (f" + {blocks.ends}" * bool(ends))
            wrong = f"{name} has {len(given)} entries, and {title} has {blocks.length} blocks"
            yield Problem(place(name), wrong, f"write {parts}")
