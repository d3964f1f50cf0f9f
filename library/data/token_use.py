"""How many captions hold each new token, without a model: vectors of a token that no caption holds learn nothing.

Captions are looked at as the first epoch shows them, dropout (unless it leaves none) and token warmup aside; where
they vary, what they are made of counts, too, before a token is said to be missing. How many tokens captions have is
data.token_counts'.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from library.data.captions import draws_anything
from library.data.plan import Plan
from library.data.records import ImageRecord
from library.data.sources.reading import LateBar
from library.data.token_counts import Fragments, first_showings, second_ids
from library.errors import Problem
from library.options.specs import PRESERVE, CaptionSpec, SubsetSpec
from library.options.subset_specs import can_name
from library.tokenizer import END_ID, VOCABULARY_SIZE, WORDS
from library.tokenizer.vocabulary import NewToken, Vocabulary

_CHUNK = 1000
_SHOWN = 90


@dataclass(frozen=True)
class Holding:
    """How many captions hold just these new tokens, and one of them: the picture's path and the caption."""

    tokens: frozenset[NewToken]
    captions: int
    picture: str
    caption: str


@dataclass(frozen=True)
class TokenUse:
    """New tokens in the captions of the pictures to train on. Regularization pictures, those for which the network is
    to change nothing, and those that are always shown without caption aren't counted.

    Attributes:
        vocabulary: the tokens that were looked for.
        limit: how many tokens of a caption the model sees. One that is cut off, even in part, isn't held.
        holdings: the captions by what they hold.
        sometimes: tokens that other showings of captions that vary may hold.
        beyond: tokens that some caption holds behind the limit.
        without_use: why pictures aren't counted.
    """

    vocabulary: Vocabulary
    limit: int
    holdings: tuple[Holding, ...]
    sometimes: frozenset[NewToken]
    beyond: frozenset[NewToken]
    without_use: tuple[str, ...] = ()

    @property
    def captions(self) -> int:
        """All that were looked at."""
        return sum(one.captions for one in self.holdings)

    def count(self, token: NewToken) -> int:
        """Captions that hold a token."""
        return sum(one.captions for one in self.holdings if token in one.tokens)

    def without(self, tokens: Collection[NewToken]) -> tuple[Holding, ...]:
        """Captions that hold none of these."""
        return tuple(one for one in self.holdings if one.tokens.isdisjoint(tokens))


def token_use(
    plan: Plan,
    vocabulary: Vocabulary,
    seed: int,
    *,
    limit: int = WORDS,
    fragments: Fragments | None = None,
    pad_id: int = END_ID,
) -> TokenUse:
    """Look for the tokens of `vocabulary` in every picture's caption; each distinct caption is encoded once.

    Args:
        limit: `max_token_length` (75, 150 or 225).
        fragments: how captions are taken apart where they weigh words.
        pad_id: of the text encoder, which decides what a "!" counts.
    """
    search = _Search(vocabulary, limit, fragments, pad_id)
    useless = {
        (number, place): _useless(subset)
        for number, dataset in enumerate(plan.datasets)
        for place, subset in enumerate(dataset.spec.subsets)
    }
    chosen = [
        (record, text)
        for record, text in zip(plan.records, first_showings(plan, seed), strict=True)
        if useless[record.dataset, record.subset] is None
    ]
    found = search.find(dict.fromkeys(text for _, text in chosen))
    counts: Counter[frozenset[NewToken]] = Counter(found[text][0] for _, text in chosen)
    examples: dict[frozenset[NewToken], tuple[str, str]] = {}
    for record, text in chosen:
        if found[text][0] not in examples:
            examples[found[text][0]] = str(record.path), text
    holdings = tuple(Holding(held, count, *examples[held]) for held, count in counts.items())
    missing = set(vocabulary.tokens) - frozenset().union(*counts)
    sometimes: frozenset[NewToken] = frozenset()
    if missing:
        made_of = dict.fromkeys(text for record, _ in chosen for text in _made_of(record, _recipe(plan, record)))
        parts = _Search(vocabulary, 0, fragments, pad_id).find(made_of)
        sometimes = frozenset().union(*(behind for _, behind in parts.values())) & missing
    beyond = frozenset().union(*(behind for _, behind in found.values()))
    reasons = dict.fromkeys(filter(None, useless.values()))
    return TokenUse(vocabulary, limit, holdings, sometimes, beyond, tuple(reasons))


def problems(use: TokenUse, trained: Sequence[NewToken], where: str = "--token_string") -> Iterator[Problem]:
    """Trained tokens that no caption holds; `where` they were named."""
    if trained and not use.captions and use.without_use:
        words = " or ".join(token.text for token in trained)
        wrong = f"no caption is left to learn {words} from: all pictures {' or '.join(use.without_use)}"
        yield Problem(where, wrong, "some pictures must be shown with captions that hold it")
        return
    for token in trained:
        if use.count(token) or token in use.sometimes:
            continue
        if token in use.beyond:
            wrong = f"captions hold {token.text} only behind their first {use.limit} tokens, where it is cut off"
            yield Problem(where, wrong, "write it at their start, or raise --max_token_length")
            continue
        wrong = f"none of {use.captions:,} captions holds {token.text}{_example(use.holdings)}"
        folder = f", name the folder 10_{token.text} (for pictures without captions)" if can_name(token.text) else ""
        yield Problem(where, wrong, f"write it into the captions{folder}, or use --use_object_template")


def notices(use: TokenUse, trained: Sequence[NewToken]) -> Iterator[str]:
    """Lines about captions that hold none of the trained tokens, where `problems` has none, and about frozen tokens
    that no caption holds."""
    without = use.without(trained)
    if trained and without and next(problems(use, trained), None) is None:
        counts = ", ".join(f"{token.text} in {use.count(token):,}" for token in trained)
        number = sum(one.captions for one in without)
        holds_none = ("doesn't" if number == 1 else "don't") + " hold " + ("it" if len(trained) == 1 else "any of them")
        yield (
            f"new tokens: {counts} of {use.captions:,} captions; {number:,} {holds_none}{_example(without)}: "
            "nothing is learned for a token from captions without it"
        )
    for token in use.vocabulary.tokens:
        if token not in trained and not use.count(token) and token not in use.sometimes:
            yield f"--base_embeddings {token.text}: no caption of the pictures to train on holds it"


def _useless(subset: SubsetSpec) -> str | None:
    """Why vectors learn nothing from a subset's captions; None where they do."""
    if subset.is_reg:
        return "are regularization pictures"
    if subset.custom_attributes.get(PRESERVE):
        return f"have {PRESERVE}, which leaves the network out"
    dropout = subset.caption
    if dropout.dropout_rate >= 1:
        return f"are always shown without caption (caption_dropout_rate {dropout.dropout_rate:g})"
    if dropout.dropout_every_n_epochs == 1:
        return "are always shown without caption (caption_dropout_every_n_epochs 1)"
    return None


def _example(holdings: Sequence[Holding]) -> str:
    if not holdings:
        return ""
    text = holdings[0].caption
    short = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return f", such as {short!r} of {holdings[0].picture}"


def _recipe(plan: Plan, record: ImageRecord) -> CaptionSpec:
    return plan.datasets[record.dataset].spec.subsets[record.subset].caption


def _made_of(record: ImageRecord, spec: CaptionSpec) -> Iterator[str]:
    """The texts of which a caption that varies is made; nothing of one that is always the same."""
    if not draws_anything(spec):
        return
    if not spec.templates or not spec.subject or spec.keep_original:
        yield from filter(None, (record.caption, spec.prefix, spec.suffix))
    yield from (template.replace("{}", spec.subject) for template in spec.templates)


_Found = tuple[frozenset[NewToken], frozenset[NewToken]]
"""The tokens that a text holds whole within the limit, and those of which a part is behind it."""
_NOTHING: frozenset[NewToken] = frozenset()


class _Search:
    """Looks for new tokens among the first `limit` tokens of texts, and behind them.

    Each word is tokenized once; a text is tokenized whole where it is too long, or where that may differ.
    """

    def __init__(self, vocabulary: Vocabulary, limit: int, fragments: Fragments | None, pad_id: int) -> None:
        self._vocabulary, self._limit, self._pad_id = vocabulary, limit, pad_id
        self._fragments = fragments
        self._ids = {token: vocabulary.ids(token) for token in vocabulary.tokens}
        self._second = second_ids(vocabulary)
        self._lengths: dict[str, int] = {}
        self._held: dict[str, frozenset[NewToken]] = {}

    def find(self, texts: Iterable[str]) -> dict[str, _Found]:
        """What each text holds."""
        unique = list(texts)
        progress = LateBar("looking for new tokens", len(unique))
        found: dict[str, _Found] = {}
        try:
            for start in range(0, len(unique), _CHUNK):
                share = unique[start : start + _CHUNK]
                found.update(zip(share, self._share(share), strict=True))
                progress.add(len(share))
        finally:
            progress.close()
        return found

    def _share(self, texts: Sequence[str]) -> list[_Found]:
        fragments = self._fragments
        pieces = [[piece for piece, _ in fragments(text)] if fragments else [text] for text in texts]
        words = [[word for piece in some for word in piece.split(" ")] for some in pieces]
        self._learn(list({word for some in words for word in some} - self._lengths.keys()))
        found = [self._quickly(some) for some in words]
        slow = [i for i, one in enumerate(found) if one is None]
        ids = iter(self._vocabulary.encode([piece for i in slow for piece in pieces[i]], self._pad_id))
        whole = {i: self._carefully([one for _ in pieces[i] for one in next(ids)]) for i in slow}
        return [whole[i] if one is None else one for i, one in enumerate(found)]

    def _learn(self, words: Sequence[str]) -> None:
        """Tokenize words. One that begins with a token's second vector counts as longer than any limit."""
        for word, ids in zip(words, self._vocabulary.encode(words, self._pad_id), strict=True):
            self._lengths[word] = self._limit + 1 if ids and ids[0] in self._second else len(ids)
            if max(ids, default=0) >= VOCABULARY_SIZE:
                self._held[word] = self._whole_tokens(ids)

    def _quickly(self, words: Sequence[str]) -> _Found | None:
        if sum(map(self._lengths.__getitem__, words)) > self._limit:
            return None
        return _NOTHING.union(*(self._held[word] for word in words if word in self._held)), _NOTHING

    def _carefully(self, ids: Sequence[int]) -> _Found:
        rest = set(ids[self._limit :])
        behind = frozenset(token for token, mine in self._ids.items() if not rest.isdisjoint(mine))
        return self._whole_tokens(ids[: self._limit]), behind

    def _whole_tokens(self, ids: Sequence[int]) -> frozenset[NewToken]:
        there = set(ids)
        return frozenset(token for token, mine in self._ids.items() if there.issuperset(mine))
