"""Sizes of what networks add, by module and by block, for logs and `--scale_weight_norms`.

Those of LoRAs come from matrices as small as the rank: the product up @ down is never made. With D = scale * up @ down,
||D||^2 is the sum of (up^T up) * (down down^T), and a row's square follows from the same products. Products of
layers of one shape are made together. Nothing waits for the device: all results are tensors there.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from library.models.families import UnetBlocks
from library.models.lora_targets import LoraTarget
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
    """Shrink both factors of every layer whose ||D|| is above `limit` so that it is `limit`; frozen ones stay.

    Returns how many were, and the mean and the largest norm afterwards, each 0-d. Source: sd-scripts'
    `--scale_weight_norms`, where norms below half the limit count as that half.
    """
    with torch.no_grad():
        norms = product_norms(layers)
        counted = norms.clamp(min=limit / 2)
        ratios = counted.clamp(max=limit) / counted
        roots = ratios.sqrt()
        for layer, root in zip(layers, roots.unbind(), strict=True):
            if not layer.lora_up.weight.requires_grad:
                continue
            layer.lora_down.weight.mul_(root)
            layer.lora_up.weight.mul_(root)
        after = norms * ratios
        return (ratios != 1).sum(), after.mean(), after.max()


def gradient_norms(layers: Sequence[nn.Module]) -> list[Tensor | None]:
    """The norm of all gradients of each layer, 0-d; None for one that has none."""
    return [_gradient_norm(layer) for layer in layers]


def by_block(targets: Iterable[LoraTarget], norms: Iterable[Tensor | None], blocks: UnetBlocks) -> dict[str, Tensor]:
    """By block of the U-Net or layer of a text encoder (`unet_block4`, `textencoder1_layer0`) the root of the sum of
    the squares of its modules' norms, 0-d. `norms`: of each target; None is left out."""
    sums: dict[str, list[Tensor]] = {}
    for target, norm in zip(targets, norms, strict=True):
        if norm is not None:
            sums.setdefault(block_name(target, blocks), []).append(norm)
    return {name: torch.stack(found).square().sum().sqrt() for name, found in sums.items()}


def gradient_mean(norms: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """The mean over modules that have gradients, by its name in the log; empty if there are none."""
    found = [norm for norm in norms if norm is not None]
    return {"norm/avg_grad_norm": torch.stack(found).mean()} if found else {}


def weight_means(added: Tensor, combined: Tensor) -> dict[str, Tensor]:
    """Means over modules by their names in the log, from the norms (n,) of what each adds and of the weight with it."""
    return {"norm/avg_key_norm": added.mean(), "norm/avg_combined_norm": combined.mean()}


def _gradient_norm(layer: nn.Module) -> Tensor | None:
    found = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    return torch.stack([gradient.float().square().sum() for gradient in found]).sum().sqrt() if found else None
