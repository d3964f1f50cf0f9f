"""Latents of all pictures, made once before training: kept in memory, or in files beside the pictures.

What is kept is the mean of the VAE's posterior, unscaled. A file is used only if it was made from the same picture in
the same way (data.cache_files); everything else is made anew.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from library import console
from library.data import cache_files
from library.data.ahead import ahead
from library.data.cache_files import Latents, Trust, Verdict, Wanted
from library.data.pixels import Pixels, read_pixels
from library.data.plan import Plan
from library.errors import Problem, UserError

Encode = Callable[[torch.Tensor], torch.Tensor]
"""Pixels float32 (b, 3, H, W) in [-1, 1] -> posterior means (b, c, H / factor, W / factor), unscaled."""


def to_unit_range(pixels: Sequence[Pixels]) -> torch.Tensor:
    """uint8 (H, W, 3) pictures of one size -> float32 (b, 3, H, W) in [-1, 1].

    By numpy, since each thread that calls torch would get a pool of threads of its own.
    """
    values = np.stack([picture.transpose(2, 0, 1) for picture in pixels]).astype(np.float32)
    return torch.from_numpy((values / np.float32(255) - np.float32(0.5)) / np.float32(0.5))


NAN_LATENTS = "the VAE gives NaN or infinite latents for this picture, also in float32"
NAN_ADVICE = "use another --vae, or leave the picture out"


@dataclass(frozen=True)
class LatentStore:
    """Latents by index in `Plan.records`, from memory or from files. Safe to read from several threads."""

    slots: tuple[int, ...]
    files: tuple[Path, ...]
    memory: dict[tuple[int, bool], Latents] = field(default_factory=dict)

    def get(self, record: int, flipped: bool) -> torch.Tensor:
        """Posterior mean of a picture, unscaled, float32 (c, h, w); do not change it in place.

        Raises:
            UserError: its file went away or was damaged since it was checked.
        """
        return torch.from_numpy(self.array(record, flipped))

    def array(self, record: int, flipped: bool) -> Latents:
        """The same as numpy holds it."""
        slot = self.slots[record]
        return cache_files.read(self.files[slot], flipped) if self.files else self.memory[slot, flipped]

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.array(0, False).shape[0])


class LatentCache:
    """The latents that a plan needs, before they are there. `missing` tells how many this process would encode.

    Args:
        vae_id: names the VAE's weights; latents of another one are never used.
        dtype: the precision in which the VAE computes, e.g. "float32".
        channels: of the VAE's latents.
        kind: ends the files' names, `sd` or `sdxl`.
        to_disk: keep them in files beside the pictures, else in memory.
        trust_foreign: use fitting files that other programs wrote.
        skip_check: don't hash pictures and arrays of files that claim to fit.
        threads: threads that read, decode and write.
        rank, world_size: with files, each process makes its share; in memory, each makes all.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        vae_id: str,
        dtype: str = "float32",
        channels: int = 4,
        kind: str = "sd",
        to_disk: bool,
        trust_foreign: bool = True,
        skip_check: bool = False,
        threads: int = 4,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _refuse_random_crop(plan)
        self.to_disk = to_disk
        self.threads = threads
        self.wanted, self.slots = _wanted(plan, vae_id, dtype, channels, kind)
        self.files = list(_claim_files(self.wanted)) if to_disk else []
        mine = [i for i in range(len(self.wanted)) if not to_disk or i % world_size == rank]
        self._others = sorted(set(range(len(self.wanted))) - set(mine))
        self._trust = _trust(self.wanted, Trust(trust_foreign, skip_check))
        if to_disk:
            mine = self._check_files(mine)
        self._todo = sorted(mine, key=lambda i: (self.wanted[i].fit.bucket, i))

    @classmethod
    def build(
        cls,
        plan: Plan,
        encode: Encode,
        *,
        vae_id: str,
        to_disk: bool,
        vae_batch_size: int = 1,
        dtype: str = "float32",
        channels: int = 4,
        kind: str = "sd",
        trust_foreign: bool = True,
        skip_check: bool = False,
        threads: int = 4,
        rank: int = 0,
        world_size: int = 1,
        wait: Callable[[], None] | None = None,
    ) -> LatentStore:
        """Check and fill in one go; see `__init__` and `fill`."""
        cache = cls(
            plan,
            vae_id=vae_id,
            dtype=dtype,
            channels=channels,
            kind=kind,
            to_disk=to_disk,
            trust_foreign=trust_foreign,
            skip_check=skip_check,
            threads=threads,
            rank=rank,
            world_size=world_size,
        )
        return cache.fill(encode, vae_batch_size=vae_batch_size, wait=wait)

    @property
    def missing(self) -> int:
        """Pictures that this process has to encode; 0 means that no VAE is needed for caching."""
        return len(self._todo)

    def fill(self, encode: Encode, *, vae_batch_size: int = 1, wait: Callable[[], None] | None = None) -> LatentStore:
        """Encode what is missing, in batches of one bucket, while threads decode and resize the pictures ahead.

        Args:
            wait: called at the end; returns when every process has come so far.

        Raises:
            UserError: a picture can't be decoded, a file can't be written, or the VAE gave NaN.
        """
        memory: dict[tuple[int, bool], Latents] = {}

        def keep(done: _Encoded) -> None:
            if self.to_disk:
                cache_files.write(
                    self.files[done.slot], self.wanted[done.slot], done.picture, done.latents, done.flipped
                )
                return
            memory[done.slot, False] = done.latents
            if done.flipped is not None:
                memory[done.slot, True] = done.flipped

        if self._todo:
            encoded = self._encode(encode, max(1, vae_batch_size))
            with closing(ahead(keep, encoded, threads=min(1, self.threads), depth=2 * vae_batch_size)) as kept:
                for _ in console.track(kept, "caching latents", len(self._todo)):
                    continue
        if wait is not None:
            wait()
        if self.to_disk:
            for slot in self._others:
                trust = replace(self._trust[slot], unchecked=True)
                self.files[slot] = _best_file(self.files[slot], self.wanted[slot], trust)[0]
        return LatentStore(self.slots, tuple(self.files), memory)

    def _encode(self, encode: Encode, batch_size: int) -> Iterator["_Encoded"]:
        chunk: list[_Picture] = []
        depth = 2 * max(batch_size, self.threads)
        with closing(ahead(self._read, self._todo, threads=self.threads, depth=depth)) as pictures:
            for picture in pictures:
                full = len(chunk) == batch_size
                if chunk and (full or chunk[0].pixels.shape != picture.pixels.shape):
                    yield from self._encode_chunk(encode, chunk)
                    chunk = []
                chunk.append(picture)
            if chunk:
                yield from self._encode_chunk(encode, chunk)

    def _encode_chunk(self, encode: Encode, chunk: Sequence["_Picture"]) -> Iterator["_Encoded"]:
        pixels = to_unit_range([picture.pixels for picture in chunk])
        plain = self._encode_batch(encode, pixels, [picture.slot for picture in chunk])
        turned = [i for i, picture in enumerate(chunk) if self.wanted[picture.slot].flipped]
        flipped: dict[int, Latents] = {}
        if turned:
            mirrored = self._encode_batch(encode, pixels[turned].flip(-1), [chunk[i].slot for i in turned])
            flipped = dict(zip(turned, mirrored, strict=True))
        for i, picture in enumerate(chunk):
            yield _Encoded(picture.slot, picture.hash, plain[i], flipped.get(i))

    def _encode_batch(self, encode: Encode, pixels: torch.Tensor, slots: Sequence[int]) -> list[Latents]:
        latents = encode(pixels).detach().to("cpu", torch.float32)
        expected = self.wanted[slots[0]].shape
        if tuple(latents.shape[1:]) != expected:
            raise ValueError(f"the VAE made latents of {tuple(latents.shape[1:])}, not {expected}")
        broken = [i for i in range(len(slots)) if not torch.isfinite(latents[i]).all()]
        if broken:
            raise UserError(Problem(str(self.wanted[slots[i]].record.path), NAN_LATENTS, NAN_ADVICE) for i in broken)
        return [np.ascontiguousarray(one) for one in latents.numpy()]

    def _read(self, slot: int) -> "_Picture":
        wanted = self.wanted[slot]
        picture = cache_files.hash_file(wanted.record.path) if self.to_disk else ""
        return _Picture(slot, picture, read_pixels(wanted.record, wanted.fit, interpolation=wanted.interpolation))

    def _check_files(self, mine: Sequence[int]) -> list[int]:
        """The slots of `mine` without a file that fits; says what was found."""

        def judge(slot: int) -> tuple[int, Path, Verdict]:
            return slot, *_best_file(self.files[slot], self.wanted[slot], self._trust[slot])

        verdicts: dict[int, Verdict] = {}
        judged = ahead(judge, mine, threads=self.threads, depth=4 * max(1, self.threads))
        for slot, file, verdict in console.track(judged, "checking cached latents", len(mine)):
            self.files[slot], verdicts[slot] = file, verdict
            if verdict == "damaged":
                console.warn(f"{file}: damaged; it is made anew")
        _say_verdicts(list(verdicts.values()))
        return [slot for slot in mine if verdicts[slot] not in ("ours", "foreign")]


@dataclass(frozen=True)
class _Picture:
    """A decoded picture of a slot; `hash` is that of its file before it was decoded, empty if nobody needs it."""

    slot: int
    hash: str
    pixels: Pixels


@dataclass(frozen=True)
class _Encoded:
    """Latents of a slot, and the hash of the picture's file."""

    slot: int
    picture: str
    latents: Latents
    flipped: Latents | None


def _refuse_random_crop(plan: Plan) -> None:
    problems = [
        Problem(subset.where or str(subset.image_dir), "random_crop can't be used with cached latents", "turn one off")
        for dataset in plan.datasets
        for subset in dataset.spec.subsets
        if subset.random_crop
    ]
    if problems:
        raise UserError(problems)


def _wanted(
    plan: Plan, vae_id: str, dtype: str, channels: int, kind: str
) -> tuple[tuple[Wanted, ...], tuple[int, ...]]:
    """What to make, one slot per picture and fit, and the slot of each record: several records may share one."""
    found: dict[tuple[object, ...], Wanted] = {}
    keys = []
    for record, fit in zip(plan.records, plan.fits, strict=True):
        subset = plan.datasets[record.dataset].spec.subsets[record.subset]
        key = (record.path.absolute(), fit.bucket, fit.resized, fit.crop, subset.resize_interpolation)
        before = found.get(key)
        flipped = subset.flip_aug or (before is not None and before.flipped)
        interpolation = subset.resize_interpolation
        found[key] = Wanted(record, fit, interpolation, flipped, vae_id, dtype, plan.vae_factor, channels, kind)
        keys.append(key)
    numbers = {key: slot for slot, key in enumerate(found)}
    return tuple(found.values()), tuple(numbers[key] for key in keys)


def _trust(wanted: Sequence[Wanted], trust: Trust) -> list[Trust]:
    """What may be trusted for each slot: of pictures that share a stem, nobody knows whose a foreign file is."""
    pictures: dict[Path, set[str]] = defaultdict(set)
    for one in wanted:
        pictures[one.record.path.absolute().with_suffix("")].add(one.record.path.name)
    alone = (len(pictures[one.record.path.absolute().with_suffix("")]) == 1 for one in wanted)
    return [replace(trust, foreign=trust.foreign and single) for single in alone]


def _claim_files(wanted: Sequence[Wanted]) -> Iterator[Path]:
    """A file for each slot, none twice: the usual name for the first bucket of a picture."""
    claimed: set[Path] = set()
    for one in wanted:
        folder = one.record.path.parent
        usual = cache_files.names(one.record, one.fit.bucket, one.kind)
        more = (f"{one.record.path.name}_{number}_{one.kind}.npz" for number in range(2, len(wanted) + 2))
        path = next(folder / name for name in (*usual, *more) if (folder / name).absolute() not in claimed)
        claimed.add(path.absolute())
        yield path


def _best_file(file: Path, wanted: Wanted, trust: Trust) -> tuple[Path, Verdict]:
    """The file to use for a slot: the claimed one, that of a second bucket from a run with several, or the old name."""
    verdict = cache_files.judge(file, wanted, trust)
    if verdict in ("ours", "foreign"):
        return file, verdict
    second = cache_files.names(wanted.record, wanted.fit.bucket, wanted.kind)[1]
    for name in (second, cache_files.old_name(wanted.record)):
        other = file.with_name(name)
        if other != file and (found := cache_files.judge(other, wanted, trust)) in ("ours", "foreign"):
            return other, found
    return file, verdict


def _say_verdicts(verdicts: Sequence[Verdict]) -> None:
    foreign, stale = verdicts.count("foreign"), verdicts.count("stale")
    if foreign:
        console.say(
            f"{foreign} cached latents of another program are used: they fit in size and crop and are newer than their "
            "pictures; --trust_foreign_caches no makes them anew"
        )
    if stale:
        console.say(f"{stale} cached latents no longer fit their picture, size or VAE; they are made anew")
