"""Captions -> token ids, as the pipelines make them."""

import torch
from torch import Tensor

from library.quickstart.architecture import TOKENS
from library.tokenizer import END_ID, START_ID
from library.tokenizer.vocabulary import PLAIN, Vocabulary


def tokens(captions: list[str], vocabulary: Vocabulary = PLAIN) -> Tensor:
    """Token ids, int64 (n, 77): start, words, end, and ends to fill up."""
    rows = []
    for words in vocabulary.encode(captions):
        ids = [START_ID, *words[: TOKENS - 2], END_ID]
        rows.append(ids + [END_ID] * (TOKENS - len(ids)))
    return torch.tensor(rows)
