"""Which captions a run trains with: those that are known before it starts, and how many an epoch has.

Captions are pure functions of (seed, epoch, picture, repeat), so all of this is known without a model. How a caption
is made: data.captions. How its text conditioning is kept: data.text_cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.data.captions import possible, process
from library.data.plan import Plan
from library.data.records import ImageRecord
from library.options.specs import CaptionSpec


@dataclass(frozen=True)
class CaptionPlan:
    """The captions of a plan.

    Attributes:
        fixed: a picture's path and its caption, of pictures whose caption is always the same or empty.
        may_be_empty: some caption is dropped now and then.
        varying: indexes in `Plan.records` of the pictures whose caption varies otherwise.
    """

    plan: Plan
    fixed: tuple[tuple[Path, str], ...]
    may_be_empty: bool
    varying: tuple[int, ...]

    @cached_property
    def known(self) -> tuple[str, ...]:
        """Every caption that can be encoded ahead, each once; with nothing `varying`, that is all a run trains with."""
        return tuple(dict.fromkeys([caption for _, caption in self.fixed] + [""] * self.may_be_empty))

    def of_epoch(self, seed: int, epoch: int) -> tuple[str, ...]:
        """The distinct captions of an epoch (counted from 1), in the order of pictures and repeats."""
        plan = self.plan
        found: dict[str, None] = {}
        for record in plan.records:
            spec = _spec(plan, record)
            for repeat in range(record.repeats):
                found[process(record.caption, spec, seed=seed, epoch=epoch, key=record.key, repeat=repeat)] = None
                if _same_for_all_repeats(spec):
                    break
        return tuple(found)


def plan_captions(plan: Plan) -> CaptionPlan:
    """Sort a plan's pictures into those whose captions are known ahead and those whose captions vary."""
    fixed: dict[tuple[Path, str], None] = {}
    may_be_empty = False
    varying = []
    for index, record in enumerate(plan.records):
        spec = _spec(plan, record)
        captions = possible(record.caption, spec)
        if captions is None:
            varying.append(index)
            may_be_empty |= spec.dropout_rate > 0 or spec.dropout_every_n_epochs > 0
            continue
        may_be_empty |= "" in captions[1:]
        fixed[record.path, captions[0]] = None
    return CaptionPlan(plan, tuple(fixed), may_be_empty, tuple(varying))


def _spec(plan: Plan, record: ImageRecord) -> CaptionSpec:
    return plan.datasets[record.dataset].spec.subsets[record.subset].caption


def _same_for_all_repeats(spec: CaptionSpec) -> bool:
    """Nothing in the caption is drawn."""
    return not (spec.dropout_rate or spec.wildcards or spec.shuffle or spec.tag_dropout_rate)


@dataclass(frozen=True)
class TextUse:
    """How a run gets its text conditioning.

    Attributes:
        caption_bytes: size of one caption's conditioning in memory.
        memo_bytes: how much of it is kept.
        trains: a text encoder is trained, so that nothing is kept.
        ahead: captions that are known are encoded before training.
        to_disk: and kept in files beside the pictures.
    """

    caption_bytes: int
    memo_bytes: int
    trains: bool = False
    ahead: bool = False
    to_disk: bool = False


@dataclass(frozen=True)
class TextForecast:
    """What becomes of the captions of an epoch.

    Attributes:
        distinct: the epoch's captions, each once.
        kept: captions that are encoded before training.
        memo: those of `distinct` that are encoded when they come, and go through the memo.
        all_known: no caption of the run varies.
    """

    use: TextUse
    epoch: int
    distinct: tuple[str, ...]
    kept: tuple[str, ...]
    memo: tuple[str, ...]
    all_known: bool

    @property
    def fits(self) -> bool:
        """The memo holds all that go through it at once, so that none is encoded twice in the epoch."""
        return len(self.memo) <= 1 or len(self.memo) * self.use.caption_bytes <= self.use.memo_bytes

    @property
    def frees_encoders(self) -> bool:
        """After `kept` are encoded, training needs no text encoder."""
        return self.use.ahead and not self.use.trains and self.all_known

    def line(self) -> str:
        """The same in one line for the user."""
        if self.use.trains:
            return "text: an encoder is trained, so every caption is encoded in every step"
        parts = []
        if self.kept:
            where = "files beside the pictures" if self.use.to_disk else "memory"
            parts.append(f"{_captions(self.kept)} encoded before training, kept in {where}")
        if self.memo:
            which = f"{_captions(self.memo)} of epoch {self.epoch}{' that vary' * self.use.ahead}"
            memo = f"the memo of {size_text(self.use.memo_bytes)} (--text_memo_mb)"
            if self.fits:
                parts.append(f"{which} encoded when first needed, kept in {memo}, where all fit")
            else:
                needed = size_text(len(self.memo) * self.use.caption_bytes)
                parts.append(f"{which} need {needed}, more than {memo}, so some are encoded again")
        if self.frees_encoders:
            parts.append("then the text encoders are released")
        return f"text: {'; '.join(parts)}"


def forecast(captions: CaptionPlan, use: TextUse, *, seed: int, epoch: int = 1) -> TextForecast:
    """What becomes of the captions of one epoch, counted from 1."""
    distinct = captions.of_epoch(seed, epoch)
    kept = captions.known if use.ahead and not use.trains else ()
    memo = () if use.trains else tuple(sorted(set(distinct) - set(kept)))
    return TextForecast(use, epoch, distinct, kept, memo, not captions.varying)


def _captions(texts: Sequence[str]) -> str:
    return f"{len(texts):,} caption{'s' * (len(texts) != 1)}"


def size_text(count: float) -> str:
    """Bytes in KiB or MiB."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
