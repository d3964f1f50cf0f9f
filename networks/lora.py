"""LoRA-LierLa and LoRA-C3Lier for `--network_module networks.lora`: building, attaching, loading and saving.

It follows the protocol that network modules of other projects follow, so that a trainer handles all alike. Key names
come from library.models.lora_targets; the arithmetic is in networks.lora_math and networks.lora_layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.families import unet_key_of
from library.models.lora_targets import LoraTarget, ranked, targets
from library.weights.save import save_lora
from networks.lora_args import parse
from networks.lora_file import FileModule, fit
from networks.lora_keys import Spellings, modules_of, read_lora, spellings
from networks.lora_layers import LoraLayer, RandomContext


class LoraNetwork(nn.Module):
    """All LoRAs of one run. Its parameters and state dict hold only the parts that `apply_to` attached."""

    def __init__(
        self, layers: Iterable[LoraLayer], context: RandomContext, known: Spellings, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self._built = tuple(layers)
        self._context = context
        self._known = known
        self.set_multiplier(multiplier)

    @property
    def layers(self) -> tuple[LoraLayer, ...]:
        """The attached layers."""
        return tuple(layer for layer in self._built if layer.target.name in self._modules)

    def apply_to(self, text_encoder: Any, unet: Any, train_text_encoder: bool = True, train_unet: bool = True) -> None:
        """Attach the parts to be trained. A part whose flag is False is neither attached nor saved, and let go.

        The modules were found when the network was made, so `text_encoder` and `unet` are only named by the protocol.
        Raises UserError if nothing is left to train, ValueError if the network is attached already.
        """
        if self.layers:
            raise ValueError("the network is attached already")
        wanted = {"text_encoder": train_text_encoder, "unet": train_unet}
        self._built = tuple(layer for layer in self._built if wanted[layer.target.part])
        for layer in self._built:
            self.add_module(layer.target.name, layer)
            layer.attach()
        if not self.layers:
            raise UserError.single("network", "no module of the parts to be trained is in it", "train another part")

    def remove(self, owner: str | None = None) -> None:
        """Detach the network, or what it has on one model: that computes as before and is no longer saved.

        `owner`: "unet", or as the optimizer's groups are named "textencoder", "textencoder1" or "textencoder2".
        """
        for layer in self.layers:
            if owner is None or _owner(layer.target) == owner:
                layer.detach()
                del self._modules[layer.target.name]

    def set_multiplier(self, multiplier: float) -> None:
        """Scale what all LoRAs add; 0 gives the frozen model."""
        self.multiplier = multiplier
        for layer in self._built:
            layer.multiplier = multiplier

    def set_random_context(self, seed: int, epoch: int, index: int, positions: Sequence[int]) -> None:
        """Say where the next forward stands: global micro-batch `index` of `epoch`, and the samples' places in it.

        Dropout masks are functions of these numbers and the module's name, so that neither the split over processes
        nor a second forward under gradient checkpointing changes them. Needed before each micro-step with dropout.
        """
        context = self._context
        context.seed, context.epoch, context.index, context.positions = seed, epoch, index, tuple(positions)

    def load_weights(self, file: str | Path) -> str:
        """Take over weights and alphas of a file for the attached modules, and say in one line what was taken.

        The file's alpha counts, also for the scale. Raises UserError if the file holds something that isn't a LoRA
        of this base model, another rank, or nothing for the attached modules.
        """
        return self._load(file, modules_of(read_lora(file), self._known, file))

    def _load(self, file: str | Path, modules: Mapping[str, FileModule]) -> str:
        present = {layer.target.name for layer in self.layers}
        matching = {name: module for name, module in modules.items() if name in present}
        if not matching:
            raise UserError.single(
                str(file), "no key in it fits this network", "check the model family and the parts that are trained"
            )
        state: dict[str, Tensor] = {}
        for layer in self.layers:
            if module := matching.get(layer.target.name):
                down, up = fit(module, layer.target, layer.rank, file)
                state[f"{layer.target.name}.lora_down.weight"] = down
                state[f"{layer.target.name}.lora_up.weight"] = up
                state[f"{layer.target.name}.alpha"] = torch.tensor(module.alpha)
        self.load_state_dict(state, strict=False)
        left_out = len(modules) - len(matching)
        return f"{len(matching)} of {len(present)} modules loaded from {file}" + (
            f", {left_out} of its modules are not in this network" if left_out else ""
        )

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add a file's LoRA to the frozen weights for good: W += multiplier * alpha/rank * up @ down, in float32.

        `weights_sd` is what `create_network_from_weights` gave. Weights keep their dtype and device unless `dtype` or
        `device` is given. The network itself stays detached.
        """
        if self.layers:
            raise ValueError("an attached network can't be merged: its effect would count twice")
        modules = modules_of(weights_sd, self._known, "weights")
        with torch.no_grad():
            for layer in self._built:
                if module := modules.get(layer.target.name):
                    down, up = fit(module, layer.target, layer.rank, "weights")
                    layer.load_state_dict(
                        {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(module.alpha)}
                    )
                    weight = layer.base.weight
                    merged = weight.float() + layer.delta().to(weight.device)
                    weight.data = merged.to(device=device or weight.device, dtype=dtype or weight.dtype)

    def is_mergeable(self) -> bool:
        """A LoRA can be added to the weights."""
        return True

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups as of the method below, with one rate for all text encoders."""
        return self.prepare_optimizer_params_with_multiple_te_lrs([text_encoder_lr], unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: Sequence[float | None], unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups {"params", "lr"} and their names: text encoders first, then the U-Net.

        One rate counts for all text encoders, none and None mean `default_lr`. What has rate 0 is detached: it is
        neither trained nor saved. Raises UserError if there are more rates than text encoders.
        """
        encoders = self._known.text_encoders
        rates = list(text_encoder_lrs) or [None]
        if len(rates) == 1:
            rates *= encoders
        if encoders and len(rates) != encoders:
            raise UserError.single(
                "--text_encoder_lr", f"{len(rates)} rates, {encoders} text encoders", "give one rate, or one for each"
            )
        members: dict[str, list[LoraLayer]] = {}
        for layer in self.layers:
            members.setdefault(_owner(layer.target), []).append(layer)
        groups, descriptions = [], []
        for owner, layers in sorted(members.items()):
            target = layers[0].target
            rate = unet_lr if target.part == "unet" else rates[target.encoder]
            rate = default_lr if rate is None else rate
            if rate:
                groups.append({"params": [p for layer in layers for p in layer.parameters()], "lr": rate})
                descriptions.append(owner)
            else:
                self.remove(owner)
                self._built = tuple(layer for layer in self._built if _owner(layer.target) != owner)
        return groups, descriptions

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to switch: a layer is recomputed with the block that holds it, with the same dropout masks."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Let all attached factors have gradients."""
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Training mode: dropouts are active."""
        self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Nothing to do at a step."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        """What the optimizer trains and gradient clipping measures."""
        return list(self.parameters())

    def weight_norms(self) -> dict[str, float]:
        """Frobenius norm of each attached LoRA's product, from rank-sized Gram matrices: ||UD||^2 = <U^T U, D D^T>."""
        norms: dict[str, float] = {}
        for layer in self.layers:
            down = layer.lora_down.weight.detach().flatten(1).float()
            up = layer.lora_up.weight.detach().flatten(1).float()
            squared = ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0)
            norms[layer.target.name] = float(squared.sqrt()) * abs(layer.scale)
        return norms

    def file_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU: factors in `dtype` (None: as trained), alphas 0-d float32."""
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            name = layer.target.name
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha_value, dtype=torch.float32)
            tensors[f"{name}.lora_down.weight"] = layer.lora_down.weight.detach().to("cpu", dtype).contiguous()
            tensors[f"{name}.lora_up.weight"] = layer.lora_up.weight.detach().to("cpu", dtype).contiguous()
        return tensors

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the attached parts; a `.safetensors` file also gets `metadata` and the two sshs hashes.

        The file replaces an older one only after it was read back and found whole (library.weights.check).
        """
        save_lora(self.file_tensors(dtype), Path(file), metadata or {})


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> LoraNetwork:
    """A network for every target module of the base model, not attached yet.

    `text_encoder`: a CLIP text model, a list of them, or None. `kwargs`: the names of networks.lora_args (text allowed)
    and `seed`, from which each module's first weights follow. Raises UserError for unknown names and bad values.
    """
    args = parse(network_dim, network_alpha, kwargs, neuron_dropout=neuron_dropout)
    context = RandomContext()
    layers = []
    modules, known = _modules(text_encoder, unet)
    for target, rank in ranked(modules, args.dim, args.conv_dim):
        alpha = args.conv_alpha if target.kernel == "3x3" else args.alpha
        layers.append(LoraLayer(target, modules[target], rank, alpha, args, context))
    return LoraNetwork(layers, context, known, multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LoraNetwork, Mapping[str, Tensor]]:
    """A network with the modules, ranks and alphas of a weight file, and the file's tensors under kohya's names.

    Modules that the file lacks are not created. As the protocol has it, the weights are not in the network yet:
    `load_weights` follows `apply_to`. Raises UserError if the file holds what this base model has no place for.
    """
    if weights_sd is None:
        if file is None:
            raise ValueError("neither a file nor its tensors were given")
        weights_sd = read_lora(file)
    args = parse(None, None, kwargs, neuron_dropout=kwargs.get("dropout"), from_file=True)
    source = str(file or "weights")
    bases, known = _modules(text_encoder, unet)
    modules = modules_of(weights_sd, known, source)
    context = RandomContext()
    layers = []
    for target, base in bases.items():
        if module := modules.pop(target.name, None):
            rank = module.down.shape[0]
            fit(module, target, rank, source)
            layers.append(LoraLayer(target, base, rank, module.alpha, args, context))
    if modules:
        raise UserError.single(
            source,
            f"{len(modules)} of its modules are not in this base model, e.g. {next(iter(modules))}",
            "use a LoRA of the same model family",
        )
    if for_inference:
        for layer in layers:
            layer.requires_grad_(False)
    return LoraNetwork(layers, context, known, multiplier), weights_sd


def _owner(target: LoraTarget) -> str:
    """The model that a target belongs to, as the optimizer's groups are named."""
    return "unet" if target.part == "unet" else "textencoder" + target.name.split("_")[1].removeprefix("te")


def _modules(text_encoder: Any, unet: Any) -> tuple[dict[LoraTarget, nn.Module], Spellings]:
    """Each target of these models with its module, in order, and what files call them.

    Either transformers layout of a text model will do.
    """
    encoders = list(text_encoder) if isinstance(text_encoder, list | tuple) else [text_encoder]
    inner = [getattr(encoder, "text_model", encoder) for encoder in encoders if encoder is not None]
    config = None if unet is None else unet.config
    key = unet_key_of(config or {})
    found = targets(config, [encoder.config.to_dict() for encoder in inner], conv=True, unet_key=key)
    roots = {target: unet if target.part == "unet" else inner[target.encoder] for target in found}
    return {target: roots[target].get_submodule(target.path) for target in found}, spellings(found, config)
