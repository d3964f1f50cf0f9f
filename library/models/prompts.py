"""Captions -> rows of 77 tokens -> text states, in rows of 75 words side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.models.weighted import fragments
from library.tokenizer import END_ID, START_ID, WORDS
from library.tokenizer.vocabulary import PLAIN, Vocabulary

ROW = WORDS + 2


def token_rows(
    captions: Sequence[str], max_words: int = WORDS, pad_id: int = END_ID, vocabulary: Vocabulary = PLAIN
) -> Tensor:
    """Token ids, (b, n, 77) int64.

    A caption is start, at most `max_words` tokens, end, padding. Longer than one row, it is cut into n rows, each with
    a start token of its own and, last, the last token of the whole. Where padding is not the end token, a row that is
    full or empty gets an end token of its own.

    Args:
        max_words: 75, 150 or 225.
        pad_id: what fills a caption up, of the family's text encoder.
        vocabulary: new tokens that count as words; each of their vectors is one of the `max_words`.
    """
    count = _count(max_words)
    encoded = vocabulary.encode(captions, pad_id)
    return torch.tensor([_rows(words, count, pad_id) for words in encoded], dtype=torch.int64)


def weighted_rows(
    captions: Sequence[str], max_words: int = WORDS, pad_id: int = END_ID, vocabulary: Vocabulary = PLAIN
) -> tuple[Tensor, Tensor]:
    """Token rows of captions with weights in brackets, and each token's weight, (b, n, 77) float32.

    Fragments of one weight are tokenized apart from each other. Start, end and padding weigh 1; all vectors that a new
    token stands for weigh what it weighs.
    """
    count, tokenizer = _count(max_words), vocabulary.tokenizer(pad_id)
    rows, weights = [], []
    for caption in captions:
        parts = [(text, weight) for text, weight in fragments(caption) if text]
        encoded = tokenizer.encode_batch([text for text, _ in parts], add_special_tokens=False)
        words = [word for one in encoded for word in one.ids]
        weighs = [weight for one, (_, weight) in zip(encoded, parts, strict=True) for _ in one.ids]
        tokens = [(word, weighs[place]) for word, place in vocabulary.expanded(words)][:max_words]
        rows.append(_rows([token for token, _ in tokens], count, pad_id))
        flat = [weight for _, weight in tokens] + [1.0] * (max_words - len(tokens))
        weights.append([[1.0, *flat[start : start + WORDS], 1.0] for start in range(0, max_words, WORDS)])
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(weights, dtype=torch.float32)


def _count(max_words: int) -> int:
    """Rows of captions of at most so many words."""
    if max_words % WORDS or max_words < WORDS:
        raise ValueError(f"max_words must be a multiple of {WORDS}, not {max_words}")
    return max_words // WORDS


def _rows(words: list[int], count: int, pad_id: int) -> list[list[int]]:
    length = count * WORDS
    whole = [START_ID, *words[:length], END_ID]
    whole += [pad_id] * (length + 2 - len(whole))
    rows = [[START_ID, *whole[1 + start : 1 + start + WORDS], whole[-1]] for start in range(0, length, WORDS)]
    if count > 1 and pad_id != END_ID:
        for row in rows:
            if row[-2] not in (END_ID, pad_id):
                row[-1] = END_ID
            if row[1] == pad_id:
                row[1] = END_ID
    return rows


def inner(text_encoder: torch.nn.Module) -> Any:
    """The CLIP text transformer itself: `CLIPTextModel` has a level `text_model` only before transformers 5.6."""
    return getattr(text_encoder, "text_model", text_encoder)


@dataclass(frozen=True)
class TextStates:
    """What an encoder makes of token rows.

    Attributes:
        states: (b, n * 75 + 2, d), the wanted layer.
        last: (b, 77, d), the last layer's of each caption's first row, normed.
    """

    states: Tensor
    last: Tensor


def encode_rows(
    text_encoder: torch.nn.Module, rows: Tensor, layer: int, *, norm: bool, weights: Tensor | None = None
) -> TextStates:
    """Text states of token rows (b, n, 77) on the encoder's device, in its dtype; differentiable.

    Args:
        layer: which layer from the end gives the states, 1 the last one.
        norm: apply the final norm to that layer.
        weights: (b, n, 77), what each token's states are multiplied by.
    """
    batch, count, length = rows.shape
    encoder = inner(text_encoder)
    deeper = layer > 1 or not norm
    output = encoder(rows.reshape(batch * count, length), output_hidden_states=deeper)
    last = output.last_hidden_state
    states = last
    if deeper:
        states = output.hidden_states[-layer]
        states = encoder.final_layer_norm(states) if norm else states
    states = _side_by_side(states.reshape(batch, count, length, -1))
    if weights is not None:
        states = states * _side_by_side(weights[..., None]).to(states)
    return TextStates(states, last.reshape(batch, count, length, -1)[:, 0])


def _side_by_side(rows: Tensor) -> Tensor:
    """(b, n, 77, d) -> (b, n * 75 + 2, d): the first row's start, the words of all rows, the last row's end."""
    if rows.shape[1] == 1:
        return rows[:, 0]
    return torch.cat([rows[:, 0, :1], rows[:, :, 1:-1].flatten(1, 2), rows[:, -1, -1:]], dim=1)


def at_end(last: Tensor, rows: Tensor) -> Tensor:
    """The states (b, d) at the first end token of each caption's first row, out of (b, 77, d)."""
    position = (rows[:, 0] == END_ID).int().argmax(dim=-1)
    return last[torch.arange(len(last), device=last.device), position]
