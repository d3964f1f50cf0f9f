"""The caption of one sample: affixes, dropout, wildcards, arranged tags, templates. Pure: text in, text out.

Not here: reading caption files (data.sources.scan), tokens (library.tokenizer), words of an embedding (textual
inversion).

The order is that of sd-scripts, with three things mended. `keep_tokens_separator` never stays in a caption: where it
stands, the parts are joined as tags. Tags are joined by the separator that the user set (see `joiner`), not always by
", ". Prefix and suffix are added to the line that was chosen from a multi-line caption, not to its first and last line.

What is drawn, from a generator of (seed, epoch, key, repeat) and only where the option is on: whole-caption dropout,
the line, each wildcard from left to right, the order of the flexible tags, one number per flexible tag for dropping it.
The template is drawn from a generator of its own, and tags that a warmup holds back are drawn for all the same, so that
neither option changes what others draw.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from library.data.records import ImageRecord
from library.options.specs import CaptionSpec, DatasetSpec
from library.rng import rng

_OPEN, _CLOSE = "\x02", "\x03"
_WILDCARD = re.compile(r"\{([^}]+)\}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: optimizer steps done before the micro-batch that a sample is in, and steps of the whole run."""

    step: int
    total: int

    @classmethod
    def at(cls, epoch: int, index: int, *, batches: int, accumulation: int, total: int) -> "Progress | None":
        """That of micro-batch `index` (from 0) of an epoch (from 1) with so many; None where `total` is 0, unknown."""
        return cls((epoch - 1) * -(-batches // accumulation) + index // accumulation, total) if total else None


def joiner(separator: str) -> str:
    """What stands between joined tags: the separator and a space (", " for ","), or only itself if it has a space."""
    return separator if separator != separator.strip() else separator + " "


def process(
    text: str, spec: CaptionSpec, *, seed: int, epoch: int, key: str, repeat: int, progress: Progress | None = None
) -> str:
    """The caption that one sample is trained with; "" where it is dropped.

    Args:
        text: the raw caption; several lines are alternatives of which one is drawn (wildcards), else the first counts.
        spec: an empty `separator` splits nothing: the caption is one tag.
        epoch: counted from 1; `dropout_every_n_epochs` empties every caption of the epochs that it divides.
        key: the picture's path relative to its subset. With `repeat` and `epoch` it fixes every draw.
        progress: decides how many tags a warmup shows; None shows all.
    """
    if spec.dropout_every_n_epochs > 0 and epoch % spec.dropout_every_n_epochs == 0:
        return ""
    draws = rng(seed, "caption", epoch, key, repeat) if draws_anything(spec) else _NO_DRAWS
    if spec.dropout_rate > 0 and draws.random() < spec.dropout_rate:
        return ""
    text = _before_templates(text, spec, draws, progress)
    if not spec.templates:
        return text
    count = len(spec.templates)
    chosen = int(rng(seed, "caption", epoch, key, repeat, "template").integers(count)) if count > 1 else 0
    return _fill_template(spec.templates[chosen], text, spec)


def draws_anything(spec: CaptionSpec) -> bool:
    """Whether any caption of this recipe depends on a draw: if not, all samples of a picture at a step are equal."""
    return bool(
        spec.dropout_rate > 0 or spec.wildcards or spec.shuffle or spec.tag_dropout_rate > 0 or len(spec.templates) > 1
    )


def warmup_end(spec: CaptionSpec, total: int) -> float:
    """The step from which all tags are shown, in a run of `total` steps; 0 without a warmup."""
    return math.floor(spec.warmup_step * total) if spec.warmup_step < 1 else spec.warmup_step


def replaces(spec: CaptionSpec) -> bool:
    """Whether templates stand in place of captions: nothing that a picture's own caption says is trained."""
    return bool(spec.templates and spec.subject and not spec.keep_original)


def possible(text: str, spec: CaptionSpec, *, total: int | None = None) -> tuple[str, ...] | None:
    """Every caption that `process` may make of a text, whatever is drawn; None where wildcards, shuffled, dropped or
    held-back tags, or templates make more of them than are worth listing. Whole-caption dropout adds the empty one.

    `total` is the number of steps of the run, 0 where captions are made without `progress`; None: any number.
    """
    if spec.dropout_rate >= 1 or spec.dropout_every_n_epochs == 1:
        return ("",)
    if not replaces(spec) and _text_varies(text, spec, total):
        return None
    only = _before_templates(text, spec, _NO_DRAWS, None)
    filled = {_fill_template(template, only, spec) for template in spec.templates} or {only}
    if len(filled) > 1:
        return None
    (only,) = filled
    drops = spec.dropout_rate > 0 or spec.dropout_every_n_epochs > 0
    return (only, "") if drops and only else (only,)


def _before_templates(text: str, spec: CaptionSpec, draws: np.random.Generator, progress: Progress | None) -> str:
    lines = text.split("\n")
    text = lines[int(draws.integers(len(lines)))] if spec.wildcards and len(lines) > 1 else lines[0]
    text = _with_affixes(text, spec)
    if spec.wildcards:
        text = _fill_wildcards(text, draws)
    text = _arrange_tags(text, spec, draws, progress)
    if spec.secondary_separator:
        text = text.replace(spec.secondary_separator, spec.separator)
    return text


def _text_varies(text: str, spec: CaptionSpec, total: int | None) -> bool:
    """Whether the caption that templates are filled with does."""
    lines = text.split("\n")
    if spec.wildcards and any(line != lines[0] or _has_choice(_with_affixes(line, spec)) for line in lines):
        return True
    warms = spec.warmup_step > 0 and total != 0 and (total is None or warmup_end(spec, total) > 0)
    if spec.tag_dropout_rate >= 1 or not (spec.shuffle or spec.tag_dropout_rate > 0 or warms):
        return False
    flexible = _flexible_tags(_with_affixes(lines[0], spec), spec)
    return (
        (spec.shuffle and len(set(flexible)) > 1)
        or (spec.tag_dropout_rate > 0 and bool(flexible))
        or (warms and len(flexible) > spec.warmup_min)
    )


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
    if "{" not in text and "}" not in text:
        return text

    def choose(match: re.Match[str]) -> str:
        parts = match.group(1).split("|")
        return parts[int(draws.integers(len(parts)))]

    return _WILDCARD.sub(choose, _protected(text)).replace(_OPEN, "{").replace(_CLOSE, "}")


def _arrange_tags(text: str, spec: CaptionSpec, draws: np.random.Generator, progress: Progress | None) -> str:
    """Hold back, shuffle and drop the flexible tags; text without anything to arrange stays as the user wrote it.

    A warmup shows the first so many of them in the order of the text. Those that it holds back are shuffled and drawn
    for with the others, and then left out.
    """
    marked = _is_marked(text, spec)
    if not (spec.shuffle or spec.tag_dropout_rate > 0 or spec.warmup_step > 0 or marked):
        return text
    head, flexible, tail = _parts(text, spec, marked)
    shown = _shown(len(flexible), spec, progress)
    order = range(len(flexible))
    if spec.shuffle:
        order = draws.permutation(len(flexible)).tolist()
    keeps = [True] * len(flexible)
    if spec.tag_dropout_rate > 0:
        keeps = (draws.random(len(flexible)) >= spec.tag_dropout_rate).tolist()
    kept = [flexible[i] for i, keep in zip(order, keeps, strict=True) if keep and i < shown]
    return joiner(spec.separator).join([*head, *kept, *tail])


def _shown(flexible: int, spec: CaptionSpec, progress: Progress | None) -> int:
    """How many of the flexible tags a warmup shows."""
    if progress is None or spec.warmup_step <= 0:
        return flexible
    end = warmup_end(spec, progress.total)
    if progress.step >= end:
        return flexible
    return math.floor(progress.step * (flexible - spec.warmup_min) / end) + spec.warmup_min


def _fill_template(template: str, caption: str, spec: CaptionSpec) -> str:
    """A template with the subject in it, and the caption behind it if that is kept; without subject, with the caption
    in it. Where there is neither subject nor caption, the caption stays empty."""
    inside = spec.subject or caption
    if not inside:
        return ""
    before, _, after = template.partition("{}")
    filled = f"{before}{inside}{after}"
    return f"{filled}{joiner(spec.separator)}{caption}" if spec.keep_original and spec.subject and caption else filled


def _is_marked(text: str, spec: CaptionSpec) -> bool:
    return bool(spec.keep_tokens_separator) and spec.keep_tokens_separator in text


def _flexible_tags(text: str, spec: CaptionSpec) -> list[str]:
    """The tags that shuffling, tag dropout and warmup act on; wildcards without a choice are filled in."""
    if spec.wildcards:
        text = _fill_wildcards(text, _NO_DRAWS)
    return _parts(text, spec, _is_marked(text, spec))[1]


def _parts(text: str, spec: CaptionSpec, marked: bool) -> tuple[list[str], list[str], list[str]]:
    """Fixed first tags, flexible tags, fixed last tags."""
    if marked:
        first, flexible, *last = text.split(spec.keep_tokens_separator)
        return _tags(first, spec), _tags(flexible, spec), [tag for part in last for tag in _tags(part, spec)]
    tags = _split(text.strip(), spec)
    keep = max(0, spec.keep_tokens)
    return tags[:keep], tags[keep:], []


def _tags(text: str, spec: CaptionSpec) -> list[str]:
    return [tag for tag in _split(text, spec) if tag]


def _split(text: str, spec: CaptionSpec) -> list[str]:
    """The stripped tags of a text, empty ones too; the whole text where the separator is empty."""
    return [tag.strip() for tag in (text.split(spec.separator) if spec.separator else [text])]


_NO_DRAWS = rng(0, "caption")
"""For texts in which nothing is drawn, or only from one choice."""


def tag_frequency(records: Iterable[ImageRecord], specs: Sequence[DatasetSpec]) -> dict[str, dict[str, int]]:
    """How often each tag stands in the captions of each folder: {folder name: {tag: count}}, for `ss_tag_frequency`.

    Raw captions, split at commas, stripped, lower-cased; a picture counts once, whatever its repeats. A name (that of
    the metadata file or hub dataset, where there is one) that several datasets use is counted in the first only.
    """
    counts: dict[str, Counter[str]] = {}
    owner: dict[str, int] = {}
    names = {(i, j): subset.name for i, spec in enumerate(specs) for j, subset in enumerate(spec.subsets)}
    for record in records:
        folder = names[record.dataset, record.subset]
        if owner.setdefault(folder, record.dataset) != record.dataset:
            continue
        tags = (tag.strip().lower() for tag in record.caption.split(","))
        counts.setdefault(folder, Counter()).update(tag for tag in tags if tag)
    return {folder: dict(tags) for folder, tags in counts.items()}
