"""Which part of the model learns how fast, as the flags say. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from library.options import Options
from library.options.module_args import UNET_ONLY


@dataclass(frozen=True)
class LearningRates:
    """Rates of the network's part in the U-Net and in each text encoder, and of the vectors of new tokens. What has the
    rate 0 is not trained: neither attached nor saved."""

    unet: float
    text_encoders: tuple[float, ...]
    embeddings: float = 0.0

    @property
    def trained(self) -> tuple[Literal["unet", "text_encoder"], ...]:
        """The parts of the model that a network is trained on."""
        parts: list[Literal["unet", "text_encoder"]] = []
        if self.unet:
            parts.append("unet")
        if any(self.text_encoders):
            parts.append("text_encoder")
        return tuple(parts)


def learning_rates(options: Options, encoders: int) -> LearningRates:
    """The rates that the flags give; one rate for text encoders counts for each of them."""
    optimizer, network = options.optimizer, options.network
    own = options.embeddings.embedding_lr
    embeddings = (optimizer.learning_rate if own is None else own) if options.embeddings.token_string else 0.0
    if network.network_module is None:
        return LearningRates(0.0, (0.0,) * encoders, embeddings)
    unet = optimizer.learning_rate if optimizer.unet_lr is None else optimizer.unet_lr
    given = optimizer.text_encoder_lr or (optimizer.learning_rate,)
    text = given if len(given) == encoders else given[:1] * encoders
    no_text = (
        network.network_train_unet_only
        or network.network_module in UNET_ONLY
        or options.training.stop_text_encoder_training == -1
    )
    return LearningRates(
        0.0 if network.network_train_text_encoder_only else unet,
        (0.0,) * encoders if no_text else tuple(text),
        embeddings,
    )


def text_encoder_steps(options: Options, total: int) -> int | None:
    """After how many of `total` updates the text encoders are frozen; None for never."""
    stop = options.training.stop_text_encoder_training
    if stop in (0, -1):
        return None
    return max(1, round(stop * total)) if isinstance(stop, float) else int(stop)
