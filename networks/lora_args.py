"""`--network_dim`, `--network_alpha` and `--network_args` as one record, whoever calls: a trainer or another program.

The names are those of library.options.modules, where a dry run checks them. What a block of the U-Net gets is worked
out in networks.blocks, where the base model is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import Problem, UserError
from library.options import values
from library.options.block_lists import BlockWeights
from library.options.flags import Flag
from library.options.modules import read_settings

_DEFAULT_DIM = 4
_NONE: Mapping[str, None] = {"None": None}
_DIM = Flag("network_dim", "int", limits=(("ge", 1),), synonyms=_NONE)
_ALPHA = Flag("network_alpha", "float", limits=(("ge", 0),), synonyms=_NONE)
_DROPOUT = Flag("network_dropout", "float", limits=(("ge", 0), ("lt", 1)), synonyms=_NONE)
_SEED = Flag("seed", "int", synonyms=_NONE)
_SHAPES = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


@dataclass(frozen=True)
class LoraArgs:
    """The shape, the dropouts and the learning-rate ratios of a LoRA.

    Attributes:
        conv_dim: None is LoRA-LierLa, a number LoRA-C3Lier.
        block_dims, block_alphas, conv_block_dims, conv_block_alphas: an entry for each block of the U-Net.
        down_lr_weight, mid_lr_weight, up_lr_weight: what the U-Net's learning rate is multiplied by.
        block_lr_zero_threshold: weights up to it count as 0.
        loraplus_unet, loraplus_text_encoder: what the learning rate of up-factors is multiplied by (LoRA+).
        dora: magnitudes are trained beside directions (DoRA).
    """

    dim: int
    alpha: float
    conv_dim: int | None = None
    conv_alpha: float = 1.0
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    seed: int = 0
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    down_lr_weight: BlockWeights | None = None
    mid_lr_weight: BlockWeights | None = None
    up_lr_weight: BlockWeights | None = None
    block_lr_zero_threshold: float = 0.0
    loraplus_unet: float | None = None
    loraplus_text_encoder: float | None = None
    dora: bool = False


def parse(
    dim: object,
    alpha: object,
    network_args: Mapping[str, Any],
    *,
    neuron_dropout: object = None,
    from_file: bool = False,
    module: str = "networks.lora",
) -> LoraArgs:
    """`--network_dim`, `--network_alpha`, `--network_dropout` and `--network_args` as one record.

    Values may be text. No dim means 4; no alpha, or 0, means the rank, as does a `conv_alpha` of 0, whose default is 1.
    `conv_dim` 0 or "None" means none. `from_file`: ranks and alphas come from a weight file and may not be given.
    `module` is whose settings these are; what it doesn't have keeps its default.
    Raises UserError with every problem: names that are unknown, and values that can't be read or are out of range.
    """
    given = {name: value for name, value in network_args.items() if name != "seed"}
    settings = read_settings(module, given, lambda name: f"--network_args {name}")
    found, problems = settings.values, settings.problems
    for name in _SHAPES if from_file else ():
        if name in found:
            wrong = "can't be combined with --dim_from_weights"
            problems.append(Problem(f"--network_args {name}", wrong, "the weight file decides ranks and alphas"))

    def number(flag: Flag, raw: object, default: float) -> float:
        try:
            value = values.read(flag, raw)
        except ValueError as error:
            problems.append(Problem(flag.option, str(error)))
            return default
        return default if value is values.UNSET else float(value)

    rank = int(number(_DIM, dim, _DEFAULT_DIM))
    plain_alpha = number(_ALPHA, alpha, 0.0)
    dropout = number(_DROPOUT, neuron_dropout, found.get("dropout", 0.0))
    seed = int(number(_SEED, network_args.get("seed"), 0))
    if problems:
        raise UserError(problems)
    conv_dim = found.get("conv_dim") or None
    ratio = found.get("loraplus_lr_ratio")
    return LoraArgs(
        dim=rank,
        alpha=plain_alpha or float(rank),
        conv_dim=conv_dim,
        conv_alpha=found.get("conv_alpha", 1.0) or float(conv_dim or 0),
        dropout=dropout,
        rank_dropout=found.get("rank_dropout", 0.0),
        module_dropout=found.get("module_dropout", 0.0),
        seed=seed,
        block_dims=found.get("block_dims"),
        block_alphas=found.get("block_alphas"),
        conv_block_dims=found.get("conv_block_dims"),
        conv_block_alphas=found.get("conv_block_alphas"),
        down_lr_weight=found.get("down_lr_weight"),
        mid_lr_weight=found.get("mid_lr_weight"),
        up_lr_weight=found.get("up_lr_weight"),
        block_lr_zero_threshold=found.get("block_lr_zero_threshold", 0.0),
        loraplus_unet=found.get("loraplus_unet_lr_ratio", ratio),
        loraplus_text_encoder=found.get("loraplus_text_encoder_lr_ratio", ratio),
        dora=found.get("dora", False) or found.get("dora_wd", False),
    )
