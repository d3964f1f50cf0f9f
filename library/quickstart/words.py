"""Captions -> token ids, as the pipelines make them."""

import torch
from torch import Tensor

from library.quickstart.architecture import TOKENS
from library.tokenizer import END_ID, START_ID, clip_tokenizer


def tokens(captions: list[str]) -> Tensor:
    """Token ids, int64 (n, 77): start, words, end, and ends to fill up."""
    tokenizer = clip_tokenizer()
    rows = []
    for text in captions:
        ids = [START_ID, *tokenizer.encode(text).ids[: TOKENS - 2], END_ID]
        rows.append(ids + [END_ID] * (TOKENS - len(ids)))
    return torch.tensor(rows)
