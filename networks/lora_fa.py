"""LoRA-FA for `--network_module networks.lora_fa`: a LoRA whose down-factors stay as they were drawn.

Half of the trained numbers and of the optimizer's state go. Only `--scale_weight_norms` changes a down-factor: it
shrinks both, as for any LoRA. Files are those of networks.lora, which also builds, loads and saves. Source: Zhang et
al., LoRA-FA (arXiv 2308.03303).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from library.models.lora_targets import LoraTarget
from library.rng import rng
from networks.lora import LoraNetwork, build, build_from_weights
from networks.lora_args import LoraArgs, parse
from networks.lora_layers import LoraLayer, RandomContext

NAME = "networks.lora_fa"


class LoraFaLayer(LoraLayer):
    """A LoRA of which only `lora_up` is trained. `lora_down` is normal with std sqrt(2 / (in features + rank))."""

    def __init__(
        self, target: LoraTarget, base: nn.Module, rank: int, alpha: float, args: LoraArgs, context: RandomContext
    ) -> None:
        super().__init__(target, base, rank, alpha, args, context)
        self.lora_down.requires_grad_(False)

    def _first_down(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        deviation = np.float32((2 / (self.target.in_features + self.rank)) ** 0.5)
        return rng(self._args.seed, "init", self.target.name).standard_normal(shape, np.float32) * deviation


class LoraFaNetwork(LoraNetwork):
    """All LoRAs of one run, with frozen down-factors."""

    layer_class = LoraFaLayer

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: Sequence[float | None], unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The groups of networks.lora with the up-factors alone."""
        groups, names = super().prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lrs, unet_lr, default_lr)
        frozen = {id(layer.lora_down.weight) for layer in self.layers}
        trained = [{**group, "params": [one for one in group["params"] if id(one) not in frozen]} for group in groups]
        return trained, names

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Let the attached up-factors have gradients."""
        for layer in self.layers:
            layer.lora_up.requires_grad_(True)

    def get_trainable_params(self) -> list[nn.Parameter]:
        """The up-factors."""
        return [parameter for layer in self.layers for parameter in layer.lora_up.parameters()]


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoraFaNetwork:
    """A network for every target module of the base model, not attached yet; arguments as networks.lora has them.

    `kwargs`: the names of library.options.module_args (text allowed) and `seed`. Raises UserError for unknown names and
    bad values.
    """
    args = parse(network_dim, network_alpha, kwargs, neuron_dropout=neuron_dropout, module=NAME)
    return build(LoraFaNetwork, args, text_encoder, unet, multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoraFaNetwork, Mapping[str, Tensor]]:
    """A network with the modules, ranks and alphas of any LoRA file, whose down-factors stay as the file has them."""
    args = parse(None, None, kwargs, neuron_dropout=kwargs.get("dropout"), from_file=True, module=NAME)
    return build_from_weights(LoraFaNetwork, args, file, text_encoder, unet, weights_sd, for_inference, multiplier)
