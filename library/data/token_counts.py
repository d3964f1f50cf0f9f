"""How many tokens captions have, and which words a limit cuts, without a model.

A hundred thousand captions are counted a few at a time, so that no more than one share of them is in memory as tokens.
How the counts are shown is data.report's; how captions become rows of tokens is models.prompts'.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from library.data.captions import process
from library.data.plan import Plan
from library.data.sources.reading import LateBar
from library.tokenizer import END_ID, WORDS
from library.tokenizer.vocabulary import PLAIN, Vocabulary

Fragments = Callable[[str], Sequence[tuple[str, float]]]
"""A caption -> its pieces, which are tokenized one by one, and their weights."""
_CHUNK = 1000


@dataclass(frozen=True)
class CutCaption:
    """A caption with more tokens than the limit: how many, and the words that the model never sees."""

    picture: str
    tokens: int
    cut: str


@dataclass(frozen=True)
class TokenCounts:
    """Tokens per caption without start and end; `over_chunk` counts captions that need more than one row of 75."""

    minimum: int
    median: float
    maximum: int
    over_chunk: int
    cut: tuple[CutCaption, ...]


def count_tokens(
    plan: Plan,
    *,
    seed: int,
    limit: int,
    fragments: Fragments | None = None,
    pad_id: int = END_ID,
    vocabulary: Vocabulary = PLAIN,
) -> TokenCounts:
    """Tokens of every picture's caption as processed for the first showing, dropout and token warmup aside.

    With `fragments`, those of the pieces that it makes of a caption, without the signs of weights. `pad_id` is that of
    the text encoder: it decides what a "!" counts. A new token of `vocabulary` counts all of its vectors.
    """
    texts = list(first_showings(plan, seed))
    known: dict[str, tuple[int, str]] = dict.fromkeys(texts, (0, ""))
    unique, words = list(known), _Words(vocabulary, pad_id)
    progress = LateBar("counting tokens", len(unique))
    try:
        for start in range(0, len(unique), _CHUNK):
            share = unique[start : start + _CHUNK]
            pieces = [[piece for piece, _ in fragments(text)] if fragments else [text] for text in share]
            words.learn([piece for some in pieces for piece in some])
            known.update((text, words.cut(some, limit)) for text, some in zip(share, pieces, strict=True))
            progress.add(len(share))
    finally:
        progress.close()
    lengths = [known[text][0] for text in texts] or [0]
    cut = [
        CutCaption(record.key, *known[text])
        for record, text in zip(plan.records, texts, strict=True)
        if known[text][0] > limit
    ]
    over = sum(length > WORDS for length in lengths)
    return TokenCounts(min(lengths), float(median(lengths)), max(lengths), over, tuple(cut))


def first_showings(plan: Plan, seed: int) -> Iterator[str]:
    """The caption of each record in epoch 1 as if none were dropped, with all tags."""
    specs = {
        (number, i): replace(subset.caption, dropout_rate=0.0, dropout_every_n_epochs=0)
        for number, dataset in enumerate(plan.datasets)
        for i, subset in enumerate(dataset.spec.subsets)
    }
    for record in plan.records:
        spec = specs[record.dataset, record.subset]
        yield process(record.caption, spec, seed=seed, epoch=1, key=record.key, repeat=0)


def second_ids(vocabulary: Vocabulary) -> frozenset[int]:
    """The ids of the second vectors of new tokens. A text whose words begin with none of them has the tokens of its
    words; else a first vector before it may not stand for the whole token."""
    return frozenset(vocabulary.ids(token)[1] for token in vocabulary.tokens if token.vectors > 1)


class _Words:
    """Tokens of the parts between spaces, which no token of CLIP's crosses: each part is tokenized once.

    Only where a word begins with a new token's second vector is the text tokenized whole: the first one may stand
    before it, and then doesn't stand for all (`tok tok1`).
    """

    def __init__(self, vocabulary: Vocabulary, pad_id: int) -> None:
        self._vocabulary, self._pad_id = vocabulary, pad_id
        self._lengths: dict[str, int] = {}
        self._starts: dict[str, list[int]] = {}
        self._second: set[str] = set()
        self._whole: dict[str, int] = {}

    def learn(self, texts: Sequence[str]) -> None:
        """Tokenize the words of `texts` that are new, and the texts that must be tokenized whole."""
        words = list({word for text in texts for word in text.split(" ")} - self._lengths.keys())
        if not self._vocabulary.tokens:
            tokenizer = self._vocabulary.tokenizer(self._pad_id)
            encodings = tokenizer.encode_batch_fast(words, add_special_tokens=False)
            self._lengths.update(zip(words, map(len, encodings), strict=True))
            return
        second = second_ids(self._vocabulary)
        for word, ids in zip(words, self._vocabulary.encode(words, self._pad_id), strict=True):
            self._lengths[word] = len(ids)
            if ids and ids[0] in second:
                self._second.add(word)
        whole = list(dict.fromkeys(text for text in texts if not self._second.isdisjoint(text.split(" "))))
        self._whole = dict(zip(whole, map(len, self._vocabulary.encode(whole, self._pad_id)), strict=True))

    def cut(self, pieces: Sequence[str], limit: int) -> tuple[int, str]:
        """Tokens of all pieces together, and the text from the first token on that is beyond `limit`."""
        tokens, rest = 0, ""
        for piece in pieces:
            count = self._whole.get(piece)
            if count is None:
                count = sum(map(self._lengths.__getitem__, piece.split(" ")))
            if tokens >= limit:
                rest += piece
            elif tokens + count > limit:
                rest = piece[self._start(piece, limit - tokens) :]
            tokens += count
        return tokens, rest if tokens > limit else ""

    def _start(self, piece: str, number: int) -> int:
        """Where the token `number` (from 0) of a piece begins."""
        if piece in self._whole:
            return self._token_starts(piece)[number]
        place = 0
        for word in piece.split(" "):
            if number < self._lengths[word]:
                break
            number -= self._lengths[word]
            place += len(word) + 1
        if word not in self._starts:
            self._starts[word] = self._token_starts(word)
        return place + self._starts[word][number]

    def _token_starts(self, text: str) -> list[int]:
        encoding = self._vocabulary.tokenizer(self._pad_id).encode(text, add_special_tokens=False)
        return [encoding.offsets[place][0] for _, place in self._vocabulary.expanded(encoding.ids)]
