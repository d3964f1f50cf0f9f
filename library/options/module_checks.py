"""What must hold between the settings of network modules and other flags, known without a model.

Single settings are checked in options.modules; whether OFT's blocks divide the model's sizes, in networks.oft_targets.
"""

from collections.abc import Iterator
from typing import Any

from library.errors import Problem
from library.options.module_args import UNET_ONLY
from library.options.modules import LYCORIS, LYCORIS_UNBOUNDED, pairs, read_settings
from library.options.registry import Options

_DEFAULT_DIM = 4
_OFT = "networks.oft"
_DYLORA = "networks.dylora"
_OWN = "networks."


def problems(options: Options) -> Iterator[Problem]:
    """What can't be trained."""
    if options.network.network_module == _DYLORA:
        yield from _of_dylora(options)
    if options.network.network_module == _OFT:
        yield from _of_oft(options)


def notices(options: Options) -> Iterator[str]:
    """What has no effect, or hardly any, in one line each."""
    network = options.network
    foreign = network.network_module and not network.network_module.startswith(_OWN)
    if options.logging.log_norms and foreign and not options.embeddings.token_string:
        yield f"--log_norms: has no effect, {network.network_module} tells no norms of blocks or modules"
    if network.scale_weight_norms is not None and network.network_module == LYCORIS and not network.dim_from_weights:
        given, _ = pairs(network.network_args or (), "")
        if (algo := given.get("algo", "lora").lower()) in LYCORIS_UNBOUNDED:
            yield f"--scale_weight_norms: has no effect on modules of algo={algo}, whose norms LyCORIS doesn't bound"
    if network.network_module not in UNET_ONLY:
        return
    if network.network_train_unet_only:
        yield f"--network_train_unet_only: has no effect, {network.network_module} trains nothing else"
    if network.network_alpha >= 1 and not network.dim_from_weights:
        yield f"--network_alpha {network.network_alpha:g} hardly bounds how far {_OFT} turns; 1e-3 is usual"


def _of_dylora(options: Options) -> Iterator[Problem]:
    network, settings = options.network, _settings(options)
    if options.model.torch_compile:
        wrong = f"{_DYLORA} computes with other ranks at every step, each of which would be compiled anew"
        yield Problem(options.where("torch_compile"), wrong, "leave it out")
    if network.dim_from_weights:
        return
    dim, unit, conv = network.network_dim or _DEFAULT_DIM, settings.get("unit", 1), settings.get("conv_dim")
    if dim % unit:
        wrong = f"unit={unit} doesn't divide the rank {dim}"
        yield Problem(options.where("network_args"), wrong, "use a unit that divides --network_dim")
    if conv and conv != dim:
        wrong = f"conv_dim={conv} is not --network_dim, {dim}"
        yield Problem(options.where("network_args"), wrong, "DyLoRA has one rank for all modules")


def _of_oft(options: Options) -> Iterator[Problem]:
    network = options.network
    if not network.network_alpha and not network.dim_from_weights:
        wrong = "0 lets no module turn"
        yield Problem(options.where("network_alpha"), wrong, "use a small number such as 1e-3")
    if network.network_dropout:
        yield Problem(options.where("network_dropout"), f"{_OFT} has no dropout", "leave it out")
    if network.scale_weight_norms is not None:
        wrong = f"{_OFT} turns weights and adds nothing whose norm could be bounded"
        yield Problem(
            options.where("scale_weight_norms"), wrong, "leave it out: --network_alpha bounds how far it turns"
        )
    if any(options.optimizer.text_encoder_lr or ()):
        yield Problem(options.where("text_encoder_lr"), f"{_OFT} trains the U-Net only", "leave it out")
    if network.network_train_text_encoder_only:
        where = options.where("network_train_text_encoder_only")
        yield Problem(where, f"{_OFT} trains the U-Net only", "use networks.lora, or leave it out")


def _settings(options: Options) -> dict[str, Any]:
    """`--network_args` as values; what can't be read is told elsewhere."""
    found, _ = pairs(options.network.network_args or (), "")
    return read_settings(str(options.network.network_module), found, str).values
