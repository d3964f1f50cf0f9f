"""A network and the vectors of new tokens trained together (pivotal tuning), and how a run comes to its vectors."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.models.model import Model
from library.training.attach import checkpoint
from library.training.coordinates import Coordinates
from library.training.embedding_vectors import make_vectors
from library.training.embeddings import EmbeddingTrainable
from library.training.prepare import Prepared
from library.training.trainable import NetworkTrainable, Trainable


class PivotalTrainable:
    """Both at once: the network's groups first, then that of the vectors. The strength is the network's alone.

    Attributes:
        network, embeddings: the two, each for its own files.
    """

    def __init__(self, network: NetworkTrainable, embeddings: EmbeddingTrainable) -> None:
        self.network, self.embeddings = network, embeddings
        self.groups: list[dict[str, Any]] = [*network.groups, *embeddings.groups]
        self.descriptions = [*network.descriptions, *embeddings.descriptions]

    @property
    def trains_text_encoder(self) -> bool:
        """Whether captions' conditioning has gradients now: for the network's part, or for the vectors."""
        return self.network.trains_text_encoder or self.embeddings.trains_text_encoder

    @property
    def frozen_groups(self) -> frozenset[str]:
        """The descriptions of groups that are trained no more."""
        return self.network.frozen_groups | self.embeddings.frozen_groups

    @property
    def multiplier(self) -> float:
        """The strength at which the network acts."""
        return self.network.multiplier

    @property
    def is_training(self) -> bool:
        """Whether the network's dropouts are active."""
        return self.network.is_training

    def parameters(self) -> list[nn.Parameter]:
        """The network's, then the vectors."""
        return [*self.network.parameters(), *self.embeddings.parameters()]

    def before_epoch(self) -> None:
        self.network.before_epoch()

    def before_micro_step(self, at: Coordinates) -> None:
        self.network.before_micro_step(at)
        self.embeddings.before_micro_step(at)

    def after_update(self) -> None:
        self.network.after_update()
        self.embeddings.after_update()

    def hold_norms(self) -> None:
        self.embeddings.hold_norms()

    def train(self, mode: bool) -> None:
        self.network.train(mode)
        self.embeddings.train(mode)

    def set_multiplier(self, multiplier: float) -> None:
        """The network's strength from now on; at 0 the vectors still act.

        Raises:
            UserError: the module can't change it.
        """
        self.network.set_multiplier(multiplier)

    def freeze_text_encoders(self) -> None:
        """The network's part in the text encoders stays as it is from now on; the vectors go on."""
        self.network.freeze_text_encoders()

    def freeze_embeddings(self) -> None:
        """The vectors stay as they are from now on; the network goes on."""
        self.embeddings.freeze_embeddings()

    def block_norms(self, kind: Literal["gradient", "weight"]) -> dict[str, Tensor]:
        """Both ones' norms by their names in the log, 0-d, on the device."""
        return self.network.block_norms(kind) | self.embeddings.block_norms(kind)

    def limit_norms(self, limit: float, device: torch.device) -> dict[str, Tensor | float]:
        """Shrink what the network's modules add; what was done, by its names in the log."""
        return self.network.limit_norms(limit, device)

    def state_dict(self) -> dict[str, Tensor]:
        return self.network.state_dict() | self.embeddings.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of a `state_dict`: of the vectors, by their names, and of the network, which gets the rest.

        Raises:
            ValueError: vectors are missing, or of other shapes.
        """
        own = self.embeddings.state_dict().keys()
        self.embeddings.load_state_dict({name: tensors[name] for name in own & tensors.keys()})
        self.network.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in own})


def attach_embeddings(
    prepared: Prepared, model: Model, device: torch.device, network: NetworkTrainable | None
) -> Trainable:
    """Join the run's embeddings to the model, frozen ones too. Gives what the loop trains: the network, if only it is
    trained, the vectors, or both.

    Raises:
        UserError: an embedding file can't be read or doesn't fit.
        ValueError: there is neither a network nor a token to train.
    """
    plan = prepared.embeddings
    vectors = make_vectors(plan, model, prepared.seed) if plan else None
    if plan is None or vectors is None or not plan.trains:
        if network is None:
            raise ValueError("there is neither a network nor a token to train")
        return network
    embeddings = EmbeddingTrainable(model, plan, vectors)
    if network is not None:
        return PivotalTrainable(network, embeddings)
    checkpoint(prepared, model)
    return embeddings
