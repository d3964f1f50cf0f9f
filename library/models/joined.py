"""New vectors behind the rows of a text encoder's token embedding.

The encoder's table stays what it is: frozen, of CLIP's 49,408 rows, in the encoder's dtype. The vectors are float32
tensors of their own that its forward looks up where an id is beyond the table; they are no parameters of the encoder
and stand in no state dict of it. Which ids a text has is tokenizer.vocabulary's business, what the vectors hold the
caller's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.models.prompts import inner
from library.tokenizer import VOCABULARY_SIZE
from library.tokenizer.vocabulary import Vocabulary

Vectors = tuple[tuple[Tensor, ...], ...]
"""By text encoder and token: (n, d) float32."""


class JoinedEmbedding(nn.Embedding):
    """An embedding whose ids go on behind its last row, over the rows of `vectors` one after the other."""

    vectors: tuple[Tensor, ...]

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., d) in the table's dtype. Vectors are rounded to it after they are looked up, so that
        the gradients of all places where one stands are added in float32."""
        known = super().forward(ids.clamp(max=VOCABULARY_SIZE - 1))
        rows = torch.cat([one.to(known.device) for one in self.vectors])
        new = functional.embedding((ids - VOCABULARY_SIZE).clamp(min=0), rows).to(known.dtype)
        return torch.where((ids >= VOCABULARY_SIZE)[..., None], new, known)


def token_embedding(text_encoder: nn.Module) -> nn.Embedding:
    """The module that turns ids into vectors."""
    found: nn.Embedding = inner(text_encoder).embeddings.token_embedding
    return found


def join(text_encoder: nn.Module, vectors: Sequence[Tensor]) -> None:
    """Put vectors behind the encoder's table, in place of those that were there; with none it is as it came."""
    embedding = token_embedding(text_encoder)
    if vectors:
        embedding.__class__ = JoinedEmbedding
        embedding.vectors = tuple(vectors)
    elif isinstance(embedding, JoinedEmbedding):
        embedding.__class__ = nn.Embedding
        del embedding.vectors


def checked(
    vocabulary: Vocabulary, vectors: Sequence[Sequence[Tensor]], widths: Sequence[int], pad_ids: Sequence[int]
) -> Vectors:
    """The vectors of a vocabulary's tokens for text encoders of these widths, whose rows these ids fill up.

    Raises:
        ValueError: they are not what these tokens and encoders need, or a tokenizer can't tell the tokens.
    """
    unread = {part for pad_id in pad_ids for part in vocabulary.unread(pad_id)}
    if unread:
        raise ValueError(f"the tokenizer has no ids of their own for {sorted(unread)}")
    if len(vectors) != len(widths):
        raise ValueError(f"vectors for {len(vectors)} text encoders, and there are {len(widths)}")
    for width, each in zip(widths, vectors, strict=True):
        wanted = [(torch.float32, (token.vectors, width)) for token in vocabulary.tokens]
        found = [(one.dtype, tuple(one.shape)) for one in each]
        if found != wanted:
            raise ValueError(f"vectors are {found}, and these tokens need {wanted}")
    return tuple(tuple(each) for each in vectors)
