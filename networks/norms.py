"""Sizes of what LoRAs add, from matrices as small as the rank: the product up @ down is never made.

With D = scale * up @ down, ||D||^2 is the sum of (up^T up) * (down down^T), and a row's square follows from the same
products. Layers of one shape are computed together, and nothing waits for the device: all results are tensors there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.models.families import UnetBlocks
from networks.blocks import block_name
from networks.lora_layers import LoraLayer


def row_squares(weight: Tensor, down: Tensor, up: Tensor, scale: float, base_squares: Tensor) -> Tensor:
    """||W + D||^2 of each output (out,): weight (out, in) float32, down (r, in...), up (out, r...) of any float dtype.

    `base_squares` is ||W||^2 of each output.
    """
    down, up = down.float().flatten(1), up.float().flatten(1)
    crossed = ((weight @ down.t()) * up).sum(1)
    own = ((up @ (down @ down.t())) * up).sum(1)
    return (base_squares + 2 * scale * crossed + scale * scale * own).clamp(min=0)


def product_norms(layers: Sequence[LoraLayer]) -> Tensor:
    """||D|| of each layer at strength 1 (n,), float32."""
    alike: dict[tuple[torch.Size, torch.Size, float], list[int]] = {}
    for place, layer in enumerate(layers):
        key = (layer.lora_down.weight.shape, layer.lora_up.weight.shape, abs(layer.scale))
        alike.setdefault(key, []).append(place)
    found: dict[int, Tensor] = {}
    with torch.no_grad(), torch.autocast(layers[0].lora_up.weight.device.type, enabled=False):
        for (_, _, scale), places in alike.items():
            down = torch.stack([layers[place].lora_down.weight.flatten(1) for place in places]).float()
            up = torch.stack([layers[place].lora_up.weight.flatten(1) for place in places]).float()
            squares = ((up.mT @ up) * (down @ down.mT)).sum((1, 2)).clamp(min=0)
            found.update(zip(places, (squares.sqrt() * scale).unbind(), strict=True))
    return torch.stack([found[place] for place in range(len(layers))])


def combined_norms(layers: Sequence[LoraLayer]) -> Tensor:
    """||W + D|| of each layer at strength 1 (n,), float32; of a DoRA its direction before it is scaled."""
    found = []
    with torch.no_grad(), torch.autocast(layers[0].lora_up.weight.device.type, enabled=False):
        for layer in layers:
            down, up = layer.lora_down.weight, layer.lora_up.weight
            weight = layer.base.weight.to(down.device, torch.float32).flatten(1)
            found.append(row_squares(weight, down, up, layer.scale, weight.square().sum(1)).sum().sqrt())
    return torch.stack(found)


def limit_norms(layers: Sequence[LoraLayer], limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Shrink both factors of every layer whose ||D|| is above `limit` so that it is `limit`.

    Returns how many were, and the mean and the largest norm afterwards, each 0-d. Source: sd-scripts'
    `--scale_weight_norms`, where norms below half the limit count as that half.
    """
    with torch.no_grad():
        norms = product_norms(layers)
        counted = norms.clamp(min=limit / 2)
        ratios = counted.clamp(max=limit) / counted
        roots = ratios.sqrt()
        for layer, root in zip(layers, roots.unbind(), strict=True):
            layer.lora_down.weight.mul_(root)
            layer.lora_up.weight.mul_(root)
        after = norms * ratios
        return (ratios != 1).sum(), after.mean(), after.max()


def gradient_norms(layers: Sequence[LoraLayer]) -> Tensor | None:
    """The norm of all gradients of each layer that has some (n,); None before the first backward pass."""
    squares = [square for layer in layers if (square := _gradient_square(layer)) is not None]
    return torch.stack(squares).sqrt() if squares else None


def norms_by_block(layers: Sequence[LoraLayer], blocks: UnetBlocks, gradients: bool) -> dict[str, Tensor]:
    """By block of the U-Net or layer of a text encoder (`unet_block4`, `textencoder1_layer0`) a norm, 0-d.

    Of the gradients over all parameters, else of what the LoRAs of the block add: the root of the sum of ||D||^2.
    """
    sums: dict[str, list[Tensor]] = {}
    squares: Sequence[Tensor | None] = [_gradient_square(layer) for layer in layers] if gradients else ()
    for layer, square in zip(layers, squares or product_norms(layers).square().unbind(), strict=True):
        if square is not None:
            sums.setdefault(block_name(layer.target, blocks), []).append(square)
    return {name: torch.stack(found).sum().sqrt() for name, found in sums.items()}


def _gradient_square(layer: LoraLayer) -> Tensor | None:
    found = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    return torch.stack([gradient.float().square().sum() for gradient in found]).sum() if found else None
