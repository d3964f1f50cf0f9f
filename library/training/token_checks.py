"""Whether a word can be a new token: CLIP's tokenizer must not know it, and must find it again in captions. Imports no
torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from library.embedding_layouts import bundle_name
from library.errors import Problem
from library.models.weighted import fragments
from library.tokenizer import END_ID, END_TOKEN, START_TOKEN, clip_tokenizer, clip_vocabulary
from library.tokenizer.vocabulary import NewToken, Vocabulary

_BEFORE, _AFTER = "a", ", on"


@dataclass(frozen=True)
class Reading:
    """How a run reads captions.

    Attributes:
        pad_ids: of the family's text encoders.
        weighted: brackets weigh words. `wildcards`: braces hold choices.
    """

    pad_ids: tuple[int, ...] = (END_ID,)
    weighted: bool = False
    wildcards: bool = False


def pieces(text: str) -> tuple[tuple[int, str], ...]:
    """CLIP's own tokens of a text: ids, and which part of the text each stands for."""
    encoded = clip_tokenizer().encode(text, add_special_tokens=False)
    return tuple((one, text[start:end]) for one, (start, end) in zip(encoded.ids, encoded.offsets, strict=True))


def listed(parts: Sequence[str]) -> str:
    """`'blo' and 'rp'`."""
    quoted = [repr(part) for part in parts]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def token_problem(text: str, where: str, reading: Reading) -> Problem | None:
    """Why this word can't be a new token, seen by itself; None if nothing is wrong with it."""
    if not text:
        return Problem(where, "an empty text is no token", "give a word such as mycat")
    if any(map(str.isspace, text)):
        advice = f"write it as one word, such as {'-'.join(text.split()) or 'mycat'}, or give two tokens apart"
        return Problem(where, f"{text!r} holds white space, and a token is one word", advice)
    if not text.isprintable():
        return Problem(where, f"{text!r} holds a character that can't be seen", "use letters that a caption can hold")
    if "," in text:
        return Problem(where, f"{text!r} holds a comma, which ends a tag", "several tokens stand with spaces between")
    if reading.weighted and fragments(text) != [(text, 1.0)]:
        wrong = f"{text!r} holds signs by which --weighted_captions weighs words"
        return Problem(where, wrong, "use a token without brackets and backslashes")
    if reading.wildcards and not {"{", "|", "}"}.isdisjoint(text):
        return Problem(where, f"{text!r} holds signs that --enable_wildcard reads", "use a token without braces")
    if text.lower() in (START_TOKEN, END_TOKEN):
        return Problem(where, f"{text!r} is a sign of the tokenizer's own", "use a word of your own, such as mycat")
    if text in clip_vocabulary() and len(pieces(text)) > 1:
        wrong = f"{text!r} is in CLIP's vocabulary, as a piece of words"
        return Problem(where, wrong, f"use a word that isn't, such as my{text}")
    for pad_id in reading.pad_ids:
        ids = clip_tokenizer(pad_id).encode(text, add_special_tokens=False).ids
        if len(ids) == 1:
            wrong = f"the tokenizer knows {text!r} already, as its token {ids[0]}"
            other = next((word for word in (f"my{text}", f"my-{text}") if len(pieces(word)) > 1), "mycat")
            return Problem(where, wrong, f"use a word that it doesn't know, such as {other}")
    return None


def clashes(tokens: Sequence[tuple[NewToken, str]]) -> Iterator[Problem]:
    """Tokens that are one and the same for the tokenizer, or of which one is what it calls another's vector. With each
    token stands where it was named; only the later one of two is told, with both places where they differ."""
    normalizer = clip_tokenizer().normalizer
    owners: dict[str, tuple[int, int]] = {}
    for number, (token, where) in enumerate(tokens):
        for place, part in enumerate(token.parts):
            first, its_place = owners.setdefault(normalizer.normalize_str(part), (number, place))
            if first == number:
                continue
            other, its_where = tokens[first][0].text, tokens[first][1]
            where = where if where == its_where else f"{its_where}, {where}"
            if place or its_place:
                wrong = f"number {its_place + 1} of {other!r} and number {place + 1} of {token.text!r}"
                yield Problem(where, f"{part!r} would name two vectors: {wrong}", "use another token")
            elif other == token.text:
                yield Problem(where, f"{token.text!r} stands there twice", "name each token once")
            else:
                wrong = f"{token.text!r} and {other!r} are the same token, because case doesn't count"
                yield Problem(where, wrong, "use another token")
            break


def same_in_bundles(tokens: Sequence[tuple[NewToken, str]]) -> Iterator[Problem]:
    """Different tokens that a bundle would call by one name."""
    owners: dict[str, str] = {}
    for token, where in tokens:
        other = owners.setdefault(bundle_name(token.text), token.text)
        if other != token.text:
            wrong = f"{other!r} and {token.text!r} have the same name in a bundle, {bundle_name(token.text)!r}"
            yield Problem(where, wrong, "use another token, or leave bundle out of --save_embedding_as")


def unread(vocabulary: Vocabulary, places: Sequence[str], reading: Reading) -> Iterator[Problem]:
    """Tokens that the tokenizer, which has them all, doesn't find in a caption. `places`: where each was named."""
    for token, where in zip(vocabulary.tokens, places, strict=True):
        for pad_id in reading.pad_ids:
            plain = clip_tokenizer(pad_id)
            before, after = (plain.encode(text, add_special_tokens=False).ids for text in (_BEFORE, _AFTER))
            found = vocabulary.encode([token.text, f"{_BEFORE} {token.text}{_AFTER}"], pad_id)
            ids = list(vocabulary.ids(token))
            if found != [ids, [*before, *ids, *after]]:
                encoded = vocabulary.tokenizer(pad_id).encode(token.text, add_special_tokens=False)
                parts = [token.text[start:end] for start, end in encoded.offsets]
                wrong = f"the tokenizer doesn't find {token.text!r} in a caption, but {listed(parts)}"
                yield Problem(where, wrong, "use letters, digits, - and _")
                break
