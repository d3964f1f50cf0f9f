"""What a network module will train, told before a model is loaded: modules, ranks, shapes and groups of parameters.

For our own modules only; how many parameters another one has is known when it is made. Imports no torch.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models.families import UnetBlocks
from library.models.info import ModelInfo
from library.models.lora_targets import LoraTarget, Shape, targets
from library.options.modules import read_settings
from library.weights.loras.header import header_modules
from library.weights.loras.modules import magnitude_shape
from networks.blocks import block_index, block_weights, owner, shaped
from networks.lora_args import LoraArgs, parse
from networks.oft_targets import oft_targets

_OFT_ALPHA = 1e-3


@dataclass(frozen=True)
class Planned:
    """One module that will be trained: `shapes` are those of its trained tensors, alphas and frozen factors not among
    them, `faster` of those that LoRA+ trains faster.

    `rank` of an OFT module is its number of blocks.
    """

    target: LoraTarget
    rank: int
    alpha: float
    shapes: tuple[Shape, ...]
    faster: tuple[Shape, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(map(prod, (*self.shapes, *self.faster)))


@dataclass(frozen=True)
class PlannedGroup:
    """A parameter group, with the name and the learning rate that the module will give it."""

    name: str
    rate: float
    shapes: tuple[Shape, ...]


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
    if module is None or module not in _SHAPES:
        return None
    args = parse(dim, alpha, network_args, module=module)
    found = [target for target in all_targets(model) if target.part in parts]
    return tuple(
        Planned(target, rank, size, *_SHAPES[module](target, rank, args))
        for target, rank, size in shaped(found, args, model.family.blocks)
    )


def planned_from_file(
    module: str | None, file: Path, where: str, model: ModelInfo, parts: Collection[str]
) -> tuple[Planned, ...] | None:
    """The same for `--dim_from_weights`, whose ranks are those of a file's header; alphas aren't in it and read as 1.

    Raises:
        UserError: the file can't be read.
    """
    if module not in _SHAPES:
        return None
    modules = header_modules(file, where, model)
    rows = []
    for target in all_targets(model):
        held = modules.get(target.name)
        if held is not None and target.part in parts:
            rank = held.down.shape[0]
            args = LoraArgs(rank, 1.0, dora=held.dora_scale is not None)
            rows.append(Planned(target, rank, held.alpha, *_SHAPES[module](target, rank, args)))
    return tuple(rows)


def planned_groups(
    rows: Iterable[Planned], rate_of: Callable[[LoraTarget], float], args: LoraArgs, blocks: UnetBlocks
) -> list[PlannedGroup]:
    """The parameter groups of these modules, as networks.groups makes them: text encoders, then the U-Net, by block
    where blocks have weights; up-factors apart with LoRA+. What has the rate 0 is in none.

    `rate_of` is the rate of the model that a target belongs to.
    """
    weights = block_weights(args, blocks)
    members: dict[tuple[str, int], list[Planned]] = {}
    for row in rows:
        by_block = weights is not None and row.target.part == "unet"
        index = block_index(row.target, blocks) if by_block else -1
        members.setdefault((owner(row.target), index), []).append(row)
    groups = []
    for (model, index), mine in sorted(members.items(), key=lambda item: item[0]):
        rate = rate_of(mine[0].target) * (1.0 if weights is None or index < 0 else weights[index])
        if not rate:
            continue
        name = model if index < 0 else f"{model}_block{index}"
        ratio = args.loraplus_unet if mine[0].target.part == "unet" else args.loraplus_text_encoder
        slower = tuple(shape for row in mine for shape in row.shapes)
        faster = tuple(shape for row in mine for shape in row.faster)
        if ratio is None:
            groups.append(PlannedGroup(name, rate, slower + faster))
        else:
            groups += [PlannedGroup(name, rate, slower), PlannedGroup(f"{name} plus", rate * ratio, faster)]
    return groups


def all_targets(model: ModelInfo) -> tuple[LoraTarget, ...]:
    """Every module of a base model that a LoRA may hold."""
    return targets(model.unet_config, model.text_encoder_configs, conv=True, unet_key=model.family.unet_key)


_Tensors = tuple[tuple[Shape, ...], tuple[Shape, ...]]
"""Shapes of what is trained, those that LoRA+ trains faster apart."""


def _lora(target: LoraTarget, rank: int, args: LoraArgs) -> _Tensors:
    """Both factors, and DoRA's magnitudes."""
    down, up = target.shapes(rank)
    return (down, magnitude_shape(target)) if args.dora else (down,), (up,)


def _up_only(target: LoraTarget, rank: int, args: LoraArgs) -> _Tensors:
    return (), (target.shapes(rank)[1],)


_SHAPES: Mapping[str | None, Callable[[LoraTarget, int, LoraArgs], _Tensors]] = {
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
        side = target.out_features // blocks
        yield Planned(target, blocks, bound, ((blocks, side, side),))
