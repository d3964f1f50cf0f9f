"""Tidying tags and captions that programs wrote: what a tagger says of several people at once, what is said twice,
and words of captioners for which taggers have others. The groups and pairs are those that sd-scripts' users know."""

import re
from collections.abc import Sequence

_LENGTH = re.compile(r"(long|short|medium) hair")
_HAIR = re.compile(r"[\w-]+ hair")
_OF_ONE_PERSON = (
    _LENGTH,
    re.compile(r"(bob|hime) cut"),
    re.compile(r"[\w-]+ eyes"),
    re.compile(r"[\w-]+ sleeves|sleeveless"),
    re.compile(
        r"ponytail|braid|ahoge|twintails|[\w-]+ bun|single hair bun|single side bun|two side up|two tails|[\w-]+ braid"
        r"|sidelocks"
    ),
)
_PERSONS = re.compile(r"girls|boys")
_RATING = re.compile(r"rating\b.*")
_PLAIN = re.compile(r"[\w-]+|hair ornament")
_SHORT = 3
"""Longest tag whose underscores stay: emoticons such as ^_^."""
_DRAWN = ("cartoon", "anime")
_GIRL = ("female", "lady", "character", "woman", "girl")
_WORDS = (
    ("anime anime", "anime"),
    ("young", ""),
    *((f"{how} {who}", "girl") for how in _DRAWN for who in _GIRL),
    *((f"{how} women", "girls") for how in _DRAWN),
    *((who, "girl") for who in ("lady", "female", "woman", "person")),
    *((who, "girls") for who in ("ladies", "women", "people")),
    ("a cartoon figure", "a figure"),
    ("a cartoon image", "an image"),
    ("a cartoon picture", "a picture"),
    ("an anime cartoon image", "an image"),
    ("a cartoon anime drawing", "a drawing"),
    ("a cartoon drawing", "a drawing"),
    ("girl girl", "girl"),
)
_REPLACEMENTS = tuple((re.compile(rf"\b{words}(s?)\b"), new) for words, new in _WORDS)


def clean_tags(text: str) -> str:
    """Tags, joined by ", ": spaces for underscores, no ratings, none twice, no `shirt` beside `white shirt`; where
    there are several girls or boys, no hair, eyes, sleeves or hairstyles that can't be everybody's."""
    written = (tag.strip() for tag in text.split(","))
    spaced = (tag if len(tag) <= _SHORT else tag.replace("_", " ") for tag in written if tag)
    tags = list(dict.fromkeys(tag for tag in spaced if not _RATING.fullmatch(tag)))
    if any(_PERSONS.search(tag) for tag in tags):
        for group in _OF_ONE_PERSON:
            tags = _unless_several(tags, [tag for tag in tags if group.fullmatch(tag)])
        tags = _unless_several(tags, [tag for tag in tags if _HAIR.fullmatch(tag) and not _LENGTH.fullmatch(tag)])
    return ", ".join(tag for tag in tags if not (_PLAIN.fullmatch(tag) and _is_in_longer(tag, tags)))


def _unless_several(tags: list[str], group: Sequence[str]) -> list[str]:
    return [tag for tag in tags if tag not in group] if len(group) > 1 else tags


def _is_in_longer(tag: str, tags: Sequence[str]) -> bool:
    return any(other.endswith(f" {tag}") for other in tags)


def clean_caption(text: str) -> str:
    """A caption with the words of taggers: a woman, a lady, a person and so on are girls, drawn or not; whole words
    only."""
    for words, new in _REPLACEMENTS:
        plural = r"\1" if new and not new.endswith("s") else ""
        before = None
        while before != text:
            before = text
            text = words.sub(new + plural, text)
    return re.sub(r" {2,}", " ", text).strip()
