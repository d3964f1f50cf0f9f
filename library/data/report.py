"""The tables of a dry run, to stdout: pictures, captions, tokens, buckets, steps, saves, network.

Only shows what other modules found out. Lines about a run in progress go through library.console to stderr.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from library.data.buckets import Fit
from library.data.caption_plan import TextForecast, TextUse, forecast, plan_captions, size_text
from library.data.captions import process
from library.data.plan import Plan
from library.data.records import ImageRecord
from library.data.sources import Scan
from library.tokenizer import END_ID, WORDS, clip_tokenizer

_CAPTION_WIDTH = 90
Fragments = Callable[[str], Sequence[tuple[str, float]]]
"""A caption -> its pieces, which are tokenized one by one, and their weights."""


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


def show_data(
    scan: Scan,
    plan: Plan,
    *,
    seed: int,
    token_limit: int,
    fragments: Fragments | None = None,
    pad_id: int = END_ID,
    text: TextUse | None = None,
) -> None:
    """All tables about the data.

    Args:
        token_limit: `max_token_length` (75, 150 or 225).
        fragments: how captions are taken apart where they weigh words.
        pad_id: of the text encoder, which decides what a "!" counts.
        text: how the run gets its text conditioning; None leaves that table out.
    """
    pictures_table(scan)
    captions_table(plan, seed=seed)
    tokens_table(plan, seed=seed, limit=token_limit, fragments=fragments, pad_id=pad_id)
    if text is not None:
        text_table(forecast(plan_captions(plan), text, seed=seed))
    buckets_table(plan)


def pictures_table(scan: Scan) -> None:
    """One row per folder: pictures found, captioned, unreadable, samples an epoch; then the unreadable ones."""
    table = _table("Pictures", ("folder", "found", "captioned", "unreadable", "samples/epoch", "note"))
    for row in scan.counts:
        note = f"ignored: {row.ignored}" if row.ignored else "regularization" if row.is_reg else ""
        table.add_row(
            escape(str(row.folder)), *_numbers(row.found, row.captioned, row.unreadable, row.repeats), escape(note)
        )
    if len(scan.counts) > 1:
        sums = [
            sum(getattr(row, name) for row in scan.counts) for name in ("found", "captioned", "unreadable", "repeats")
        ]
        table.add_section()
        table.add_row("all", *_numbers(*sums), "")
    _print(table)
    for problem in scan.unreadable[:10]:
        line(f"unreadable: {problem}")
    if len(scan.unreadable) > 10:
        line(f"unreadable: {len(scan.unreadable) - 10} more")


def captions_table(plan: Plan, *, seed: int, examples: int = 3) -> None:
    """A few captions of each subset as the first epoch trains them."""
    table = _table("Caption examples, as trained in epoch 1", ("picture", "caption"))
    for record in _examples(plan.records, examples):
        text = _processed(plan, record, seed=seed, dropout=True)
        table.add_row(escape(record.key), escape(_shorten(text)) if text else "[dim](empty)[/dim]")
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


def tokens_table(
    plan: Plan, *, seed: int, limit: int, fragments: Fragments | None = None, pad_id: int = END_ID
) -> None:
    """Tokens per caption, and which words the limit cuts; arguments as of `count_tokens`."""
    counts = count_tokens(plan, seed=seed, limit=limit, fragments=fragments, pad_id=pad_id)
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
    table = _table("Buckets (width x height)", columns)
    for number, dataset in enumerate(plan.datasets):
        groups: dict[tuple[int, int], list[tuple[ImageRecord, Fit]]] = defaultdict(list)
        for record, fit in zip(dataset.records, dataset.fits, strict=True):
            groups[fit.bucket].append((record, fit))
        for bucket, samples in dataset.samples.items():
            members = groups[bucket]
            worst, fit = max(members, key=lambda pair: pair[1].cropped)
            table.add_row(
                f"{bucket[0]}x{bucket[1]}",
                *_numbers(len(members), len(samples), -(-len(samples) // plan.global_batch_size(number))),
                str(sum(fit.resized[0] > record.size[0] for record, fit in members)),
                f"{mean(fit.cropped for _, fit in members):.1%}",
                f"{fit.cropped:.1%}",
                escape(worst.key),
            )
        table.add_section()
    _print(table)


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


def count_tokens(
    plan: Plan, *, seed: int, limit: int, fragments: Fragments | None = None, pad_id: int = END_ID
) -> TokenCounts:
    """Tokens of every picture's caption as processed for the first showing, caption dropout aside.

    With `fragments`, those of the pieces that it makes of a caption, without the signs of weights. `pad_id` is that of
    the text encoder: it decides what a "!" counts.
    """
    texts = [_processed(plan, record, seed=seed, dropout=False) for record in plan.records]
    pieces = {text: [piece for piece, _ in fragments(text)] if fragments else [text] for text in texts}
    unique = list(dict.fromkeys(piece for some in pieces.values() for piece in some))
    encodings = dict(zip(unique, clip_tokenizer(pad_id).encode_batch(unique, add_special_tokens=False), strict=True))
    counted = {text: _cut([(piece, encodings[piece]) for piece in some], limit) for text, some in pieces.items()}
    lengths = [counted[text][0] for text in texts] or [0]
    cut = [
        CutCaption(record.key, *counted[text])
        for record, text in zip(plan.records, texts, strict=True)
        if counted[text][0] > limit
    ]
    over = sum(length > WORDS for length in lengths)
    return TokenCounts(min(lengths), float(median(lengths)), max(lengths), over, tuple(cut))


def _cut(pieces: Sequence[tuple[str, Any]], limit: int) -> tuple[int, str]:
    """Tokens of all pieces together, and the text from the first token on that is beyond `limit`."""
    tokens, rest = 0, ""
    for text, encoding in pieces:
        start = limit - tokens
        tokens += len(encoding.ids)
        if start <= 0:
            rest += text
        elif tokens > limit:
            rest = text[encoding.offsets[start][0] :]
    return tokens, rest if tokens > limit else ""


def _processed(plan: Plan, record: ImageRecord, *, seed: int, dropout: bool) -> str:
    spec = plan.datasets[record.dataset].spec.subsets[record.subset].caption
    if not dropout:
        spec = replace(spec, dropout_rate=0.0, dropout_every_n_epochs=0)
    return process(record.caption, spec, seed=seed, epoch=1, key=record.key, repeat=0)


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
        words = column in (
            "folder",
            "note",
            "picture",
            "caption",
            "what",
            "when",
            "name",
            "part",
            "rank (alpha)",
            "bucket",
        )
        table.add_column(column, justify="left" if words else "right", overflow="fold")
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
