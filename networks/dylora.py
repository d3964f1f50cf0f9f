"""DyLoRA for `--network_module networks.dylora`: one training whose file can be cut to lower ranks afterwards.

Every forward in training uses the ranks below t + unit, for a t that is drawn for each module and micro-batch, and only
ranks t up to t + unit have gradients, so that the first ranks learn to do without the later ones. Files are those of
networks.lora; tools/extract_lora_from_dylora.py cuts them. Source: Valipour et al., DyLoRA (arXiv 2210.07558), with
sd-scripts' scale. Building, loading and saving are networks.lora's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.options.modules import read_settings
from library.rng import rng
from networks.lora import LoraNetwork, build, build_from_weights
from networks.lora_args import LoraArgs, parse
from networks.lora_layers import LoraLayer

NAME = "networks.dylora"


class DyloraLayer(LoraLayer):
    """A LoRA that trains one block of `unit` ranks at a time.

    With k = t + unit ranks in use the result is base(x) + multiplier * alpha / r * sqrt(r / k) * up[:, :k] down[:k] x;
    t is a function of (seed, epoch, micro-batch, name), so that recomputation and all processes see the same. Outside
    of training all ranks count, as in any LoRA. Moments of blocks that were not drawn go on decaying in the optimizer.
    """

    unit = 1

    def _factors(self) -> tuple[Tensor, Tensor, float]:
        down, up, factor = super()._factors()
        if not self.training:
            return down, up, factor
        start = self._block()
        end = start + self.unit
        down = torch.cat([down[:start].detach(), down[start:end]])
        up = torch.cat([up[:, :start].detach(), up[:, start:end]], dim=1)
        return down, up, factor * (self.rank / end) ** 0.5

    def _block(self) -> int:
        """The first rank of this micro-batch's block. Raises RuntimeError if the trainer didn't say where it stands."""
        at = self._context
        if not at.positions:
            raise RuntimeError("networks.dylora needs set_random_context before each training step")
        draw = rng(at.seed, "dropout", at.epoch, at.index, "block", self.target.name)
        return int(draw.integers(self.rank // self.unit)) * self.unit


class DyloraNetwork(LoraNetwork):
    """All DyLoRAs of one run."""

    layer_class = DyloraLayer

    def set_unit(self, unit: int) -> None:
        """How many ranks are trained at a time. Raises UserError if a module's rank is no multiple of it."""
        for layer in self._built:
            if layer.rank % unit:
                wrong = f"unit={unit} doesn't divide rank {layer.rank} of {layer.target.name}"
                raise UserError.single("--network_args unit", wrong, "use a unit that divides the rank")
            if isinstance(layer, DyloraLayer):
                layer.unit = unit


def _parse(
    dim: object, alpha: object, given: Mapping[str, Any], dropout: object, from_file: bool = False
) -> tuple[LoraArgs, int]:
    """What networks.lora knows of the arguments, and the unit."""
    args = parse(dim, alpha, given, neuron_dropout=dropout, from_file=from_file, module=NAME)
    unit = read_settings(NAME, {"unit": given.get("unit")}, str).values.get("unit", 1)
    if args.conv_dim is not None and args.conv_dim != args.dim:
        wrong = f"{args.conv_dim} is not the rank of the other modules, {args.dim}"
        raise UserError.single("--network_args conv_dim", wrong, "DyLoRA has one rank for all modules")
    return args, unit


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> DyloraNetwork:
    """A network for every target module of the base model, not attached yet; arguments as networks.lora has them.

    `kwargs`: the names of library.options.module_args (text allowed) and `seed`. Raises UserError for unknown names,
    bad values, a `unit` that doesn't divide the rank and a `conv_dim` that isn't the rank.
    """
    args, unit = _parse(network_dim, network_alpha, kwargs, neuron_dropout)
    network = build(DyloraNetwork, args, text_encoder, unet, multiplier)
    network.set_unit(unit)
    return network


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[DyloraNetwork, Mapping[str, Tensor]]:
    """A network with the modules, ranks and alphas of any LoRA file."""
    args, unit = _parse(None, None, kwargs, kwargs.get("dropout"), from_file=True)
    network, tensors = build_from_weights(
        DyloraNetwork, args, file, text_encoder, unet, weights_sd, for_inference, multiplier
    )
    network.set_unit(unit)
    return network, tensors
