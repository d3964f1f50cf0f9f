"""From a tagger's probabilities to the tags of a caption: thresholds by category, replacement, order, what is left out.

A tag may be written with underscores or spaces wherever a user names one. Needs no model.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from library.errors import Problem, UserError

Category = Literal["rating", "general", "character", "copyright", "artist", "meta", "model", "quality"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
ONE_OF: tuple[Category, ...] = ("rating", "quality")
"""Of these a picture gets the likeliest one, if it is asked for, and none by threshold."""
_SHORT = 3
Replacement = tuple[str, str]


@dataclass(frozen=True)
class Label:
    """What one output of a tagger stands for."""

    name: str
    category: Category


@dataclass(frozen=True)
class Rules:
    """How probabilities become tags.

    Attributes:
        thresholds: the least probability that counts, by category.
        by_probability: the likeliest tags come first; else they keep the order of the model's table.
        first: tags that stand before all others where they are found, in this order.
        first_of: which of rating and quality is put before the other tags; `last_of` behind them.
        expand_characters: `name_(series)` becomes the two tags `name` and `series`.
    """

    thresholds: Mapping[Category, float]
    by_probability: bool = False
    undesired: Sequence[str] = ()
    replacements: Sequence[Replacement] = ()
    first: Sequence[str] = ()
    first_of: Sequence[Category] = ()
    last_of: Sequence[Category] = ()
    characters_first: bool = False
    expand_characters: bool = False
    remove_underscore: bool = False


@dataclass
class Chooser:
    """The tags of pictures by one set of rules.

    Attributes:
        counts: how many pictures got each tag so far.
    """

    labels: Sequence[Label]
    rules: Rules
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        rules = self.rules
        swapped = {plain(source): target for source, target in rules.replacements}
        unwanted = {plain(tag) for tag in rules.undesired}
        self._texts = [
            tuple(text for text in self._written(label, swapped) if text and plain(text) not in unwanted)
            for label in self.labels
        ]
        self._places: dict[Category, NDArray[np.int64]] = {
            category: np.array([i for i, label in enumerate(self.labels) if label.category == category], np.int64)
            for category in CATEGORIES
        }
        self._first = [plain(tag) for tag in rules.first]

    def _written(self, label: Label, swapped: Mapping[str, str]) -> Iterable[str]:
        """The tags that stand in a caption for one of the model's."""
        parts = [label.name]
        if self.rules.expand_characters and label.category == "character":
            parts = _expanded(label.name)
        for part in parts:
            text = without_underscores(part) if self.rules.remove_underscore else part
            yield swapped.get(plain(text), text)

    def __call__(self, probabilities: NDArray[np.floating]) -> list[str]:
        """The tags of one picture, each once.

        Args:
            probabilities: (number of labels,), 0 to 1.
        """
        characters = self._above(probabilities, ("character",)) if self.rules.characters_first else []
        others = tuple(category for category in CATEGORIES if category not in ONE_OF)
        found = [
            *self._likeliest(probabilities, self.rules.first_of),
            *characters,
            *(label for label in self._above(probabilities, others) if label not in set(characters)),
            *self._likeliest(probabilities, self.rules.last_of),
        ]
        tags = list(dict.fromkeys(text for label in found for text in self._texts[label]))
        if self._first:
            tags.sort(key=lambda tag: self._first.index(plain(tag)) if plain(tag) in self._first else len(self._first))
        self.counts.update(tags)
        return tags

    def _above(self, probabilities: NDArray[np.floating], categories: Sequence[Category]) -> list[int]:
        """The labels of these categories that reach their thresholds, in the order of the rules."""
        found: list[int] = []
        for category in categories:
            places = self._places[category]
            found += places[probabilities[places] >= self.rules.thresholds[category]].tolist()
        if self.rules.by_probability:
            return sorted(found, key=lambda label: (-float(probabilities[label]), label))
        return found

    def _likeliest(self, probabilities: NDArray[np.floating], categories: Sequence[Category]) -> list[int]:
        places = [self._places[category] for category in categories]
        return [int(one[probabilities[one].argmax()]) for one in places if len(one)]


def plain(tag: str) -> str:
    """How tags are compared: underscores are spaces."""
    return tag.replace("_", " ").strip()


def without_underscores(tag: str) -> str:
    """A tag with spaces for underscores; the short ones are faces such as `^_^` and stay."""
    return tag.replace("_", " ") if len(tag) > _SHORT else tag


def _expanded(name: str) -> list[str]:
    """`name_(costume)_(series)` -> `name_(costume)`, `series`; others as they are."""
    found = re.fullmatch(r"(.+?)_?\(([^()]+)\)", name)
    return [found[1], found[2]] if found else [name]


def listed(text: str | None, separator: str) -> tuple[str, ...]:
    """The tags of a flag, split at the caption separator without its spaces."""
    return tuple(tag for raw in (text or "").split(separator.strip() or ",") if (tag := raw.strip()))


def replacements(text: str | None, where: str) -> tuple[Replacement, ...]:
    """The pairs of `from,to;from,to`; a backslash before `,`, `;` or another backslash makes it part of a tag.

    Raises:
        UserError: a piece is no pair of two tags.
    """
    found, problems = [], []
    for piece in _split(text or "", ";"):
        pair = [_unescaped(tag).strip() for tag in _split(piece, ",")]
        if pair == [""]:
            continue
        if len(pair) == 2 and all(pair):
            found.append((pair[0], pair[1]))
        else:
            wrong = f'"{piece.strip()}" isn\'t one tag, a comma, and what replaces it'
            problems.append(Problem(where, wrong, "write from,to;from,to with a backslash before commas within tags"))
    if problems:
        raise UserError(problems)
    return tuple(found)


def _split(text: str, at: str) -> list[str]:
    """The pieces between unescaped separators, escapes still in them."""
    pieces, start, position = [], 0, 0
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == at:
            pieces.append(text[start:position])
            start = position + 1
        position += 1
    return [*pieces, text[start:]]


def _unescaped(text: str) -> str:
    return re.sub(r"\\([,;\\])", r"\1", text)


def unknown(names: Iterable[str], labels: Sequence[Label], rules: Rules) -> list[str]:
    """Those of a user's tags that no label of the model is called, nor becomes by the rules."""
    known = {plain(label.name) for label in labels} | {plain(target) for _, target in rules.replacements}
    if rules.expand_characters:
        known |= {plain(part) for label in labels if label.category == "character" for part in _expanded(label.name)}
    return [name for name in names if plain(name) not in known]


def appended(text: str, tags: Sequence[str], separator: str) -> str:
    """A caption with the tags behind it that it lacks; each line of one with several lines gets them.

    Tags are told apart by the separator without its spaces, whatever their underscores.
    """
    lines = []
    for line in text.split("\n") if text else [""]:
        there = listed(line, separator)
        known = {plain(tag) for tag in there}
        lines.append(separator.join([*there, *(tag for tag in tags if plain(tag) not in known)]))
    return "\n".join(lines)
