"""Do the vocabulary's rows stay what they were while a run in this process trains new vectors behind them?

The text encoders are those of the run itself: caught when vectors are joined to them, looked at again after the run.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from torch import Tensor, nn

from library.models.joined import token_embedding
from library.models.model import Model
from library.tokenizer import VOCABULARY_SIZE
from library.tokenizer.vocabulary import Vocabulary


def rows_hash(text_encoder: nn.Module) -> str:
    """SHA-256 of the vocabulary's rows in a text encoder, as float32."""
    rows = token_embedding(text_encoder).weight.detach()[:VOCABULARY_SIZE].float().cpu().contiguous()
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


@dataclass
class WatchedRows:
    """Text encoders that vectors were joined to, and the hash of their rows just before."""

    encoders: list[nn.Module] = field(default_factory=list)
    before: list[str] = field(default_factory=list)

    def after(self) -> list[str]:
        """The hashes now, in the same order."""
        return [rows_hash(encoder) for encoder in self.encoders]


@contextmanager
def watch_rows() -> Iterator[WatchedRows]:
    """Catch the text encoders of the runs in this block."""
    watched = WatchedRows()
    join = Model.join_embeddings

    def caught(model: Model, vocabulary: Vocabulary, vectors: Sequence[Sequence[Tensor]]) -> None:
        watched.encoders += model.text_encoders
        watched.before += [rows_hash(encoder) for encoder in model.text_encoders]
        join(model, vocabulary, vectors)

    with patch.object(Model, "join_embeddings", caught):
        yield watched
