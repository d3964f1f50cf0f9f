"""CLIP's vocabulary with new tokens behind it, each of one or several vectors.

A text holds a new token as a word, in any case. Where that stands, the ids of all its vectors go: `mycat` becomes
`mycat mycat1 mycat2`. Imports no torch; where the vectors are is models.joined's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer

from library.tokenizer import (
    END_ID,
    VOCABULARY_SIZE,
    build,
    clip_merges,
    clip_tokenizer,
    clip_vocabulary,
    special_padding,
)


@dataclass(frozen=True)
class NewToken:
    """A token that CLIP doesn't know, and how many vectors it has."""

    text: str
    vectors: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its vectors in tokenizers: `tok`, `tok1`, `tok2` ..."""
        return (self.text, *(f"{self.text}{number}" for number in range(1, self.vectors)))


@dataclass(frozen=True)
class Vocabulary:
    """New tokens, in the order in which their vectors stand behind CLIP's own rows."""

    tokens: tuple[NewToken, ...] = ()

    @property
    def vectors(self) -> int:
        """Of all new tokens together."""
        return sum(token.vectors for token in self.tokens)

    def ids(self, token: NewToken) -> range:
        """The ids of a token's vectors.

        Raises:
            ValueError: it is none of these tokens.
        """
        place = self.tokens.index(token)
        first = VOCABULARY_SIZE + sum(one.vectors for one in self.tokens[:place])
        return range(first, first + token.vectors)

    def tokenizer(self, pad_id: int = END_ID) -> Tokenizer:
        """A CLIP tokenizer that also knows these tokens' parts, built once a process; not to be changed."""
        return _tokenizer(self, pad_id) if self.tokens else clip_tokenizer(pad_id)

    def unread(self, pad_id: int = END_ID) -> tuple[str, ...]:
        """Parts that don't become the ids that they should have, and whose tokens are of no use therefore: CLIP has
        them already, be it as a piece of words, or they hold a sign that is always a token, or are there twice."""
        parts = [(part, one) for token in self.tokens for part, one in zip(token.parts, self.ids(token), strict=True)]
        encoded = self.tokenizer(pad_id).encode_batch([part for part, _ in parts], add_special_tokens=False)
        return tuple(part for (part, one), found in zip(parts, encoded, strict=True) if found.ids != [one])

    def encode(self, texts: Sequence[str], pad_id: int = END_ID) -> list[list[int]]:
        """Ids of texts without start and end; a token's first part stands for all of its parts, unless they follow."""
        encoded = self.tokenizer(pad_id).encode_batch(list(texts), add_special_tokens=False)
        return [[found for found, _ in self.expanded(one.ids)] for one in encoded]

    def expanded(self, ids: list[int]) -> list[tuple[int, int]]:
        """Ids with all parts of each token whose first part stands there without the second, and for each the place
        in `ids` where it comes from."""
        rests = _rests(self)
        found: list[tuple[int, int]] = []
        for place, one in enumerate(ids):
            rest = rests.get(one, ())
            follows = bool(rest) and ids[place + 1 : place + 2] == [rest[0]]
            found += [(new, place) for new in ((one,) if follows else (one, *rest))]
        return found


PLAIN = Vocabulary()
"""CLIP's own."""


@lru_cache(maxsize=8)
def _tokenizer(vocabulary: Vocabulary, pad_id: int) -> Tokenizer:
    tokenizer = build(clip_vocabulary(), list(clip_merges()), *special_padding(pad_id))
    parts = [part for token in vocabulary.tokens for part in token.parts]
    tokenizer.add_tokens([AddedToken(part, single_word=True, normalized=True) for part in parts])
    return tokenizer


@lru_cache(maxsize=8)
def _rests(vocabulary: Vocabulary) -> dict[int, tuple[int, ...]]:
    """The first id of each token of several vectors, and the others."""
    ids = map(vocabulary.ids, vocabulary.tokens)
    return {one[0]: tuple(one[1:]) for one in ids if len(one) > 1}
