"""Which latent files a plan wants: one slot for each picture and fit, the file of each, and whether it still fits.

Imports no torch. What fills the slots is data.caches.latents; what a file holds is data.caches.latent_files'.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import cast

from library import console
from library.data.caches import latent_files
from library.data.caches.latent_files import ALPHA, USABLE, Sampling, Trust, Verdict, Wanted
from library.data.caches.verified import Verified, in_order
from library.data.plan import Plan
from library.data.records import ImageRecord
from library.errors import Problem, UserError
from library.options.specs import SubsetSpec

_MOVING = (
    ("random_crop", "random_crop can't be used with cached latents"),
    ("color_aug", "color_aug can't be used with cached latents"),
    ("face_crop_aug_range", "face_crop_aug_range can't be used with cached latents"),
)


@dataclass(frozen=True)
class Recipe:
    """What all latents of a run have in common.

    Attributes:
        vae_id: names the VAE's weights; latents of another one are never used.
        dtype: the precision in which the VAE computes, e.g. "float32".
        channels: of the VAE's latents.
        kind: ends the files' names, `sd` or `sdxl`.
        sampling: "sample" wants log-variances beside the means.
    """

    vae_id: str
    dtype: str = "float32"
    channels: int = 4
    kind: str = "sd"
    sampling: Sampling = "mean"


@dataclass(frozen=True)
class Slots:
    """What to make, one slot per picture and fit; several records may share one.

    Attributes:
        wanted: by slot.
        of_record: the slot of each of the plan's records.
        masked: whether each of the records wants a mask.
    """

    wanted: tuple[Wanted, ...]
    of_record: tuple[int, ...]
    masked: tuple[bool, ...]


def slots(plan: Plan, recipe: Recipe) -> Slots:
    """The slots of a plan.

    Raises:
        UserError: a subset changes its pictures from one showing to the next.
    """
    _refuse_moving(plan)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    masks: list[str | None] = []
    folders: dict[Path, str] = {}
    for index, (record, fit) in enumerate(zip(plan.records, plan.fits, strict=True)):
        subset = _subset(plan, record)
        if record.folder not in folders:
            folders[record.folder] = str(record.folder.absolute())
        place = (record.key,) if record.key.startswith("/") else (folders[record.folder], record.key)
        groups[(*place, fit.bucket, fit.resized, fit.crop, subset.resize_interpolation)].append(index)
        masks.append(record.mask or (ALPHA if subset.alpha_mask else None))
    wanted: list[Wanted] = []
    of_record = [0] * len(masks)
    for group in groups.values():
        kinds = list(dict.fromkeys(masks[i] for i in group if masks[i] is not None)) or [None]
        flipped = any(_subset(plan, plan.records[i]).flip_aug for i in group)
        for kind in kinds:
            mine = [i for i in group if masks[i] == kind or (masks[i] is None and kind == kinds[0])]
            owner = next(i for i in mine if masks[i] == kind)
            record = plan.records[owner]
            wanted.append(
                Wanted(
                    record,
                    plan.fits[owner],
                    _subset(plan, record),
                    flipped,
                    recipe.vae_id,
                    recipe.dtype,
                    plan.vae_factor,
                    recipe.channels,
                    recipe.kind,
                    recipe.sampling,
                    kind,
                )
            )
            for i in mine:
                of_record[i] = len(wanted) - 1
    return Slots(tuple(wanted), tuple(of_record), tuple(mask is not None for mask in masks))


def _subset(plan: Plan, record: ImageRecord) -> SubsetSpec:
    return plan.datasets[record.dataset].spec.subsets[record.subset]


def _refuse_moving(plan: Plan) -> None:
    problems = [
        Problem(subset.where or str(subset.image_dir), wrong, "turn one off")
        for dataset in plan.datasets
        for subset in dataset.spec.subsets
        for name, wrong in _MOVING
        if getattr(subset, name)
    ]
    if problems:
        raise UserError(problems)


@dataclass
class Files:
    """The file of each slot. `check` replaces claimed names by those of files that were found to fit; `afresh`, it
    reads all whatever is known from before."""

    wanted: tuple[Wanted, ...]
    trust: Trust
    afresh: bool = False
    paths: list[Path] = field(init=False)
    verified: Verified = field(init=False, default_factory=lambda: Verified(USABLE))

    def __post_init__(self) -> None:
        self.paths = list(_claim(self.wanted))
        stems = [one.path.absolute().with_suffix("") for one in self.wanted]
        pictures: dict[Path, set[str]] = defaultdict(set)
        for one, stem in zip(self.wanted, stems, strict=True):
            pictures[stem].add(one.path.name)
        self._alone = [len(pictures[stem]) == 1 for stem in stems]

    def check(self, numbers: Sequence[int], threads: int) -> list[Verdict]:
        """The verdicts on the files of some slots, in order, judged by threads."""

        def judge(slot: int) -> tuple[Path, Verdict]:
            return self._best(slot, self._trust(slot))

        pairs = console.track(in_order(judge, numbers, threads), "checking cached latents", len(numbers))
        verdicts: list[Verdict] = []
        for slot, (path, verdict) in zip(numbers, pairs, strict=True):
            self.paths[slot] = path
            verdicts.append(verdict)
        self.verified.save()
        return verdicts

    def find_made(self, numbers: Sequence[int], threads: int) -> list[int]:
        """Look which files of some slots other processes used or made, without hashing; returns slots without one."""

        def find(slot: int) -> tuple[Path, Verdict]:
            return self._best(slot, replace(self._trust(slot), unchecked=True))

        lost = []
        for slot, (path, verdict) in zip(numbers, in_order(find, numbers, threads), strict=True):
            self.paths[slot] = path
            if verdict not in USABLE:
                lost.append(slot)
        return lost

    def _trust(self, slot: int) -> Trust:
        """Of pictures that share a stem, nobody knows whose a foreign file is."""
        return self.trust if self._alone[slot] else replace(self.trust, foreign=False)

    def _best(self, slot: int, trust: Trust) -> tuple[Path, Verdict]:
        """The file to use: the claimed one, that of a second bucket from a run with several, or the old name."""
        wanted, file = self.wanted[slot], self.paths[slot]
        verdict = self._judge(file, wanted, trust)
        if verdict in USABLE:
            return file, verdict
        second = latent_files.names(wanted)[1]
        for name in (second, latent_files.old_name(wanted)):
            other = file.with_name(name)
            if other != file and (found := self._judge(other, wanted, trust)) in USABLE:
                return other, found
        return file, verdict

    def _judge(self, file: Path, wanted: Wanted, trust: Trust) -> Verdict:
        if trust.unchecked or self.afresh:
            return latent_files.judge(file, wanted, trust)
        told = (wanted.description(), wanted.record.size, wanted.entries, wanted.shape, wanted.mask, trust.foreign)
        paths = [file, *wanted.sources]
        return cast(
            Verdict, self.verified.verdict(paths, json.dumps(told), lambda: latent_files.judge(file, wanted, trust))
        )


def _claim(wanted: Sequence[Wanted]) -> Iterator[Path]:
    """A file for each slot, none twice: the usual name for the first bucket of a picture."""
    claimed: set[str] = set()
    for one in wanted:
        path = one.path
        folder = str(path.parent.absolute())
        usual = latent_files.names(one)
        more = (f"{path.name}_{number}_{one.kind}.npz" for number in range(2, len(wanted) + 2))
        name = next(name for name in chain(usual, more) if f"{folder}/{name}" not in claimed)
        claimed.add(f"{folder}/{name}")
        yield path.parent / name
