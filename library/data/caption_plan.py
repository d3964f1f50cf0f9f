"""Which captions a run trains with: those that are known before it starts, and how many an epoch has.

Captions are pure functions of (seed, epoch, picture, repeat), so all of this is known without a model. How a caption
is made: data.captions. How its text conditioning is kept: data.caches.text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.data.captions import Progress, draws_anything, possible, process, warmup_end
from library.data.plan import Plan
from library.data.records import ImageRecord
from library.options.specs import CaptionSpec


@dataclass(frozen=True)
class CaptionPlan:
    """The captions of a plan.

    Attributes:
        steady: pictures whose caption is always the same or empty: index in `Plan.records`, and the caption.
        may_be_empty: some caption is dropped now and then.
        varying: indexes in `Plan.records` of the pictures whose caption varies otherwise.
    """

    plan: Plan
    steady: tuple[tuple[int, str], ...]
    may_be_empty: bool
    varying: tuple[int, ...]

    @cached_property
    def fixed(self) -> tuple[tuple[Path, str], ...]:
        """The paths of the `steady` pictures with their captions, each pair once."""
        records = self.plan.records
        return tuple(dict.fromkeys((records[index].path, caption) for index, caption in self.steady))

    @cached_property
    def known(self) -> tuple[str, ...]:
        """Every caption that can be encoded ahead, each once; with nothing `varying`, that is all a run trains with."""
        return tuple(dict.fromkeys([caption for _, caption in self.steady] + [""] * self.may_be_empty))

    def of_epoch(self, seed: int, epoch: int, *, accumulation: int = 1, total_steps: int = 0) -> tuple[str, ...]:
        """The distinct captions of an epoch (counted from 1), in the order of pictures and repeats.

        `accumulation` is micro-batches in an optimizer step, `total_steps` the steps of the run: a token warmup goes
        by them. With 0 steps, captions are those after a warmup.
        """
        plan = self.plan
        moments = self._moments(seed, epoch, accumulation, total_steps)
        found: dict[str, None] = {}
        for index, record in enumerate(plan.records):
            spec = _spec(plan, record)
            warms = bool(moments) and spec.warmup_step > 0
            for repeat in range(record.repeats if warms or draws_anything(spec) else min(1, record.repeats)):
                progress = moments[index, repeat] if warms else None
                made = process(
                    record.caption, spec, seed=seed, epoch=epoch, key=record.key, repeat=repeat, progress=progress
                )
                found[made] = None
        return tuple(found)

    def _moments(self, seed: int, epoch: int, accumulation: int, total: int) -> dict[tuple[int, int], Progress | None]:
        """The progress at each (record, repeat) of an epoch; empty where all tags are shown from its start on."""
        batches = self.plan.batches_per_epoch
        start = Progress.at(epoch, 0, batches=batches, accumulation=accumulation, total=total)
        specs = [subset.caption for dataset in self.plan.datasets for subset in dataset.spec.subsets]
        if start is None or all(start.step >= warmup_end(spec, total) for spec in specs):
            return {}
        return {
            (sample.record, sample.repeat): Progress.at(
                epoch, index, batches=batches, accumulation=accumulation, total=total
            )
            for index, batch in enumerate(self.plan.epoch(seed, epoch))
            for sample in batch.samples
        }


def plan_captions(plan: Plan, *, total_steps: int | None = None) -> CaptionPlan:
    """Sort a plan's pictures into those whose captions are known ahead and those whose captions vary.

    `total_steps` of the run decides whether a token warmup is over before it starts; None: it may last.
    """
    steady = []
    may_be_empty = False
    varying = []
    for index, record in enumerate(plan.records):
        spec = _spec(plan, record)
        captions = possible(record.caption, spec, total=total_steps)
        if captions is None:
            varying.append(index)
            may_be_empty |= spec.dropout_rate > 0 or spec.dropout_every_n_epochs > 0
            continue
        may_be_empty |= "" in captions[1:]
        steady.append((index, captions[0]))
    return CaptionPlan(plan, tuple(steady), may_be_empty, tuple(varying))


def _spec(plan: Plan, record: ImageRecord) -> CaptionSpec:
    return plan.datasets[record.dataset].spec.subsets[record.subset].caption


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
            return "text: text encoders or new tokens are trained, so every caption is encoded in every step"
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


def forecast(
    captions: CaptionPlan, use: TextUse, *, seed: int, epoch: int = 1, accumulation: int = 1, total_steps: int = 0
) -> TextForecast:
    """What becomes of the captions of one epoch, counted from 1; arguments as of `CaptionPlan.of_epoch`."""
    distinct = captions.of_epoch(seed, epoch, accumulation=accumulation, total_steps=total_steps)
    kept = captions.known if use.ahead and not use.trains else ()
    memo = () if use.trains else tuple(sorted(set(distinct) - set(kept)))
    return TextForecast(use, epoch, distinct, kept, memo, not captions.varying)


def _captions(texts: Sequence[str]) -> str:
    return f"{len(texts):,} caption{'s' * (len(texts) != 1)}"


def size_text(count: float) -> str:
    """Bytes in KiB or MiB."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
