r"""Captions with weights in brackets: `(word)` counts 1.1 times, `[word]` 1/1.1, `(word:1.5)` 1.5; brackets nest.

A backslash makes the bracket or backslash behind it plain text; before anything else it is dropped. A bracket that is
never closed reaches to the end. Torch-free.
"""

import re
from itertools import groupby

_STEP = 1.1
_TOKEN = re.compile(
    r"(?P<escape>\\)(?P<plain>[()\[\]\\]?)|(?P<open>[(\[])|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)|(?P<close>[)\]])|.",
    re.DOTALL,
)
_CLOSES = {")": "(", "]": "["}
_FACTOR = {"(": _STEP, "[": 1 / _STEP}


def fragments(caption: str) -> list[tuple[str, float]]:
    """The caption without its brackets, in pieces of one weight each; neighbours differ in weight."""
    letters: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for found in _TOKEN.finditer(caption):
        bracket = found["open"] or _CLOSES.get(found["close"] or "")
        if found["open"]:
            opened[found["open"]].append(len(letters))
        elif found["weight"] and opened["("]:
            multiply(opened["("].pop(), float(found["weight"]))
        elif bracket and opened[bracket]:
            multiply(opened[bracket].pop(), _FACTOR[bracket])
        else:
            text = found["plain"] if found["escape"] else found[0]
            letters.extend(text)
            weights.extend([1.0] * len(text))
    for bracket, starts in opened.items():
        for start in starts:
            multiply(start, _FACTOR[bracket])
    pairs = groupby(zip(letters, weights, strict=True), key=lambda pair: pair[1])
    return [("".join(letter for letter, _ in group), weight) for weight, group in pairs]
