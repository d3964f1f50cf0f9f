"""Which latent files a plan wants: one slot for each picture and fit, the file of each, and whether it still fits.

Imports no torch. What fills the slots is data.caches.latents; what a file holds is data.caches.latent_files'.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from library import console
from library.data.caches import latent_files, npz
from library.data.caches.latent_files import (
    ALPHA,
    USABLE,
    Arrays,
    Hashes,
    Latents,
    Sampling,
    Trust,
    Verdict,
    Wanted,
)
from library.data.caches.npz import ChangedError, State
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


class Made:
    """Files that were judged or written, for reading. Safe to use from several threads.

    Args:
        wanted, paths, states: of each slot; a file must still be in the state in which it was judged or written.
    """

    def __init__(self, wanted: Sequence[Wanted], paths: Sequence[Path], states: Sequence[State | None]) -> None:
        self._wanted, self.paths, self._states = tuple(wanted), tuple(paths), list(states)

    def read(self, slot: int, entry: str) -> Latents:
        """An array of a slot's file, float32.

        Raises:
            UserError: the file went away, was damaged, or was replaced by one that doesn't fit.
        """
        path = self.paths[slot]
        try:
            return latent_files.read(path, entry, self._states[slot])
        except ChangedError:
            return self._read_again(slot, entry)

    def _read_again(self, slot: int, entry: str) -> Latents:
        """From a file that changed: another run of the same settings may have made it anew."""
        path = self.paths[slot]
        state = npz.state_of(path)
        if state is not None and latent_files.judge(path, self._wanted[slot], Trust(foreign=False)) == "ours":
            with contextlib.suppress(ChangedError):
                found = latent_files.read(path, entry, state)
                self._states[slot] = state
                return found
        advice = "start again, or use --cache_latents, which keeps them in memory"
        raise UserError.single(str(path), "another run has replaced it", advice)


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
        self._claims = _claim(self.wanted)
        self.paths = list(self._claims.paths)
        self._states: list[State | None] = [None] * len(self.wanted)
        stems = [one.path.absolute().with_suffix("") for one in self.wanted]
        pictures: dict[Path, set[str]] = defaultdict(set)
        for one, stem in zip(self.wanted, stems, strict=True):
            pictures[stem].add(one.path.name)
        self._alone = [len(pictures[stem]) == 1 for stem in stems]

    def check(self, numbers: Sequence[int], threads: int) -> list[Verdict]:
        """The verdicts on the files of some slots, in order, judged by threads."""

        def judge(slot: int) -> Verdict:
            return self._look(slot, self._trust(slot))

        verdicts = list(console.track(in_order(judge, numbers, threads), "checking cached latents", len(numbers)))
        self.verified.save()
        return verdicts

    def find_made(self, numbers: Sequence[int], threads: int) -> list[int]:
        """Look which files of some slots other processes used or made; returns slots without one.

        Nothing is hashed, except where several files may be the one: of pictures that share a stem, or shared one.
        """

        def find(slot: int) -> Verdict:
            judged = self._judged(slot, replace(self._trust(slot), unchecked=True))
            usable = [found for found in judged if found.verdict in USABLE]
            if len(usable) != 1:
                return self._look(slot, self._trust(slot))
            (found,) = usable
            self.paths[slot], self._states[slot] = found.path, found.state
            return found.verdict

        verdicts = in_order(find, numbers, threads)
        return [slot for slot, verdict in zip(numbers, verdicts, strict=True) if verdict not in USABLE]

    def write(self, slot: int, hashes: Hashes, latents: Arrays, mask: NDArray[np.uint8] | None) -> None:
        """Write the file of a slot; see `latent_files.write`.

        Raises:
            UserError: it can't be written.
        """
        path, other = self.paths[slot], self._claims.bucketed[slot]
        changed = npz.state_of(path) != self._states[slot]
        if changed and other is not None and latent_files.holds_other_fit(path, self.wanted[slot]):
            path = self.paths[slot] = other
        self._states[slot] = latent_files.write(path, self.wanted[slot], hashes, latents, mask)

    def add_mask(self, slot: int, hashes: Hashes, mask: NDArray[np.uint8] | None) -> None:
        """Put the mask into the file of a slot; see `latent_files.add_mask`.

        Raises:
            UserError: the file changed, or can't be written.
        """
        path, wanted, state = self.paths[slot], self.wanted[slot], self._states[slot]
        self._states[slot] = latent_files.add_mask(path, wanted, hashes, mask, state)

    def made(self) -> Made:
        """All files, once they are there."""
        return Made(self.wanted, self.paths, self._states)

    def _trust(self, slot: int) -> Trust:
        """Of pictures that share a stem, nobody knows whose a foreign file is."""
        return self.trust if self._alone[slot] else replace(self.trust, foreign=False)

    def _look(self, slot: int, trust: Trust) -> Verdict:
        """Find the file to use, or the one to make, and remember which it is; returns what it is worth."""
        found: dict[Path, _Found] = {}
        for one in self._judged(slot, trust):
            found[one.path] = one
            if one.verdict in USABLE:
                break
        else:
            claimed, bucketed = self._claims.paths[slot], self._claims.bucketed[slot]
            one = found[claimed]
            if bucketed is not None and one.verdict != "maskless":
                there = found.get(bucketed, _Found(bucketed, "absent", None))
                if there.verdict == "maskless" or latent_files.holds_other_fit(claimed, self.wanted[slot]):
                    one = there
        self.paths[slot], self._states[slot] = one.path, one.state
        return one.verdict

    def _judged(self, slot: int, trust: Trust) -> Iterator["_Found"]:
        """Verdicts on the places of a slot: the first, and those of the others where a file is."""
        for number, (path, ours_only) in enumerate(self._places(slot)):
            state = npz.state_of(path)
            if state is None and number:
                continue
            one = replace(trust, foreign=False) if ours_only else trust
            yield _Found(path, self._judge(path, self.wanted[slot], one), state)

    def _places(self, slot: int) -> Iterator[tuple[Path, bool]]:
        """Where the file of a slot may be, best first, and whether only one of ours may be used there.

        What another slot of this run may yet overwrite is left out.
        """
        claims, wanted = self._claims, self.wanted[slot]
        claimed = claims.paths[slot]
        yield claimed, False
        folder = str(claimed.parent.absolute())
        for name in (*latent_files.names(wanted), latent_files.old_name(wanted)):
            if name == claimed.name:
                continue
            key = f"{folder}/{name}"
            owner = claims.owners.get(key)
            if owner is None:
                if claims.reserved.get(key, slot) == slot:
                    yield claimed.with_name(name), False
            elif claims.bucketed[owner] is not None and self.wanted[owner].fit != wanted.fit:
                yield claimed.with_name(name), True

    def _judge(self, file: Path, wanted: Wanted, trust: Trust) -> Verdict:
        if trust.unchecked or self.afresh:
            return latent_files.judge(file, wanted, trust)
        told = (wanted.description(), wanted.record.size, wanted.entries, wanted.shape, wanted.mask, trust.foreign)
        paths = [file, *wanted.sources]
        return cast(
            Verdict, self.verified.verdict(paths, json.dumps(told), lambda: latent_files.judge(file, wanted, trust))
        )


@dataclass(frozen=True)
class _Found:
    """A file, what it is worth, and its state before that was found; None if there was no file."""

    path: Path
    verdict: Verdict
    state: State | None


@dataclass(frozen=True)
class _Claims:
    """Whose the names are, the same in every process.

    Attributes:
        paths: by slot, none twice.
        bucketed: by slot, the name with the bucket that it takes where `paths` holds a file of another fit; None if it
            has none.
        owners, reserved: the slots of `paths` and `bucketed`, by absolute path.
    """

    paths: tuple[Path, ...]
    bucketed: tuple[Path | None, ...]
    owners: dict[str, int]
    reserved: dict[str, int]


def _claim(wanted: Sequence[Wanted]) -> _Claims:
    """A file for each slot: the usual name for the first bucket of a picture."""
    owners: dict[str, int] = {}
    reserved: dict[str, int] = {}
    paths: list[Path] = []
    bucketed: list[Path | None] = []
    folders = [str(one.path.parent.absolute()) for one in wanted]
    for slot, (one, folder) in enumerate(zip(wanted, folders, strict=True)):
        path = one.path
        more = (f"{path.name}_{number}_{one.kind}.npz" for number in range(2, len(wanted) + 2))
        name = next(name for name in chain(latent_files.names(one), more) if f"{folder}/{name}" not in owners)
        owners[f"{folder}/{name}"] = slot
        paths.append(path.parent / name)
    for slot, (one, folder) in enumerate(zip(wanted, folders, strict=True)):
        usual, first, named, second = latent_files.names(one)
        free = (
            name
            for name in (first, second)
            if paths[slot].name in (usual, named)
            and f"{folder}/{name}" not in owners
            and f"{folder}/{name}" not in reserved
        )
        other = next(free, None)
        if other is not None:
            reserved[f"{folder}/{other}"] = slot
        bucketed.append(None if other is None else one.path.parent / other)
    return _Claims(tuple(paths), tuple(bucketed), owners, reserved)
