"""What the loop trains, seen as parameter groups and tensors, and one kind of it: the adapters of a network module.

The calls follow sd-scripts' protocol for `--network_module`, so third-party modules work; where a module lacks an
optional call, nothing happens.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from library.console import say
from library.errors import UserError
from library.training.coordinates import Coordinates
from library.training.learning_rates import LearningRates
from networks import foreign

TEXT = "textencoder"
"""How the descriptions of text encoders' groups begin, by the protocol."""


class Trainable(Protocol):
    """The loop's view of what is trained.

    Attributes:
        groups, descriptions: of the optimizer, and what the log calls them; `frozen_groups` are trained no more.
        trains_text_encoder: what captions become depends on what is trained now, adapters or vectors.
    """

    groups: list[dict[str, Any]]
    descriptions: list[str]

    @property
    def trains_text_encoder(self) -> bool: ...

    @property
    def frozen_groups(self) -> frozenset[str]: ...
    @property
    def multiplier(self) -> float: ...
    @property
    def is_training(self) -> bool: ...
    def parameters(self) -> list[torch.nn.Parameter]: ...
    def before_epoch(self) -> None: ...
    def before_micro_step(self, at: Coordinates) -> None: ...
    def after_update(self) -> None: ...
    def hold_norms(self) -> None: ...
    def train(self, mode: bool) -> None: ...
    def set_multiplier(self, multiplier: float) -> None: ...
    def freeze_text_encoders(self) -> None: ...
    def freeze_embeddings(self) -> None: ...
    def block_norms(self, kind: Literal["gradient", "weight"]) -> dict[str, torch.Tensor]: ...
    def limit_norms(self, limit: float, device: torch.device) -> dict[str, torch.Tensor | float]: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None: ...


class NetworkTrainable:
    """Adapters of a network module on a U-Net and text encoder."""

    def __init__(
        self,
        network: Any,
        unet: torch.nn.Module,
        text_encoder: Any,
        rates: LearningRates,
        default_rate: float,
    ) -> None:
        """Attach `network` to the parts whose learning rate is not 0.

        Raises:
            UserError: nothing is left to train.
        """
        self.network, self._unet, self._text_encoder = network, unet, text_encoder
        self._trains_text = any(rates.text_encoders)
        self._frozen: frozenset[str] = frozenset()
        self._multiplier = 1.0
        network.apply_to(text_encoder, unet, self._trains_text, rates.unet != 0)
        groups = self._parameter_groups(rates, default_rate)
        self.groups, self.descriptions = groups
        if not self.parameters():
            raise UserError.single(
                "--learning_rate", "there is nothing to train", "give --unet_lr or --text_encoder_lr a value above 0"
            )

    def _parameter_groups(self, rates: LearningRates, default: float) -> tuple[list[dict[str, Any]], list[str]]:
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if several is not None:
            return self._named(several(list(rates.text_encoders), rates.unet, default))
        if len(set(rates.text_encoders)) > 1:
            wrong = "this network module has one rate for all text encoders"
            raise UserError.single("--text_encoder_lr", wrong, "give one rate")
        prepare = self.network.prepare_optimizer_params
        takes_default = len(inspect.signature(prepare).parameters) > 2
        text_encoder = rates.text_encoders[0]
        arguments = (text_encoder, rates.unet, default) if takes_default else (text_encoder, rates.unet)
        return self._named(prepare(*arguments))

    @staticmethod
    def _named(result: Any) -> tuple[list[dict[str, Any]], list[str]]:
        """Groups, and a description of each: modules give both, or only the groups."""
        groups, descriptions = result if isinstance(result, tuple) else (result, None)
        groups = [{**group, "params": list(group["params"])} for group in groups]
        return groups, descriptions or [f"group{number}" for number in range(len(groups))]

    def parameters(self) -> list[torch.nn.Parameter]:
        """Every parameter of every group, in order."""
        return [parameter for group in self.groups for parameter in group["params"]]

    @property
    def trains_text_encoder(self) -> bool:
        """Whether adapters of text encoders are trained now."""
        return self._trains_text

    @property
    def frozen_groups(self) -> frozenset[str]:
        """Descriptions of the groups that are trained no more."""
        return self._frozen

    @property
    def multiplier(self) -> float:
        """The strength at which the network acts."""
        return self._multiplier

    @property
    def is_training(self) -> bool:
        """Whether dropouts are active."""
        return bool(self.network.training)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Adapters stand in float32, whatever the frozen parts are, unless the run keeps them in 16 bits, too."""
        self.network.to(device=device, dtype=dtype)

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def load_weights(self, path: Path) -> None:
        """Start from a file of this module (`--network_weights`); its alpha counts."""
        say(self.network.load_weights(str(path)))

    def release_text_encoder(self) -> None:
        """Forget the text encoders, which nothing of this is attached to, so that their memory can be given back."""
        self._text_encoder = None

    def prepare(self) -> None:
        self.network.prepare_grad_etc(self._text_encoder, self._unet)

    def before_epoch(self) -> None:
        self.network.on_epoch_start(self._text_encoder, self._unet)

    def before_micro_step(self, at: Coordinates) -> None:
        if hasattr(self.network, "set_random_context"):
            self.network.set_random_context(at.seed, at.epoch, at.index, at.positions)
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self._text_encoder, self._unet)

    def after_update(self) -> None:
        """A network's weights are as the optimizer left them; `limit_norms` is asked for apart."""

    def hold_norms(self) -> None:
        """There is no rule for a network's norms but that limit."""

    def train(self, mode: bool) -> None:
        self.network.train(mode)

    def set_multiplier(self, multiplier: float) -> None:
        """The strength at which the network acts from now on.

        Raises:
            UserError: the module can't change it.
        """
        if multiplier == self._multiplier:
            return
        change = getattr(self.network, "set_multiplier", None)
        if change is None:
            wrong = f"{type(self.network).__module__} can't change its strength"
            advice = "leave out network_multiplier and diff_output_preservation in the dataset file"
            raise UserError.single("--network_module", wrong, advice)
        change(multiplier)
        self._multiplier = multiplier

    def freeze_text_encoders(self) -> None:
        """From now on the text encoders' part stays as it is: it has no gradients, so that optimizers pass it over."""
        if not self._trains_text:
            return
        self._trains_text = False
        self._frozen = frozenset(name for name in self.descriptions if name.startswith(TEXT))
        for name, group in zip(self.descriptions, self.groups, strict=True):
            for parameter in group["params"] if name in self._frozen else ():
                parameter.requires_grad_(False)
                parameter.grad = None

    def freeze_embeddings(self) -> None:
        """A network has none."""

    def limit_norms(self, limit: float, device: torch.device) -> dict[str, torch.Tensor | float]:
        """Shrink what modules add until no norm is above `limit`; what was done, by its names in the log."""
        with torch.no_grad():
            done = self.network.apply_max_norm_regularization(limit, device)
        return dict(zip(("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm"), done, strict=True))

    def block_norms(self, kind: Literal["gradient", "weight"]) -> dict[str, torch.Tensor]:
        """Norms of gradients or weights for each block of the model, and their means over modules, 0-d and on the
        device, by their names in the log; empty where the module tells none."""
        if not hasattr(self.network, "norms_by_block"):
            return {}
        gradients = kind == "gradient"
        blocks = self.network.norms_by_block(gradients)
        return {f"norm/{kind}/{block}": norm for block, norm in blocks.items()} | self.network.mean_norms(gradients)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.network.state_dict()

    def file_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Names and shapes of what stands in a file; None where only the module knows."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.network.load_state_dict(dict(tensors), strict=True)

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        """Write one `.safetensors`; the module adds its hashes to a copy of `metadata`."""
        self.network.save_weights(str(path), dtype, dict(metadata))


class ForeignTrainable(NetworkTrainable):
    """A network of a module that isn't of this repository: its files need not hold its whole state."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return foreign.exact_state(self.network)

    def file_shapes(self) -> dict[str, tuple[int, ...]] | None:
        return None

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        foreign.load_exact_state(self.network, tensors)

    def load_weights(self, path: Path) -> None:
        """Start from a file of the same module.

        Raises:
            UserError: the file holds keys that this network has no place for.
        """
        said = self.network.load_weights(str(path))
        unexpected = list(said.get("unexpected keys", ())) if isinstance(said, Mapping) else []
        if unexpected:
            wrong = f"{path}: {len(unexpected)} of its keys have no place in this network, e.g. {unexpected[0]}"
            raise UserError.single("--network_weights", wrong, "give the --network_args that the file was trained with")
        say(f"weights loaded from {path}")
