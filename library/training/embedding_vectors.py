"""The vectors of new tokens: what they start from, and joining them to a model's text encoders.

One float32 tensor for each token and text encoder; those that train are parameters. Which tokens there are, and where
each starts from, is training.embedding_plan's; how they are trained stands in training.embeddings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.model import Model
from library.rng import rng
from library.tokenizer.vocabulary import Vocabulary
from library.training.embedding_plan import EmbeddingPlan, NormRule, PlannedToken
from library.weights.embeddings import read_embedding

_CHUNK = 4096
_CLAMP = (0.01, 0.99)
_MEDIAN = (0.5, 0.5)
_ROUNDING = 1e-6
"""Of a norm in float32, relative to it."""


@dataclass(frozen=True)
class JoinedVectors:
    """The very tensors that a model's text encoders read for new tokens.

    Attributes:
        vocabulary: the tokens; frozen ones come first.
        vectors: by text encoder, then by token: (n, d) float32 on the model's device, a parameter where it is trained.
    """

    vocabulary: Vocabulary
    vectors: tuple[tuple[Tensor, ...], ...]

    def of(self, token: str) -> tuple[Tensor, ...]:
        """One token's tensors, for each text encoder.

        Raises:
            KeyError: there is no such token.
        """
        for place, one in enumerate(self.vocabulary.tokens):
            if one.text == token:
                return tuple(tensors[place] for tensors in self.vectors)
        raise KeyError(token)

    def trained(self, encoder: int) -> dict[str, nn.Parameter]:
        """What is trained of one text encoder, by token."""
        pairs = zip(self.vocabulary.tokens, self.vectors[encoder], strict=True)
        return {token.text: tensor for token, tensor in pairs if isinstance(tensor, nn.Parameter)}


def make_vectors(plan: EmbeddingPlan, model: Model, seed: int) -> JoinedVectors:
    """The vectors that a plan asks for, joined to the model.

    Vectors that start from nothing are drawn from a normal distribution that has, in each dimension, the vocabulary's
    mean and standard deviation. They depend on the seed, the token and the text encoder alone.

    Raises:
        UserError: a file can't be read, or holds other vectors than its header told.
    """

    @cache
    def spread(encoder: int) -> tuple[Tensor, Tensor]:
        return table_spread(model.embedding_table(encoder))

    def start(planned: PlannedToken, encoder: int) -> Tensor:
        token = planned.token
        if planned.ids:
            table = model.embedding_table(encoder)
            return table[torch.tensor(planned.ids, device=table.device)]
        mean, deviation = spread(encoder)
        draws = rng(seed, "init", "embedding", token.text, encoder).standard_normal((token.vectors, len(mean)))
        return mean + deviation * torch.from_numpy(draws)

    def tensors(planned: PlannedToken) -> tuple[Tensor, ...]:
        if planned.file is not None:
            return _from_file(planned, planned.file, model.text_widths)
        return tuple(start(planned, encoder) for encoder in range(len(model.text_widths)))

    base = [_settled(tensors(one), model.device) for one in plan.base]
    trained = [[nn.Parameter(each) for each in _settled(tensors(one), model.device)] for one in plan.trained]
    joined = JoinedVectors(plan.vocabulary, tuple(zip(*base, *trained, strict=True)))
    model.join_embeddings(joined.vocabulary, joined.vectors)
    return joined


def _settled(tensors: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """Copies of their own, float32, on the device."""
    return [tensor.detach().to(device, torch.float32, copy=True).contiguous() for tensor in tensors]


def _from_file(planned: PlannedToken, file: Path, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A file's vectors for each text encoder.

    Raises:
        UserError: it can't be read, or they are not as many or as wide as was planned.
    """
    found = read_embedding(file, f"{planned.source} {file}", planned.token.text).vectors
    wanted = [(planned.token.vectors, width) for width in widths]
    shapes = [tuple(tensor.shape) for tensor in found]
    if shapes != wanted:
        wrong = f"{file} holds vectors of shape {_listed(shapes)}, but {_listed(wanted)} is what this run takes"
        raise UserError.single(planned.source, wrong, "has the file changed since the start?")
    return found


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(" x ".join(map(str, shape)) for shape in shapes)


def _chunks(table: Tensor) -> Iterator[Tensor]:
    """Rows in float64, some at a time, and on the CPU, so that a start is the same on every device."""
    for rows in table.detach().split(_CHUNK):
        yield rows.to("cpu", torch.float64)


def table_spread(table: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,) float64 of a table's rows (v, d), in each dimension; the deviation is that of
    the whole population."""
    mean = sum((rows.sum(0) for rows in _chunks(table)), torch.zeros(table.shape[1], dtype=torch.float64)) / len(table)
    squares = sum(((rows - mean).square().sum(0) for rows in _chunks(table)), torch.zeros_like(mean))
    return mean, (squares / len(table)).sqrt()


def norm_bounds(table: Tensor, rule: NormRule) -> tuple[float, float] | None:
    """The least and the largest norm that a rule leaves to a vector, from the norms of a table's rows (v, d): their 1st
    and 99th percentile, or twice their median; None without a rule. Between two rows' norms it is interpolated."""
    if rule == "off":
        return None
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in _chunks(table)])
    shares = torch.tensor(_MEDIAN if rule == "median" else _CLAMP, dtype=torch.float64)
    low, high = torch.quantile(norms, shares).tolist()
    return low, high


def hold_norms(vectors: Tensor, bounds: tuple[float, float]) -> None:
    """Scale each of `vectors` (n, d) whose norm is outside of `bounds` to the nearer one, in place; others keep their
    bits, and so does one that is off by no more than what rounding makes, so that it is scaled once. One that is zero
    has no direction and stays."""
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    wanted = norms.clamp(*bounds)
    stays = ((norms - wanted).abs() <= _ROUNDING * wanted) | (norms == 0)
    vectors.mul_(torch.where(stays, 1.0, wanted / norms))
