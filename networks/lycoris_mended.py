"""What of LyCORIS is replaced where it is wrong on our models, once, when networks.foreign loads it. Checked with 4.1;
what a trained network computes stays LyCORIS' own.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_MENDED = "_mended_by_lorasmith"
_Forward = Callable[..., Tensor]


def mend(module: ModuleType) -> None:
    """Replace methods of the classes in `lycoris.kohya`; a second call does nothing."""
    if getattr(module, _MENDED, False):
        return
    setattr(module, _MENDED, True)
    module.DyLoraModule.get_random_rank_weight = _random_block
    module.NormModule.forward = _asking_for_gradients(module.NormModule.forward)
    for kind in (module.LoConModule, module.LohaModule, module.LokrModule):
        kind.forward = _base_at_zero(kind.forward)
    for kind in (module.LohaModule, module.LokrModule):
        kind.get_diff_weight = _difference
    module.LycorisNetworkKohya.apply_max_norm_regularization = _bounded


def _random_block(layer: Any) -> Any:
    """What a `dylora` layer uses in this forward: the ranks up to a random block, which alone has gradients; all ranks
    where nothing is trained.

    Drawn from torch's generator instead of Python's, which gradient checkpointing does not wind back.
    """
    if not layer.training:
        return layer.get_weight((layer.block_count - 1) * layer.block_size)
    return layer.get_weight(int(torch.randint(layer.block_count, ())) * layer.block_size)


def _asking_for_gradients(plain: _Forward) -> _Forward:
    """A trained norm (`train_norm`) whose input always asks for its gradient where gradients are made at all.

    torch's group_norm (2.13, on a CPU, channels last) writes that gradient also where nobody asked and has no place for
    it: the process ends with a segmentation fault. Only a model's first norm has such an input.
    """

    def forward(layer: Any, x: Tensor, *more: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled() and x.is_floating_point() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return plain(layer, x, *more, **options)

    return forward


def _base_at_zero(plain: _Forward) -> _Forward:
    """A layer that is the frozen model at strength 0; with `dora_wd` the whole change would stay, unscaled."""

    def forward(layer: Any, x: Tensor, *more: Any, **options: Any) -> Tensor:
        if layer.multiplier == 0:
            unchanged: Tensor = layer.org_forward(x, *more, **options)
            return unchanged
        return plain(layer, x, *more, **options)

    return forward


def _difference(
    layer: Any, multiplier: float = 1, shape: Any = None, device: torch.device | None = None
) -> tuple[Tensor, None]:
    """What `loha` and `lokr` add to a weight, as their forward has it: alpha / rank counts once, not twice."""
    change: Tensor = layer.get_weight(shape) * layer.scalar * multiplier
    return change if device is None else change.to(device), None


def _bounded(network: Any, limit: float, device: torch.device) -> tuple[Tensor | int, Tensor | float, Tensor | float]:
    """How many layers were shrunk, and the mean and the largest norm afterwards, also where none had to be shrunk.

    Layers that have no norm to bound don't count; three zeros where there is no other.
    """
    done = [layer.apply_max_norm(limit, device) for layer in network.unet_loras + network.text_encoder_loras]
    bounded = [(scaled, norm) for scaled, norm in done if scaled is not None]
    if not bounded:
        return 0, 0.0, 0.0
    norms = torch.stack([norm for _, norm in bounded])
    return torch.stack([scaled for scaled, _ in bounded]).sum(), norms.mean(), norms.max()
