"""OFT for `--network_module networks.oft`: the frozen weights' outputs are turned by trained orthogonal matrices.

It trains the U-Net only, by default its attention projections. `--network_dim` is the number of blocks, and
`--network_alpha` bounds how far they turn (1e-3 is usual; from 1 on hardly at all). The arithmetic is in
networks.oft_layers, the choice of modules in networks.oft_targets. Files have the keys `oft_unet_...oft_blocks` and
`.alpha`; LyCORIS' files of the same idea are another format.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import Problem, UserError
from library.models.families import UnetBlocks, diffusers_key, unet_blocks_of, unet_key_of
from library.models.lora_targets import LoraTarget, targets
from library.options import values
from library.options.flags import Flag
from library.options.modules import read_settings
from library.weights.files import read_tensors
from library.weights.save import save_lora
from networks import norms
from networks.attached import loaded
from networks.oft_layers import OftLayer
from networks.oft_targets import PREFIX, oft_targets, problems

NAME = "networks.oft"
_DIM = Flag("network_dim", "int", default=4, limits=(("ge", 1),), synonyms={"None": None})
_ALPHA = Flag("network_alpha", "float", default=1e-3, limits=(("gt", 0),), synonyms={"None": None})
_DROPOUT = Flag("network_dropout", "float", default=0.0, limits=(("le", 0),), synonyms={"None": None})
_LEAVES = {"oft_blocks", "alpha"}


class OftNetwork(nn.Module):
    """All turned modules of one run. Its parameters and state dict hold them once `apply_to` attached them."""

    def __init__(
        self, layers: Iterable[OftLayer], aliases: Mapping[str, str], blocks: UnetBlocks, multiplier: float = 1.0
    ) -> None:
        """`aliases`: each name that a file may have -> the name that we write."""
        super().__init__()
        self._built = tuple(layers)
        self._aliases, self._blocks = aliases, blocks
        self.set_multiplier(multiplier)

    @property
    def layers(self) -> tuple[OftLayer, ...]:
        """The attached layers."""
        return tuple(layer for layer in self._built if layer.target.name in self._modules)

    def apply_to(self, text_encoder: Any, unet: Any, train_text_encoder: bool = True, train_unet: bool = True) -> None:
        """Attach the U-Net's modules; text encoders are left as they are, whatever `train_text_encoder` says.

        Raises UserError if the U-Net isn't to be trained, ValueError if the network is attached already.
        """
        if self.layers:
            raise ValueError("the network is attached already")
        if not train_unet:
            wrong = f"{NAME} trains the U-Net only"
            raise UserError.single("--network_module", wrong, "give the U-Net a learning rate above 0")
        for layer in self._built:
            self.add_module(layer.target.name, layer)
            layer.attach()

    def remove(self) -> None:
        """Detach the network: the model computes as before."""
        for layer in self.layers:
            layer.detach()
            del self._modules[layer.target.name]

    def set_multiplier(self, multiplier: float) -> None:
        """Scale how far all modules turn; 0 gives the frozen model."""
        self.multiplier = multiplier
        for layer in self._built:
            layer.multiplier = multiplier

    def set_random_context(self, seed: int, epoch: int, index: int, positions: Sequence[int]) -> None:
        """Nothing here is drawn at random."""

    def load_weights(self, file: str | Path) -> str:
        """Take over blocks and alphas of a file for the attached modules, and say in one line what was taken.

        Raises UserError if the file is no OFT file, has another number of blocks, or nothing for these modules.
        """
        held = _modules_of(read_tensors(file), self._aliases, file)
        present = {layer.target.name: layer for layer in self.layers}
        matching = {name: tensors for name, tensors in held.items() if name in present}
        if not matching:
            raise UserError.single(str(file), "no key in it fits this network", "check the model family")
        state: dict[str, Tensor] = {}
        for name, tensors in matching.items():
            _check_shape(present[name].target, tensors, present[name].blocks, file)
            state |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
        self.load_state_dict(state, strict=False)
        return loaded(len(matching), len(present), len(held), file)

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Turn the frozen weights for good, in float32. `weights_sd` is what `create_network_from_weights` gave.

        Weights keep their dtype and device unless `dtype` or `device` is given. The network itself stays detached.
        """
        if self.layers:
            raise ValueError("an attached network can't be merged: its effect would count twice")
        held = _modules_of(weights_sd, self._aliases, "weights")
        with torch.no_grad():
            for layer in self._built:
                if tensors := held.get(layer.target.name):
                    _check_shape(layer.target, tensors, layer.blocks, "weights")
                    layer.load_state_dict(tensors)
                    weight = layer.base.weight
                    place = {"device": device or weight.device, "dtype": dtype or weight.dtype}
                    weight.data = layer.to(weight.device).weight().to(**place)

    def is_mergeable(self) -> bool:
        """A turned weight can take the frozen one's place."""
        return True

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """One parameter group, "unet", and none at rate 0; the text encoders' rate has nothing to act on."""
        rate = default_lr if unet_lr is None else unet_lr
        if not rate:
            self.remove()
            return [], []
        return [{"params": self.get_trainable_params(), "lr": rate}], ["unet"]

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: Sequence[float | None], unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """As of the method above."""
        return self.prepare_optimizer_params(None, unet_lr, default_lr)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to switch: a layer is recomputed with the block that holds it."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Let all attached blocks have gradients."""
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Training mode, as the protocol has it; layers compute the same in both."""
        self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Nothing to do at a step."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        """What the optimizer trains and gradient clipping measures."""
        return list(self.parameters())

    def norms_by_block(self, gradients: bool) -> dict[str, Tensor]:
        """Block -> norm of its gradients, or of how far its weights have come by turning at strength 1, 0-d."""
        layers = self.layers
        found = norms.gradient_norms(layers) if gradients else [layer.norms()[0] for layer in layers]
        return norms.by_block([layer.target for layer in layers], found, self._blocks)

    def mean_norms(self, gradients: bool) -> dict[str, Tensor]:
        """Means over modules by their names in the log, 0-d, at strength 1: of gradients (none before the first
        backward pass), or of how far weights have come by turning and of the turned weights."""
        layers = self.layers
        if gradients:
            return norms.gradient_mean(norms.gradient_norms(layers))
        moved, combined = zip(*(layer.norms() for layer in layers), strict=True)
        return norms.weight_means(torch.stack(moved), torch.stack(combined))

    def file_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU: blocks in `dtype` (None: as trained), alphas 0-d float32."""
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            tensors[f"{layer.target.name}.alpha"] = torch.tensor(layer.alpha_value, dtype=torch.float32)
            tensors[f"{layer.target.name}.oft_blocks"] = layer.oft_blocks.detach().to("cpu", dtype).contiguous()
        return tensors

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the file, whole or not at all; a `.safetensors` file also gets `metadata` and the two sshs hashes."""
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
) -> OftNetwork:
    """A network for the U-Net's target modules, not attached yet. `text_encoder` is left alone.

    `network_dim`: blocks per module, 4 by default. `network_alpha`: 1e-3 by default. `kwargs`: `enable_all_linear` and
    `enable_conv` (text allowed). Raises UserError for unknown names, bad values, and blocks that don't divide a module.
    """
    settings = _settings(kwargs, network_dim, network_alpha, neuron_dropout)
    dim, alpha = int(settings["network_dim"]), float(settings["network_alpha"])
    found, aliases = _unet_targets(unet)
    every, conv = bool(settings["enable_all_linear"]), bool(settings["enable_conv"])
    chosen = list(oft_targets(found, every_linear=every, conv=conv))
    if bad := problems(chosen, dim):
        raise UserError(bad)
    layers = [OftLayer(target, unet.get_submodule(target.path), dim, alpha) for target in chosen]
    return OftNetwork(layers, aliases, unet_blocks_of(unet.config), multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[OftNetwork, Mapping[str, Tensor]]:
    """A network with the modules, blocks and alphas of an OFT file, and the file's tensors; they aren't loaded yet.

    Raises UserError if the file is no OFT file or holds what this base model has no place for.
    """
    _settings(kwargs, None, None, kwargs.get("dropout"))
    if weights_sd is None:
        if file is None:
            raise ValueError("neither a file nor its tensors were given")
        weights_sd = read_tensors(file)
    source = str(file or "weights")
    found, aliases = _unet_targets(unet)
    held = _modules_of(weights_sd, aliases, source)
    layers = []
    for target in oft_targets(found, every_linear=True, conv=True):
        if tensors := held.pop(target.name, None):
            blocks = int(tensors["oft_blocks"].shape[0])
            _check_shape(target, tensors, blocks, source)
            layers.append(OftLayer(target, unet.get_submodule(target.path), blocks, float(tensors["alpha"])))
    if held:
        wrong = f"{len(held)} of its modules are not in this base model, e.g. {next(iter(held))}"
        raise UserError.single(source, wrong, "use an OFT file of the same model family")
    for layer in layers:
        layer.requires_grad_(not for_inference)
    return OftNetwork(layers, aliases, unet_blocks_of(unet.config), multiplier), weights_sd


def _settings(given: Mapping[str, Any], dim: object, alpha: object, dropout: object) -> dict[str, Any]:
    """Every setting as a value. Raises UserError with all problems."""
    named = {name: value for name, value in given.items() if name not in ("seed", "dropout")}
    read = read_settings(NAME, named, lambda name: f"--network_args {name}")
    found = {"enable_all_linear": False, "enable_conv": False, **read.values}
    wrong = list(read.problems)
    for flag, raw in ((_DIM, dim), (_ALPHA, alpha), (_DROPOUT, dropout)):
        try:
            value = values.read(flag, raw)
            found[flag.name] = flag.default if value is values.UNSET else value
        except ValueError as error:
            advice = "leave it out: OFT has no dropout" if flag is _DROPOUT else ""
            wrong.append(Problem(flag.option, str(error), advice))
    if wrong:
        raise UserError(wrong)
    return found


def _unet_targets(unet: Any) -> tuple[tuple[LoraTarget, ...], dict[str, str]]:
    """Every LoRA target of a U-Net, and what files may call its OFT."""
    key = unet_key_of(unet.config)
    found = targets(unet.config, [], conv=True, unet_key=key)
    aliases = {}
    for target in oft_targets(found, every_linear=True, conv=True):
        aliases[target.name] = target.name
        aliases[PREFIX + diffusers_key(target.path)] = target.name
    return found, aliases


def _modules_of(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str], source: str | Path
) -> dict[str, dict[str, Tensor]]:
    """The modules of a file by our names, each with `oft_blocks` and `alpha`.

    Raises UserError if a key is none of OFT's, or a module lacks one of the two.
    """
    held: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.partition(".")
        if not name.startswith(PREFIX) or leaf not in _LEAVES:
            lycoris = name.startswith("lora_") and leaf.startswith("oft_")
            wrong = "is an OFT of LyCORIS" if lycoris else f"{key} is no key of an OFT file"
            raise UserError.single(
                str(source), wrong, "use --network_module lycoris.kohya" if lycoris else f"give a file of {NAME}"
            )
        held.setdefault(aliases.get(name, name), {})[leaf] = tensor
    for name, found in held.items():
        if missing := _LEAVES - found.keys():
            raise UserError.single(str(source), f"{name} lacks {missing.pop()}", "the file is incomplete")
    return held


def _check_shape(target: LoraTarget, tensors: Mapping[str, Tensor], blocks: int, source: str | Path) -> None:
    """Raises UserError if a module's blocks aren't `blocks` squares that make up its outputs."""
    shape = tuple(tensors["oft_blocks"].shape)
    if len(shape) != 3 or shape[0] != blocks:
        count = shape[0] if shape else 0
        wrong = f"{target.name} has {count} blocks, the network {blocks}"
        raise UserError.single(str(source), wrong, "use --dim_from_weights, or the file's number of blocks")
    if shape[1] != shape[2] or shape[0] * shape[1] != target.out_features:
        wrong = f"{target.name} has blocks of shape {shape}, which don't make up {target.out_features} outputs"
        raise UserError.single(str(source), wrong, "use a file of the same model family")
