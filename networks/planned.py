"""What a network module will train, told before a model is loaded: modules, ranks and numbers of parameters.

For our own modules only; how many parameters another one has is known when it is made. Imports no torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models.info import ModelInfo
from library.models.lora_targets import LoraTarget, targets
from library.options.modules import read_settings
from networks.blocks import shaped
from networks.lora_args import LoraArgs, parse
from networks.lora_header import header_modules
from networks.oft_targets import oft_targets, parameters

_OFT_ALPHA = 1e-3


@dataclass(frozen=True)
class Planned:
    """One module that will be trained: `parameters` counts trained numbers, alphas and frozen factors not among them.

    `rank` of an OFT module is its number of blocks.
    """

    target: LoraTarget
    rank: int
    alpha: float
    parameters: int


def planned(
    module: str | None,
    dim: object,
    alpha: object,
    network_args: Mapping[str, Any],
    model: ModelInfo,
    parts: Collection[str],
) -> tuple[Planned, ...] | None:
    """Every module that `--network_module` would train; None of a foreign one.

    Args:
        parts: what is trained of the model, `unet` and `text_encoder`.
        dim, alpha: as given, None and text too.

    Raises:
        UserError: the settings can't be read, or a list for blocks doesn't fit the family.
    """
    if module == "networks.oft":
        return tuple(_oft(dim, alpha, network_args, model)) if "unet" in parts else ()
    if module is None or module not in _COUNTS:
        return None
    args = parse(dim, alpha, network_args, module=module)
    found = [target for target in all_targets(model) if target.part in parts]
    return tuple(
        Planned(target, rank, size, _COUNTS[module](target, rank, args))
        for target, rank, size in shaped(found, args, model.family.blocks)
    )


def planned_from_file(
    module: str | None, file: Path, where: str, model: ModelInfo, parts: Collection[str]
) -> tuple[Planned, ...] | None:
    """The same for `--dim_from_weights`, whose ranks are those of a file's header; alphas aren't in it and read as 1.

    Raises:
        UserError: the file can't be read.
    """
    if module not in _COUNTS:
        return None
    modules = header_modules(file, where, model)
    rows = []
    for target in all_targets(model):
        held = modules.get(target.name)
        if held is not None and target.part in parts:
            rank = held.down.shape[0]
            args = LoraArgs(rank, 1.0, dora=held.dora_scale is not None)
            rows.append(Planned(target, rank, held.alpha, _COUNTS[module](target, rank, args)))
    return tuple(rows)


def all_targets(model: ModelInfo) -> tuple[LoraTarget, ...]:
    """Every module of a base model that a LoRA may hold."""
    return targets(model.unet_config, model.text_encoder_configs, conv=True, unet_key=model.family.unet_key)


def _lora(target: LoraTarget, rank: int, args: LoraArgs) -> int:
    """Both factors, and DoRA's magnitudes."""
    return sum(prod(shape) for shape in target.shapes(rank)) + (target.out_features if args.dora else 0)


def _up_only(target: LoraTarget, rank: int, args: LoraArgs) -> int:
    return prod(target.shapes(rank)[1])


_COUNTS: Mapping[str | None, Callable[[LoraTarget, int, LoraArgs], int]] = {
    "networks.lora": _lora,
    "networks.lora_fa": _up_only,
    "networks.dylora": _lora,
}


def _oft(dim: object, alpha: object, network_args: Mapping[str, Any], model: ModelInfo) -> Iterator[Planned]:
    """OFT's modules; its bound of how far they turn is the alpha."""
    blocks = parse(dim, alpha, {}, module="networks.oft").dim
    settings = read_settings("networks.oft", network_args, lambda name: f"--network_args {name}")
    if settings.problems:
        raise UserError(settings.problems)
    every, conv = (bool(settings.values.get(name)) for name in ("enable_all_linear", "enable_conv"))
    bound = _OFT_ALPHA if alpha in (None, "", "None") else float(str(alpha))
    for target in oft_targets(all_targets(model), every_linear=every, conv=conv):
        yield Planned(target, blocks, bound, parameters(target, blocks))
