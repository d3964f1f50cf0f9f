"""Flags of what is trained: the network."""

from pathlib import Path

from library.options.flags import Group, honoured


class Network(Group):
    """Network"""

    network_module: str | None = honoured(
        None, "the module that builds the network, such as networks.lora or lycoris.kohya", metavar="MODULE"
    )
    network_dim: int | None = honoured(None, "rank (default: the module's, 4 for networks.lora)", ge=1)
    network_alpha: float = honoured(1.0, "the network's output is scaled by alpha / rank; 0 means alpha = rank", ge=0)
    network_dropout: float | None = honoured(None, "how often a value between down and up is dropped", ge=0, lt=1)
    network_args: tuple[str, ...] | None = honoured(
        None,
        "the module's settings, such as conv_dim=8 for networks.lora; docs/networks.md has those of every module",
        metavar="KEY=VALUE",
    )
    network_weights: Path | None = honoured(None, "weights to start from, with their alpha")
    dim_from_weights: bool = honoured(False, "take ranks and alphas from --network_weights")
    network_train_unet_only: bool = honoured(False, "train only the U-Net's part")
    network_train_text_encoder_only: bool = honoured(False, "train only the text encoders' part")
    scale_weight_norms: float | None = honoured(
        None, "after each step, shrink what a module adds until its norm is at most this; 1 is usual", gt=0
    )
    base_weights: tuple[str, ...] | None = honoured(
        None, "networks merged into the model before training", metavar="FILE"
    )
    base_weights_multiplier: tuple[float, ...] | None = honoured(
        None, "their strengths, in the same order (default: 1.0)", metavar="NUMBER", needs="base_weights"
    )
