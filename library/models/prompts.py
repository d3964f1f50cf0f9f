"""Captions -> rows of 77 tokens -> text states, in rows of 75 words side by side. Plain captions, without weights."""

from collections.abc import Sequence

import torch

from library.tokenizer import END_ID, START_ID, clip_tokenizer

ROW = 77
WORDS = ROW - 2


def token_rows(captions: Sequence[str], max_words: int = WORDS) -> torch.Tensor:
    """Token ids, (b, n, 77) int64, of CLIP ViT-L (padding is the end token).

    A caption is start, at most `max_words` tokens, end, padding. Longer than one row, it is cut into n rows, each with
    a start token of its own and, last, the last token of the whole.

    Args:
        max_words: 75, 150 or 225.
    """
    if max_words % WORDS or max_words < WORDS:
        raise ValueError(f"max_words must be a multiple of {WORDS}, not {max_words}")
    encoded = clip_tokenizer().encode_batch(list(captions), add_special_tokens=False)
    return torch.tensor([_rows(one.ids[:max_words], max_words) for one in encoded], dtype=torch.int64)


def _rows(ids: list[int], max_words: int) -> list[list[int]]:
    padded = ids + [END_ID] * (max_words - len(ids))
    return [[START_ID, *padded[start : start + WORDS], END_ID] for start in range(0, max_words, WORDS)]


def inner(text_encoder: torch.nn.Module) -> torch.nn.Module:
    """The CLIP text transformer itself: `CLIPTextModel` has a level `text_model` only before transformers 5.6."""
    found: torch.nn.Module = getattr(text_encoder, "text_model", text_encoder)
    return found


def encode_rows(text_encoder: torch.nn.Module, rows: torch.Tensor, clip_skip: int | None) -> torch.Tensor:
    """Text states (b, n * 75 + 2, d) of token rows (b, n, 77), in the encoder's dtype; differentiable.

    Args:
        clip_skip: which layer from the end gives the states, 1 the last one; the final norm is applied to any.
    """
    batch, count, length = rows.shape
    layer = clip_skip or 1
    output = text_encoder(rows.reshape(batch * count, length), output_hidden_states=layer > 1)
    states = inner(text_encoder).final_layer_norm(output.hidden_states[-layer]) if layer > 1 else output[0]
    if count == 1:
        return states
    states = states.reshape(batch, count, length, -1)
    words = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], words, states[:, -1, -1:]], dim=1)
