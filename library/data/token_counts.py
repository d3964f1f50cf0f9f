"""How many tokens captions have, and which words a limit cuts, without a model.

A hundred thousand captions are counted a few at a time, so that no more than one share of them is in memory as tokens.
How the counts are shown is data.report's; how captions become rows of tokens is models.prompts'.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from library.data.captions import process
from library.data.plan import Plan
from library.data.sources.reading import LateBar
from library.tokenizer import END_ID, WORDS, clip_tokenizer

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
    plan: Plan, *, seed: int, limit: int, fragments: Fragments | None = None, pad_id: int = END_ID
) -> TokenCounts:
    """Tokens of every picture's caption as processed for the first showing, dropout and token warmup aside.

    With `fragments`, those of the pieces that it makes of a caption, without the signs of weights. `pad_id` is that of
    the text encoder: it decides what a "!" counts.
    """
    texts = list(_first_showings(plan, seed))
    known: dict[str, tuple[int, str]] = dict.fromkeys(texts, (0, ""))
    unique, words = list(known), _Words(pad_id)
    progress = LateBar("counting tokens", len(unique))
    try:
        for start in range(0, len(unique), _CHUNK):
            share = unique[start : start + _CHUNK]
            pieces = [[piece for piece, _ in fragments(text)] if fragments else [text] for text in share]
            words.learn(piece for some in pieces for piece in some)
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


def _first_showings(plan: Plan, seed: int) -> Iterator[str]:
    """The caption of each record in epoch 1 as if none were dropped, with all tags."""
    specs = {
        (number, i): replace(subset.caption, dropout_rate=0.0, dropout_every_n_epochs=0)
        for number, dataset in enumerate(plan.datasets)
        for i, subset in enumerate(dataset.spec.subsets)
    }
    for record in plan.records:
        spec = specs[record.dataset, record.subset]
        yield process(record.caption, spec, seed=seed, epoch=1, key=record.key, repeat=0)


class _Words:
    """Tokens of the parts between spaces, which no token of CLIP's crosses: each part is tokenized once."""

    def __init__(self, pad_id: int) -> None:
        self._tokenizer = clip_tokenizer(pad_id)
        self._lengths: dict[str, int] = {}
        self._starts: dict[str, list[int]] = {}

    def learn(self, texts: Iterable[str]) -> None:
        """Tokenize the words of `texts` that are new."""
        new = list({word for text in texts for word in text.split(" ")} - self._lengths.keys())
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self._lengths.update(zip(new, map(len, encodings), strict=True))

    def cut(self, pieces: Sequence[str], limit: int) -> tuple[int, str]:
        """Tokens of all pieces together, and the text from the first token on that is beyond `limit`."""
        tokens, rest = 0, ""
        for piece in pieces:
            count = sum(map(self._lengths.__getitem__, piece.split(" ")))
            if tokens >= limit:
                rest += piece
            elif tokens + count > limit:
                rest = piece[self._start(piece, limit - tokens) :]
            tokens += count
        return tokens, rest if tokens > limit else ""

    def _start(self, piece: str, number: int) -> int:
        """Where the token `number` (from 0) of a piece begins."""
        place = 0
        for word in piece.split(" "):
            if number < self._lengths[word]:
                break
            number -= self._lengths[word]
            place += len(word) + 1
        if word not in self._starts:
            encoding = self._tokenizer.encode(word, add_special_tokens=False)
            self._starts[word] = [start for start, _ in encoding.offsets]
        return place + self._starts[word][number]
