"""The tables of a dry run, to stdout: pictures, captions, tokens, buckets, steps, saves, network.

Only shows what other modules found out. Lines about a run in progress go through library.console to stderr.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from library.data.buckets import Fit
from library.data.caption_plan import TextForecast, TextUse, forecast, plan_captions, size_text
from library.data.captions import process
from library.data.plan import Plan
from library.data.records import ImageRecord
from library.data.sources.scan import Scan, SubsetCounts
from library.data.token_counts import Fragments, count_tokens
from library.data.token_use import TokenUse, token_use
from library.options.specs import DatasetSpec
from library.tokenizer import END_ID, WORDS
from library.tokenizer.vocabulary import PLAIN, Vocabulary

_CAPTION_WIDTH = 90
_SHOWN = 10
_WORST = 5
_WORDS = frozenset(
    {
        *("dataset", "folder", "note", "picture", "size", "bucket", "caption"),
        *("what", "when", "name", "part", "rank (alpha)", "token"),
    }
)
"""Columns that hold words, not numbers."""


def show_data(
    scan: Scan,
    plan: Plan,
    *,
    seed: int,
    token_limit: int,
    fragments: Fragments | None = None,
    pad_id: int = END_ID,
    vocabulary: Vocabulary = PLAIN,
    text: TextUse | None = None,
    accumulation: int = 1,
    total_steps: int = 0,
) -> None:
    """All tables about the data.

    Args:
        token_limit: `max_token_length` (75, 150 or 225).
        fragments: how captions are taken apart where they weigh words.
        pad_id: of the text encoder, which decides what a "!" counts.
        vocabulary: new tokens, trained or frozen, each of which counts all of its vectors.
        text: how the run gets its text conditioning; None leaves that table out.
        accumulation: micro-batches in an optimizer step; with `total_steps`, what a token warmup goes by.
        total_steps: of the run; 0 where they aren't known.
    """
    pictures_table(scan, [dataset.spec for dataset in plan.datasets])
    captions_table(plan, seed=seed)
    if vocabulary.tokens:
        use = token_use(plan, vocabulary, seed, limit=token_limit, fragments=fragments, pad_id=pad_id)
        token_use_table(use)
    tokens_table(plan, seed=seed, limit=token_limit, fragments=fragments, pad_id=pad_id, vocabulary=vocabulary)
    if text is not None:
        captions = plan_captions(plan, total_steps=total_steps or None)
        text_table(forecast(captions, text, seed=seed, accumulation=accumulation, total_steps=total_steps))
    buckets_table(plan)
    crops_table(plan)


def pictures_table(scan: Scan, specs: Sequence[DatasetSpec] = ()) -> None:
    """One row per subset: pictures found, captioned, unreadable, samples an epoch; then the unreadable ones.

    Masks and held-out pictures have a column where there are any, and so has the dataset where there are several;
    `specs` tell their sizes, and whether alpha channels are masks.
    """
    masks = Counter((record.dataset, record.subset) for record in (*scan.records, *scan.held_out) if record.mask)
    labels = _labels(specs or [None] * (1 + max((row.dataset for row in scan.counts), default=0)))
    counted = {"found": [row.found for row in scan.counts], "captioned": [row.captioned for row in scan.counts]}
    if masks:
        counted["masks"] = [masks[row.dataset, row.subset] for row in scan.counts]
    if scan.held_out:
        counted["held out"] = [row.held_out for row in scan.counts]
    counted["unreadable"] = [row.unreadable for row in scan.counts]
    counted["samples/epoch"] = [row.repeats for row in scan.counts]
    first = ("dataset", "folder") if labels else ("folder",)
    table = _table("Pictures", (*first, *counted, "note"))
    for number, row in enumerate(scan.counts):
        named = escape(row.name or str(row.folder))
        table.add_row(
            *([labels[row.dataset], named] if labels else [named]),
            *_numbers(*(column[number] for column in counted.values())),
            escape(_note(row, specs)),
        )
    if len(scan.counts) > 1:
        table.add_section()
        table.add_row(*["all", ""][: len(first)], *_numbers(*map(sum, counted.values())), "")
    _print(table)
    for problem in scan.unreadable[:_SHOWN]:
        line(f"unreadable: {problem}")
    if len(scan.unreadable) > _SHOWN:
        line(f"unreadable: {len(scan.unreadable) - _SHOWN} more")


def _note(row: SubsetCounts, specs: Sequence[DatasetSpec]) -> str:
    if row.ignored:
        return f"ignored: {row.ignored}"
    notes = ["regularization"] if row.is_reg else []
    if specs and specs[row.dataset].subsets[row.subset].alpha_mask:
        notes.append("alpha channels are masks")
    return ", ".join(notes)


def _labels(specs: Sequence[DatasetSpec | None]) -> list[str]:
    """What each of several datasets is called: its number and its size; nothing where there is only one."""
    if len(specs) < 2:
        return []
    return [str(number) if spec is None else f"{number}: {_size(spec)}" for number, spec in enumerate(specs, 1)]


def _size(spec: DatasetSpec) -> str:
    target = spec.aspect_buckets and spec.aspect_buckets.target
    return _by((target, target) if target else spec.resolution)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def captions_table(plan: Plan, *, seed: int, examples: int = 3) -> None:
    """A few captions of each subset as the first epoch trains them, with all tags where a warmup adds them later."""
    specs = [dataset.spec for dataset in plan.datasets]
    labels = _labels(specs)
    warms = any(subset.caption.warmup_step > 0 for spec in specs for subset in spec.subsets)
    title = "Caption examples of epoch 1, token warmup aside" if warms else "Caption examples, as trained in epoch 1"
    table = _table(title, ("dataset", "picture", "caption") if labels else ("picture", "caption"))
    for record in _examples(plan.records, examples):
        recipe = specs[record.dataset].subsets[record.subset].caption
        text = process(record.caption, recipe, seed=seed, epoch=1, key=record.key, repeat=0)
        shown = escape(_shorten(text)) if text else "[dim](empty)[/dim]"
        table.add_row(*([labels[record.dataset]] if labels else []), escape(record.key), shown)
    _print(table)


def text_table(found: TextForecast) -> None:
    """How many captions an epoch has, how large they are once encoded, whether the memo holds them, what happens."""
    size = found.use.caption_bytes
    columns = (
        "distinct captions",
        "encoded ahead",
        "through the memo",
        "size of one",
        "memo needs",
        "memo holds",
        "fits",
    )
    table = _table(f"Text, epoch {found.epoch}", columns)
    counts = _numbers(len(found.distinct), len(found.kept), len(found.memo))
    memo = [size_text(len(found.memo) * size), size_text(found.use.memo_bytes), "yes" if found.fits else "no"]
    table.add_row(*counts, size_text(size), *(["-"] * 3 if found.use.trains else memo))
    _print(table)
    line(found.line())


def token_use_table(use: TokenUse) -> None:
    """How many captions hold each new token; a last row counts those that hold none."""
    table = _table("New tokens in captions", ("token", "vectors", "captions with it", "of"))
    for token in use.vocabulary.tokens:
        table.add_row(escape(token.text), *_numbers(token.vectors, use.count(token), use.captions))
    without = sum(one.captions for one in use.without(use.vocabulary.tokens))
    if without:
        table.add_row("(none of them)", "", *_numbers(without, use.captions))
    _print(table)


def tokens_table(
    plan: Plan,
    *,
    seed: int,
    limit: int,
    fragments: Fragments | None = None,
    pad_id: int = END_ID,
    vocabulary: Vocabulary = PLAIN,
) -> None:
    """Tokens per caption, and which words the limit cuts; arguments as of `count_tokens`."""
    counts = count_tokens(plan, seed=seed, limit=limit, fragments=fragments, pad_id=pad_id, vocabulary=vocabulary)
    table = _table("Tokens per caption", ("least", "median", "most", f"over {WORDS}", f"cut at {limit}"))
    middle = f"{counts.median:g}"
    table.add_row(str(counts.minimum), middle, *_numbers(counts.maximum, counts.over_chunk, len(counts.cut)))
    _print(table)
    for cut in counts.cut[:5]:
        line(f"{cut.picture}: {cut.tokens} tokens, cut from: {_shorten(cut.cut)}")
    if len(counts.cut) > 5:
        line(f"and {len(counts.cut) - 5} more captions")


def buckets_table(plan: Plan) -> None:
    """One row per bucket: pictures, samples, batches, how many pictures are enlarged, how much is cropped away."""
    columns = ("bucket", "pictures", "samples", "batches", "enlarged", "cropped: mean", "worst", "picture")
    labels = _labels([dataset.spec for dataset in plan.datasets])
    table = _table("Buckets (width x height)", ("dataset", *columns) if labels else columns)
    for number, dataset in enumerate(plan.datasets):
        groups: dict[tuple[int, int], list[tuple[ImageRecord, Fit]]] = defaultdict(list)
        for record, fit in zip(dataset.records, dataset.fits, strict=True):
            groups[fit.bucket].append((record, fit))
        for bucket in sorted(groups):
            members = groups[bucket]
            worst, fit = max(members, key=lambda pair: pair[1].cropped)
            samples = sum(record.repeats for record, _ in members)
            table.add_row(
                *([labels[number]] if labels else []),
                _by(bucket),
                *_numbers(len(members), samples, -(-samples // plan.global_batch_size(number))),
                str(sum(fit.resized[0] > record.size[0] for record, fit in members)),
                f"{fmean(fit.cropped for _, fit in members):.1%}",
                f"{fit.cropped:.1%}",
                escape(worst.key),
            )
        table.add_section()
    _print(table)


def crops_table(plan: Plan) -> None:
    """The pictures that lose most to cropping, the worst first; nothing where none loses as much as 0.1 %."""
    worst = [
        pair for pair in nlargest(_WORST, _crops(plan), key=lambda pair: pair[1].cropped) if pair[1].cropped >= 0.001
    ]
    if not worst:
        return
    table = _table("Most cropped pictures", ("picture", "size", "bucket", "cropped"))
    for record, fit in worst:
        table.add_row(escape(record.key), _by(record.size), _by(fit.bucket), f"{fit.cropped:.1%}")
    _print(table)


def cropped_too_much(plan: Plan, limit: float) -> list[str]:
    """One line for each picture of which more than the fraction `limit` is cropped away, the worst first: ten, then how
    many more there are."""
    found = [pair for pair in _crops(plan) if pair[1].cropped > limit]
    lines = [
        f"{record.path}: {fit.cropped:.1%} is cropped away ({_by(record.size)} into {_by(fit.bucket)}), "
        f"more than {limit:.4g} (max_crop_loss)"
        for record, fit in nlargest(_SHOWN, found, key=lambda pair: pair[1].cropped)
    ]
    if len(found) > _SHOWN:
        lines.append(f"{len(found) - _SHOWN:,} more pictures lose more than {limit:.4g} (max_crop_loss)")
    return lines


def _crops(plan: Plan) -> Iterator[tuple[ImageRecord, Fit]]:
    for dataset in plan.datasets:
        yield from zip(dataset.records, dataset.fits, strict=True)


def steps_table(
    *, samples: int, batches: int, accumulation: int, updates_per_epoch: int, epochs: int, steps: int, global_batch: str
) -> None:
    """How long the run is: samples and micro-batches an epoch, optimizer steps an epoch and in all."""
    columns = ("samples/epoch", "batch", "batches/epoch", "accumulation", "steps/epoch", "epochs", "steps")
    table = _table("Steps", columns)
    values = _numbers(batches, accumulation, updates_per_epoch, epochs, steps)
    table.add_row(f"{samples:,}", escape(global_batch), *values)
    _print(table)


def saves_table(rows: Sequence[tuple[str, str, str]]) -> None:
    """What is written when, and under which name: (what, when, name)."""
    table = _table("Saved", ("what", "when", "name"))
    for row in rows:
        table.add_row(*map(escape, row))
    _print(table)


@dataclass(frozen=True)
class NetworkRow:
    """A trained part of a network; None where only making it would tell. `size` is that in the file, in bytes."""

    part: str
    modules: int | None = None
    rank: str = "-"
    parameters: int | None = None
    size: float | None = None


def network_table(rows: Sequence[NetworkRow]) -> None:
    """The network by part."""
    table = _table("Network", ("part", "modules", "rank (alpha)", "parameters", "size"))
    for row in rows:
        numbers = ("-" if number is None else f"{number:,}" for number in (row.modules, row.parameters))
        modules, parameters = numbers
        size = "-" if row.size is None else size_text(row.size)
        table.add_row(escape(row.part), modules, escape(row.rank), parameters, size)
    _print(table)


def _examples(records: Sequence[ImageRecord], number: int) -> list[ImageRecord]:
    """The first few records of each subset."""
    taken: dict[tuple[int, int], int] = defaultdict(int)
    chosen = []
    for record in records:
        taken[record.dataset, record.subset] += 1
        if taken[record.dataset, record.subset] <= number:
            chosen.append(record)
    return chosen


def _shorten(text: str) -> str:
    return text if len(text) <= 2 * _CAPTION_WIDTH else text[: 2 * _CAPTION_WIDTH - 3] + "..."


def _numbers(*values: int) -> list[str]:
    return [f"{value:,}" for value in values]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right", overflow="fold")
    return table


def _console() -> Console:
    """Stdout; 120 columns where it is no terminal, so that a file or a pipe gets whole rows."""
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, highlight=False, width=None if terminal else 120, soft_wrap=False)


def _print(table: Table) -> None:
    _console().print(table)


def line(text: str) -> None:
    """One line between the tables."""
    _console().print(text, markup=False, soft_wrap=True)
