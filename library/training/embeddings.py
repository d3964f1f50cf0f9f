"""Vectors of new tokens as something that the loop trains: one parameter group, their norms, and freezing them.

With a network beside them they are a part of training.pivotal's. Their values at the start: training.embedding_vectors.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.model import Model
from library.training.coordinates import Coordinates
from library.training.embedding_plan import EmbeddingPlan
from library.training.embedding_vectors import JoinedVectors, hold_norms, norm_bounds
from library.training.expected import EMBEDDING


class EmbeddingTrainable:
    """The vectors of new tokens, joined to frozen text encoders. They have no strength, and nothing in them is random.

    Attributes:
        groups, descriptions: the one group of all vectors, of all text encoders.
        trains_text_encoder: captions' conditioning has gradients: until the vectors are frozen.
    """

    def __init__(self, model: Model, plan: EmbeddingPlan, vectors: JoinedVectors) -> None:
        """`vectors` are those that `make_vectors` made of this plan for this model."""
        self._vectors = vectors
        self._parameters: dict[str, nn.Parameter] = {}
        self._bounds: dict[str, tuple[float, float]] = {}
        for place, encoder in enumerate(model.family.text_encoders):
            bounds = None if plan.norm == "off" else norm_bounds(model.embedding_table(place), plan.norm)
            for token, parameter in vectors.trained(place).items():
                name = f"{EMBEDDING}.{encoder.part}.{token}"
                self._parameters[name] = parameter
                if bounds is not None:
                    self._bounds[name] = bounds
        self.groups: list[dict[str, Any]] = [{"params": self.parameters(), "lr": plan.rate}]
        self.descriptions = [EMBEDDING]
        self._trains, self._is_training = True, True

    @property
    def trains_text_encoder(self) -> bool:
        return self._trains

    @property
    def frozen_groups(self) -> frozenset[str]:
        """The descriptions of groups that are trained no more."""
        return frozenset() if self._trains else frozenset(self.descriptions)

    @property
    def multiplier(self) -> float:
        """Always 1."""
        return 1.0

    @property
    def is_training(self) -> bool:
        """What `train` was told last."""
        return self._is_training

    def parameters(self) -> list[nn.Parameter]:
        """Every trained tensor (n, d): of the first text encoder for each token, then of the second."""
        return list(self._parameters.values())

    def vectors_of(self, token: str) -> tuple[Tensor, ...]:
        """A token's vectors (n, d) float32 for each text encoder, on the device: the tensors themselves, detached.

        Raises:
            KeyError: there is no such token, neither a trained nor a frozen one.
        """
        return tuple(tensor.detach() for tensor in self._vectors.of(token))

    def before_epoch(self) -> None:
        """Epochs make no difference here."""

    def before_micro_step(self, at: Coordinates) -> None:
        """Nothing is drawn here."""

    def after_update(self) -> None:
        """Keep the norms as the plan's rule says, while the vectors are trained."""
        if self._trains:
            self.hold_norms()

    @torch.no_grad()
    def hold_norms(self) -> None:
        """Scale vectors, as they are now, whose norms the plan's rule doesn't leave as they are."""
        for name, bounds in self._bounds.items():
            hold_norms(self._parameters[name], bounds)

    def train(self, mode: bool) -> None:
        self._is_training = mode

    def set_multiplier(self, multiplier: float) -> None:
        """Vectors act wholly, always.

        Raises:
            UserError: another strength than 1 is asked for.
        """
        if multiplier != 1.0:
            wrong = "embeddings have no strength that could be changed"
            advice = "leave out network_multiplier and diff_output_preservation in the dataset file"
            raise UserError.single("--token_string", wrong, advice)

    def freeze_text_encoders(self) -> None:
        """They have nothing that is trained but the vectors, which `freeze_embeddings` is for."""

    def freeze_embeddings(self) -> None:
        """From now on the vectors stay bit for bit as they are: they have no gradients, so that optimizers pass them
        over, and no rule acts on them."""
        self._trains = False
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def block_norms(self, kind: Literal["gradient", "weight"]) -> dict[str, Tensor]:
        """The norm of everything together and the mean of single vectors' norms, or of their gradients', 0-d and on the
        device, by their names in the log; empty where there are no gradients."""
        norms = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in self._shown(kind)] or [torch.empty(0)])
        if not len(norms):
            return {}
        mean = "norm/avg_embedding_grad_norm" if kind == "gradient" else "norm/avg_embedding_norm"
        return {f"norm/{kind}/{EMBEDDING}": torch.linalg.vector_norm(norms), mean: norms.mean()}

    def _shown(self, kind: Literal["gradient", "weight"]) -> Iterator[Tensor]:
        for parameter in self.parameters():
            rows = parameter.grad if kind == "gradient" else parameter.detach()
            if rows is not None:
                yield rows

    def limit_norms(self, limit: float, device: torch.device) -> dict[str, Tensor | float]:
        """Nothing: the limit is for what networks add to weights."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """The trained tensors by `embedding.<text encoder>.<token>`, as they train."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of a `state_dict`.

        Raises:
            ValueError: it has other names or shapes; nothing is changed.
        """
        if missing := sorted(self._parameters.keys() - tensors.keys()):
            raise ValueError(f"the state holds no {', '.join(missing)}")
        if surplus := sorted(tensors.keys() - self._parameters.keys()):
            raise ValueError(f"the state holds {', '.join(surplus)}, which this run doesn't train")
        for name, parameter in self._parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)} in the state, here {tuple(parameter.shape)}")
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
