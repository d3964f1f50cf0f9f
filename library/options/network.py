"""Flags of what is trained: the network."""

from pathlib import Path

from library.options.flags import Group, honoured, refused


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
        "the module's settings; networks.lora: conv_dim, conv_alpha, rank_dropout, module_dropout; lycoris.kohya: algo "
        "and more",
        metavar="KEY=VALUE",
    )
    network_weights: Path | None = honoured(None, "weights to start from, with their alpha")
    dim_from_weights: bool = honoured(False, "take ranks and alphas from --network_weights")
    network_train_unet_only: bool = honoured(False, "train only the U-Net's part")
    network_train_text_encoder_only: bool = honoured(False, "train only the text encoders' part")
    scale_weight_norms: float | None = refused(
        None, "keep the weights' norm below this", "not supported yet; leave it out"
    )
    base_weights: tuple[str, ...] | None = refused(
        None,
        "networks merged into the model before training",
        "not supported yet; merge them into the base model first",
    )
    base_weights_multiplier: tuple[float, ...] | None = refused(
        None, "strengths of --base_weights", "not supported yet; leave it out", needs="base_weights"
    )
