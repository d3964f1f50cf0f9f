"""Parameter groups of LoRA networks: a learning rate for each model, for each block of the U-Net, and LoRA+.

LoRA+ trains up-factors faster than the rest (Hayou et al., arXiv 2402.12354). Names are sd-scripts' (`unet_block4`,
`unet plus`), but each text encoder has a group of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.models.families import UnetBlocks
from library.models.lora_targets import LoraTarget
from networks.blocks import block_index, block_weights, owner
from networks.lora_args import LoraArgs
from networks.lora_layers import LoraLayer


@dataclass(frozen=True)
class Groups:
    """Groups {"params", "lr"} with their names; what has rate 0: whole models, and layers of single blocks."""

    groups: list[dict[str, Any]]
    names: list[str]
    without: tuple[str, ...]
    frozen: tuple[LoraLayer, ...]


def optimizer_groups(
    layers: Iterable[LoraLayer], rate_of: Callable[[LoraTarget], float | None], args: LoraArgs, blocks: UnetBlocks
) -> Groups:
    """The groups of these layers: text encoders first, then the U-Net, by block if blocks have weights.

    `rate_of` is the rate of the model that a target belongs to.
    """
    weights = block_weights(args, blocks)
    members: dict[tuple[str, int], list[LoraLayer]] = {}
    for layer in layers:
        by_block = weights is not None and layer.target.part == "unet"
        index = block_index(layer.target, blocks) if by_block else -1
        members.setdefault((owner(layer.target), index), []).append(layer)
    groups: list[dict[str, Any]] = []
    names: list[str] = []
    without: list[str] = []
    frozen: list[LoraLayer] = []
    for (model, index), mine in sorted(members.items(), key=lambda item: item[0]):
        target = mine[0].target
        rate = rate_of(target) or 0.0
        weight = 1.0 if weights is None or index < 0 else weights[index]
        if not rate:
            without.append(model)
        elif not weight:
            frozen += mine
        else:
            name = model if index < 0 else f"{model}_block{index}"
            ratio = args.loraplus_unet if target.part == "unet" else args.loraplus_text_encoder
            for suffix, params, times in _split(mine, ratio):
                groups.append({"params": params, "lr": rate * weight * times})
                names.append(name + suffix)
    return Groups(groups, names, tuple(dict.fromkeys(without)), tuple(frozen))


def _split(layers: list[LoraLayer], ratio: float | None) -> list[tuple[str, list[nn.Parameter], float]]:
    if ratio is None:
        return [("", [parameter for layer in layers for parameter in layer.parameters()], 1.0)]
    up = [parameter for layer in layers for parameter in layer.lora_up.parameters()]
    faster = {id(parameter) for parameter in up}
    rest = [parameter for layer in layers for parameter in layer.parameters() if id(parameter) not in faster]
    return [("", rest, 1.0), (" plus", up, ratio)]
