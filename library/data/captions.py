"""The caption of one sample: affixes, dropout, wildcards, shuffled and dropped tags. Pure: text in, text out.

Not here: reading caption files (data.sources), tokens (library.tokenizer), words of an embedding (textual inversion).

The order is that of sd-scripts, with three things mended. `keep_tokens_separator` never stays in a caption: where it
stands, the parts are joined as tags. Tags are joined by the separator that the user set (see `joiner`), not always by
", ". Prefix and suffix are added to the line that was chosen from a multi-line caption, not to its first and last line.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from library.data.records import ImageRecord
from library.options.specs import CaptionSpec, DatasetSpec
from library.rng import rng

_OPEN, _CLOSE = "\x02", "\x03"
_WILDCARD = re.compile(r"\{([^}]+)\}")


def joiner(separator: str) -> str:
    """What stands between joined tags: the separator and a space (", " for ","), or only itself if it has a space."""
    return separator if separator != separator.strip() else separator + " "


def process(text: str, spec: CaptionSpec, *, seed: int, epoch: int, key: str, repeat: int) -> str:
    """The caption that one sample is trained with.

    Args:
        text: the raw caption; several lines are alternatives of which one is drawn (wildcards), else the first counts.
        epoch: counted from 1; `dropout_every_n_epochs` empties every caption of the epochs that it divides.
        key: the picture's path relative to its subset. With `repeat` and `epoch` it fixes every draw.
    """
    draws = rng(seed, "caption", epoch, key, repeat)
    if spec.dropout_rate > 0 and draws.random() < spec.dropout_rate:
        return ""
    if spec.dropout_every_n_epochs > 0 and epoch % spec.dropout_every_n_epochs == 0:
        return ""
    lines = text.split("\n")
    text = lines[int(draws.integers(len(lines)))] if spec.wildcards and len(lines) > 1 else lines[0]
    text = _with_affixes(text, spec)
    if spec.wildcards:
        text = _fill_wildcards(text, draws)
    text = _arrange_tags(text, spec, draws)
    if spec.secondary_separator:
        text = text.replace(spec.secondary_separator, spec.separator)
    return text


def possible(text: str, spec: CaptionSpec) -> tuple[str, ...] | None:
    """Every caption that `process` may make of a text, whatever is drawn; None where wildcards, shuffling or dropped
    tags make more of them than are worth listing. Whole-caption dropout adds the empty one."""
    if spec.dropout_rate >= 1 or spec.dropout_every_n_epochs == 1:
        return ("",)
    lines = text.split("\n")
    if spec.wildcards and any(line != lines[0] or _has_choice(_with_affixes(line, spec)) for line in lines):
        return None
    flexible = _flexible_tags(_with_affixes(lines[0], spec), spec)
    if (spec.shuffle and len(set(flexible)) > 1) or (0 < spec.tag_dropout_rate < 1 and flexible):
        return None
    plain = replace(spec, dropout_rate=0.0, dropout_every_n_epochs=0)
    only = process(text, plain, seed=0, epoch=1, key="", repeat=0)
    drops = spec.dropout_rate > 0 or spec.dropout_every_n_epochs > 0
    return (only, "") if drops and only else (only,)


def _with_affixes(text: str, spec: CaptionSpec) -> str:
    if spec.prefix:
        text = f"{spec.prefix} {text}"
    return f"{text} {spec.suffix}" if spec.suffix else text


def _protected(text: str) -> str:
    """The text with stand-ins for literal braces."""
    return text.replace("{{", _OPEN).replace("}}", _CLOSE)


def _has_choice(text: str) -> bool:
    return any(len(set(match[1].split("|"))) > 1 for match in _WILDCARD.finditer(_protected(text)))


def _fill_wildcards(text: str, draws: np.random.Generator) -> str:
    """Each `{a|b}` becomes one of its parts; `{{` and `}}` become literal braces."""

    def choose(match: re.Match[str]) -> str:
        parts = match.group(1).split("|")
        return parts[int(draws.integers(len(parts)))]

    return _WILDCARD.sub(choose, _protected(text)).replace(_OPEN, "{").replace(_CLOSE, "}")


def _arrange_tags(text: str, spec: CaptionSpec, draws: np.random.Generator) -> str:
    """Shuffle and drop the flexible tags; text without anything to arrange stays as the user wrote it."""
    marked = _is_marked(text, spec)
    if not (spec.shuffle or spec.tag_dropout_rate > 0 or marked):
        return text
    head, flexible, tail = _parts(text, spec, marked)
    if spec.shuffle:
        flexible = [flexible[i] for i in draws.permutation(len(flexible))]
    if spec.tag_dropout_rate > 0:
        kept = draws.random(len(flexible)) >= spec.tag_dropout_rate
        flexible = [tag for tag, keep in zip(flexible, kept, strict=True) if keep]
    return joiner(spec.separator).join([*head, *flexible, *tail])


def _is_marked(text: str, spec: CaptionSpec) -> bool:
    return bool(spec.keep_tokens_separator) and spec.keep_tokens_separator in text


def _flexible_tags(text: str, spec: CaptionSpec) -> list[str]:
    """The tags that shuffling and tag dropout act on; wildcards without a choice are filled in."""
    if spec.wildcards:
        text = _fill_wildcards(text, rng(0, "caption"))
    return _parts(text, spec, _is_marked(text, spec))[1]


def _parts(text: str, spec: CaptionSpec, marked: bool) -> tuple[list[str], list[str], list[str]]:
    """Fixed first tags, flexible tags, fixed last tags."""
    if marked:
        first, flexible, *last = text.split(spec.keep_tokens_separator)
        return _tags(first, spec), _tags(flexible, spec), [tag for part in last for tag in _tags(part, spec)]
    tags = [tag.strip() for tag in text.strip().split(spec.separator)]
    keep = max(0, spec.keep_tokens)
    return tags[:keep], tags[keep:], []


def _tags(text: str, spec: CaptionSpec) -> list[str]:
    return [tag.strip() for tag in text.split(spec.separator) if tag.strip()]


def tag_frequency(records: Iterable[ImageRecord], specs: Sequence[DatasetSpec]) -> dict[str, dict[str, int]]:
    """How often each tag stands in the captions of each folder: {folder name: {tag: count}}, for `ss_tag_frequency`.

    Raw captions, split at commas, stripped, lower-cased; a picture counts once, whatever its repeats. A folder name
    that several datasets use is counted in the first of them only.
    """
    counts: dict[str, Counter[str]] = {}
    owner: dict[str, int] = {}
    for record in records:
        folder = specs[record.dataset].subsets[record.subset].image_dir.resolve().name
        if owner.setdefault(folder, record.dataset) != record.dataset:
            continue
        tags = (tag.strip().lower() for tag in record.caption.split(","))
        counts.setdefault(folder, Counter()).update(tag for tag in tags if tag)
    return {folder: dict(tags) for folder, tags in counts.items()}
