"""Tiny real models with new tokens joined to them, for the tests of embeddings and of pivotal tuning."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model
from library.models.prompts import inner
from library.tokenizer import VOCABULARY_SIZE
from library.tokenizer.vocabulary import NewToken
from library.training.embedding_plan import EmbeddingPlan, NormRule, PlannedToken
from library.training.embedding_vectors import JoinedVectors, make_vectors
from library.training.embeddings import EmbeddingTrainable

SEED = 3
CAPTIONS = ("a photo of mycat on a hill", "the hat of mycat, blorp and mycat")


def planned(text: str, vectors: int = 1, ids: Sequence[int] = (), file: Path | None = None) -> PlannedToken:
    return PlannedToken(NewToken(text, vectors), "--token_string", tuple(ids), file, "--weights" if file else "")


def plan_of(
    *trained: PlannedToken, base: Sequence[PlannedToken] = (), rate: float = 1e-2, norm: NormRule = "off"
) -> EmbeddingPlan:
    return EmbeddingPlan(trained or (planned("mycat", 2), planned("blorp")), tuple(base), rate, norm=norm)


@dataclass(frozen=True)
class Made:
    model: Model
    plan: EmbeddingPlan
    vectors: JoinedVectors
    trainable: EmbeddingTrainable


def make(folder: Path, plan: EmbeddingPlan | None = None, seed: int = SEED, **more: Any) -> Made:
    plan, model = plan or plan_of(), load(inspect(folder), **more)
    vectors = make_vectors(plan, model, seed)
    return Made(model, plan, vectors, EmbeddingTrainable(model, plan, vectors))


def tables(model: Model) -> list[Tensor]:
    return [model.embedding_table(place) for place in range(len(model.text_widths))]


def frozen_hash(model: Model) -> str:
    """Of every weight of the text encoders and the U-Net, adapters and joined vectors not among them."""
    digest = hashlib.sha256()
    for part in (*model.reload_text_encoders(), model.unet):
        for name, tensor in part.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def loss_of(model: Model, captions: Sequence[str] = CAPTIONS) -> Tensor:
    """A denoising loss, 0-d, of fixed latents and noise through the text encoders and the U-Net."""
    generator = np.random.default_rng(5)
    noisy, target = (
        torch.from_numpy(generator.standard_normal((len(captions), 4, 8, 8), dtype=np.float32)) for _ in range(2)
    )
    prediction = model.predict(noisy, torch.arange(len(captions)) * 300 + 100, model.encode_prompts(captions))
    return (prediction - target).square().mean()


def resized(folder: Path, made: Made, **more: Any) -> tuple[Model, list[Tensor]]:
    """The same model with the new vectors as rows of tables that transformers made larger, all of whose rows have
    gradients."""
    model = load(inspect(folder), **more)
    model.vocabulary = made.plan.vocabulary
    found: list[Tensor] = []
    for encoder, vectors in zip(model.text_encoders, made.vectors.vectors, strict=True):
        whole: Any = encoder
        whole.resize_token_embeddings(VOCABULARY_SIZE + made.plan.vocabulary.vectors, mean_resizing=False)
        table: Tensor = inner(encoder).embeddings.token_embedding.weight
        table.data[VOCABULARY_SIZE:] = torch.cat([one.detach() for one in vectors])
        found.append(table.requires_grad_())
    return model, found


def row_gradients(found: Sequence[Tensor], made: Made) -> Iterator[Tensor]:
    """What the rows of such tables got, in the order of the trainable's parameters."""
    vocabulary = made.plan.vocabulary
    for table in found:
        for one in made.plan.trained:
            assert table.grad is not None
            yield table.grad[list(vocabulary.ids(one.token))]


def the_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
