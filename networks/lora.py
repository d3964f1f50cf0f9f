"""LoRA-LierLa and LoRA-C3Lier for `--network_module networks.lora`: building, attaching, loading and saving.

It follows the protocol that network modules of other projects follow, so that a trainer handles all alike. Key names
come from library.models.lora_targets; the arithmetic is in networks.lora_math and networks.lora_layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.families import UnetBlocks, unet_blocks_of, unet_key_of
from library.models.lora_targets import LoraTarget, targets
from library.weights.loras.keys import Spellings, modules_of, read_lora, spellings
from library.weights.loras.modules import FileModule, fit, fit_magnitudes
from library.weights.save import save_lora
from networks import norms
from networks.attached import loaded
from networks.blocks import owner as owner_of
from networks.blocks import shaped
from networks.dora import DoraLayer
from networks.groups import optimizer_groups
from networks.lora_args import LoraArgs, parse
from networks.lora_layers import LoraLayer, RandomContext


class LoraNetwork(nn.Module):
    """All LoRAs of one run. Its parameters and state dict hold only the parts that `apply_to` attached.

    `layer_class` is what networks of the same kind put on a module instead.
    """

    layer_class: ClassVar[type[LoraLayer]] = LoraLayer

    def __init__(
        self,
        layers: Iterable[LoraLayer],
        context: RandomContext,
        known: Spellings,
        args: LoraArgs,
        blocks: UnetBlocks,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self._built = tuple(layers)
        self._context = context
        self._known = known
        self._args, self._blocks = args, blocks
        self._frozen: tuple[LoraLayer, ...] = ()
        self.set_multiplier(multiplier)

    @property
    def modules_built(self) -> tuple[str, ...]:
        """The names of all modules, attached or not."""
        return tuple(layer.target.name for layer in self._built)

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
            if owner is None or owner_of(layer.target) == owner:
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
                held = _layer_state(layer, module, file)
                state |= {f"{layer.target.name}.{leaf}": tensor for leaf, tensor in held.items()}
        self.load_state_dict(state, strict=False)
        for layer in self.layers:
            if layer.target.name in matching:
                _complete(layer, matching[layer.target.name])
        return loaded(len(matching), len(present), len(modules), file)

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add a file's LoRA to the frozen weights for good: W += multiplier * alpha/rank * up @ down, in float32.

        What a DoRA adds is in networks.dora.

        `weights_sd` is what `create_network_from_weights` gave. Weights keep their dtype and device unless `dtype` or
        `device` is given. The network itself stays detached.
        """
        if self.layers:
            raise ValueError("an attached network can't be merged: its effect would count twice")
        modules = modules_of(weights_sd, self._known, "weights")
        with torch.no_grad():
            for layer in self._built:
                if module := modules.get(layer.target.name):
                    layer.load_state_dict(_layer_state(layer, module, "weights"), strict=False)
                    _complete(layer, module)
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

        One rate counts for all text encoders, none and None mean `default_lr`. Blocks with weights have groups of their
        own, and with LoRA+ so have the up-factors. A model with rate 0 is detached: neither trained nor saved; a block
        with weight 0 that a weight file brought stays as it is, and is saved. Raises UserError if there are more rates
        than text encoders, or if `remove` does.
        """
        encoders = self._known.text_encoders
        rates = list(text_encoder_lrs) or [None]
        if len(rates) == 1:
            rates *= encoders
        if encoders and len(rates) != encoders:
            raise UserError.single(
                "--text_encoder_lr", f"{len(rates)} rates, {encoders} text encoders", "give one rate, or one for each"
            )

        def rate_of(target: LoraTarget) -> float | None:
            rate = unet_lr if target.part == "unet" else rates[target.encoder]
            return default_lr if rate is None else rate

        found = optimizer_groups(self.layers, rate_of, self._args, self._blocks)
        for model in found.without:
            self.remove(model)
            self._built = tuple(layer for layer in self._built if owner_of(layer.target) != model)
        self._frozen = found.frozen
        for layer in self._frozen:
            layer.requires_grad_(False)
        return found.groups, found.names

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to switch: a layer is recomputed with the block that holds it, with the same dropout masks."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Let all attached factors have gradients, but for blocks with weight 0."""
        self.requires_grad_(True)
        for layer in self._frozen:
            layer.requires_grad_(False)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Training mode: dropouts are active."""
        self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Nothing to do at a step."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        """What the optimizer trains and gradient clipping measures."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`--scale_weight_norms`: shrink each LoRA whose norm is above `max_norm` to it.

        Returns the number of those, and mean and largest norm afterwards, as 0-d tensors on the network's device: no
        value is waited for. `device` is only named by the protocol.
        """
        return norms.limit_norms(self.layers, max_norm)

    def norms_by_block(self, gradients: bool) -> dict[str, Tensor]:
        """Block -> norm of its gradients, or of what its LoRAs add at strength 1, 0-d; see networks.norms."""
        layers = self.layers
        found = norms.gradient_norms(layers) if gradients else norms.product_norms(layers).unbind()
        return norms.by_block([layer.target for layer in layers], found, self._blocks)

    def mean_norms(self, gradients: bool) -> dict[str, Tensor]:
        """Means over modules by their names in the log, 0-d, at strength 1: of gradients (none before the first
        backward pass), or of what LoRAs add and of the frozen weights with it."""
        layers = self.layers
        if gradients:
            return norms.gradient_mean(norms.gradient_norms(layers))
        return norms.weight_means(norms.product_norms(layers), norms.combined_norms(layers))

    def file_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU: parameters in `dtype` (None: as trained), alphas 0-d float32."""
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            name = layer.target.name
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha_value, dtype=torch.float32)
            for leaf, parameter in layer.named_parameters():
                tensors[f"{name}.{leaf}"] = parameter.detach().to("cpu", dtype).contiguous()
        return tensors

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the attached parts; a `.safetensors` file also gets `metadata` and the two sshs hashes.

        The file replaces an older one only after it was read back and found whole (library.weights.check).
        """
        save_lora(self.file_tensors(dtype), Path(file), metadata or {})


Network = TypeVar("Network", bound=LoraNetwork)


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
    return build(LoraNetwork, args, text_encoder, unet, multiplier)


def build(kind: type[Network], args: LoraArgs, text_encoder: Any, unet: Any, multiplier: float = 1.0) -> Network:
    """A network of `kind` for every target module, as the arguments say."""
    context, layer_class = RandomContext(), _layer_class(kind, args.dora, "--network_args")
    modules, known = _modules(text_encoder, unet)
    blocks = unet_blocks_of({} if unet is None else unet.config)
    layers = [
        layer_class(target, modules[target], rank, alpha, args, context)
        for target, rank, alpha in shaped(modules, args, blocks)
    ]
    return kind(layers, context, known, args, blocks, multiplier)


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
    args = parse(None, None, kwargs, neuron_dropout=kwargs.get("dropout"), from_file=True)
    return build_from_weights(LoraNetwork, args, file, text_encoder, unet, weights_sd, for_inference, multiplier)


def build_from_weights(
    kind: type[Network],
    args: LoraArgs,
    file: str | Path | None,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    multiplier: float = 1.0,
) -> tuple[Network, Mapping[str, Tensor]]:
    """A network of `kind` as a weight file has it, see `create_network_from_weights`.

    A module is a DoRA if the file has magnitudes for it, or if the arguments say so.
    """
    if weights_sd is None:
        if file is None:
            raise ValueError("neither a file nor its tensors were given")
        weights_sd = read_lora(file)
    source = str(file or "weights")
    bases, known = _modules(text_encoder, unet)
    modules = modules_of(weights_sd, known, source)
    context = RandomContext()
    layers = []
    for target, base in bases.items():
        if module := modules.pop(target.name, None):
            rank = module.down.shape[0]
            fit(module, target, rank, source)
            layer_class = _layer_class(kind, args.dora or module.dora_scale is not None, source)
            layers.append(layer_class(target, base, rank, module.alpha, args, context))
    if modules:
        raise UserError.single(
            source,
            f"{len(modules)} of its modules are not in this base model, e.g. {next(iter(modules))}",
            "use a LoRA of the same model family",
        )
    if for_inference:
        for layer in layers:
            layer.requires_grad_(False)
    blocks = unet_blocks_of({} if unet is None else unet.config)
    return kind(layers, context, known, args, blocks, multiplier), weights_sd


def _layer_class(kind: type[LoraNetwork], dora: bool, source: str) -> type[LoraLayer]:
    if dora and kind.layer_class is not LoraLayer:
        wrong = f"it is a DoRA, which {kind.__module__} can't train"
        raise UserError.single(source, wrong, "use --network_module networks.lora")
    return DoraLayer if dora else kind.layer_class


def _layer_state(layer: LoraLayer, module: FileModule, source: str | Path) -> dict[str, Tensor]:
    """A file's tensors for one layer, by leaf. Raises UserError if they don't fit."""
    down, up = fit(module, layer.target, layer.rank, source)
    state = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(module.alpha)}
    magnitudes = fit_magnitudes(module, layer.target, source)
    if magnitudes is None:
        return state
    if not isinstance(layer, DoraLayer):
        wrong = f"{layer.target.name} is a DoRA there, and here it is none"
        raise UserError.single(str(source), wrong, "add dora=true to --network_args")
    return state | {"dora_scale": magnitudes}


def _complete(layer: LoraLayer, module: FileModule) -> None:
    """A DoRA that took over a plain LoRA goes on from exactly that."""
    if isinstance(layer, DoraLayer) and module.dora_scale is None:
        layer.match_magnitudes()


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
