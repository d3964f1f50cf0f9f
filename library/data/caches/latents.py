"""Latents of all pictures, made once before training: kept in memory, or in files beside the pictures.

What is kept is the mean of the VAE's posterior, unscaled, with its log-variance where a run draws from the posterior,
and the mask of a picture that has one. A file is used only if it was made from the same picture in the same way
(data.caches.slots); everything else is made anew.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from library import console
from library.data.ahead import ahead
from library.data.caches import latent_files
from library.data.caches.latent_files import MASK, USABLE, Arrays, Hashes, Latents, Sampling, Trust, Verdict, entry_of
from library.data.caches.slots import Files, Made, Recipe, slots
from library.data.pixels import Pixels, read_picture, unit_range
from library.data.plan import Plan
from library.data.sources.index import State, remember_damages, state_of
from library.errors import Problem, UserError

Encode = Callable[[torch.Tensor], torch.Tensor]
"""Pixels float32 (b, 3, H, W) in [-1, 1] -> posterior means (b, c, H / factor, W / factor), unscaled; where a run draws
from the posterior, means and log-variances (b, 2c, H / factor, W / factor)."""
Exchange = Callable[[Any], list[Any]]
"""What this process gives -> what every process gave, by rank. Called by all of them equally often."""

Held = dict[tuple[int, str], NDArray[Any]]
"""Arrays by slot and name."""

NAN_LATENTS = "the VAE gives NaN or infinite latents for this picture, also in float32"
NAN_ADVICE = "use another --vae, or leave the picture out"
SHOWN = 10
_SHARE_BYTES = 256 * 2**20
_WRITERS = 4


@dataclass(frozen=True)
class LatentStore:
    """Latents by index in `Plan.records`, from memory or from files. Safe to read from several threads.

    Attributes:
        channels: of the latents.
        sampled: log-variances are there.
    """

    slots: tuple[int, ...]
    masked: tuple[bool, ...]
    files: Made | None
    memory: Held
    channels: int
    sampled: bool = False

    def get(self, record: int, flipped: bool) -> torch.Tensor:
        """Posterior mean of a picture, unscaled, float32 (c, h, w); do not change it in place.

        Raises:
            UserError: its file went away or was damaged since it was checked.
        """
        return torch.from_numpy(self.array(record, flipped))

    def array(self, record: int, flipped: bool) -> Latents:
        """The same as numpy holds it."""
        return self._read(record, entry_of(flipped))

    def logvar(self, record: int, flipped: bool) -> Latents | None:
        """Logarithm of the posterior's variance, float32 (c, h, w); None if this run doesn't draw from the posterior.

        Raises:
            UserError: its file went away or was damaged since it was checked.
        """
        return self._read(record, entry_of(flipped, logvar=True)) if self.sampled else None

    def mask(self, record: int, flipped: bool) -> NDArray[np.float32] | None:
        """How much the loss counts at each pixel of the bucket, float32 (H, W) in [0, 1]; None where it always does.

        Raises:
            UserError: its file went away or was damaged since it was checked.
        """
        if not self.masked[record] or (self.files is None and (self.slots[record], MASK) not in self.memory):
            return None
        mask = latent_files.mask_values(self._read(record, MASK))
        return np.ascontiguousarray(mask[:, ::-1]) if flipped else mask

    def part(self, first: int) -> "LatentStore":
        """The store of the records from index `first` on, counted from 0 again."""
        return replace(self, slots=self.slots[first:], masked=self.masked[first:])

    def _read(self, record: int, entry: str) -> NDArray[Any]:
        slot = self.slots[record]
        return self.memory[slot, entry] if self.files is None else self.files.read(slot, entry)


class LatentCache:
    """The latents that a plan needs, before they are there. `missing` tells how many this process would encode.

    Args:
        vae_id: names the VAE's weights; latents of another one are never used.
        dtype: the precision in which the VAE computes, e.g. "float32".
        channels: of the VAE's latents.
        kind: ends the files' names, `sd` or `sdxl`.
        sampling: "sample" keeps log-variances beside the means.
        to_disk: keep them in files beside the pictures, else in memory.
        trust_foreign: use fitting files that other programs wrote.
        skip_check: don't hash pictures and arrays of files that claim to fit.
        threads: threads that read, decode and write.
        rank, world_size: with files, each process makes its share. In memory too where there is an `exchange`, by which
            each gets the others' share; without one, each makes all.

    Raises:
        UserError: a subset changes its pictures from one showing to the next.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        vae_id: str,
        dtype: str = "float32",
        channels: int = 4,
        kind: str = "sd",
        sampling: Sampling = "mean",
        to_disk: bool,
        trust_foreign: bool = True,
        skip_check: bool = False,
        threads: int = 4,
        rank: int = 0,
        world_size: int = 1,
        exchange: Exchange | None = None,
    ) -> None:
        self._slots = slots(plan, Recipe(vae_id, dtype, channels, kind, sampling))
        self.wanted = self._slots.wanted
        self.to_disk, self.threads, self.channels, self.sampling = to_disk, threads, channels, sampling
        self._exchange = None if to_disk or world_size == 1 else exchange
        shared = to_disk or self._exchange is not None
        mine = [i for i in range(len(self.wanted)) if not shared or i % world_size == rank]
        self._files = Files(self.wanted, Trust(trust_foreign, skip_check)) if to_disk else None
        self._others = sorted(set(range(len(self.wanted))) - set(mine)) if to_disk else []
        self._maskless: list[int] = []
        self._bad: list[Problem] = []
        self._damaged: dict[Path, str] = {}
        self._before: dict[Path, State] = {}
        if self._files is not None:
            mine, self._maskless = _check_files(self._files, mine, threads)
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
        sampling: Sampling = "mean",
        trust_foreign: bool = True,
        skip_check: bool = False,
        threads: int = 4,
        rank: int = 0,
        world_size: int = 1,
        wait: Callable[[], None] | None = None,
        exchange: Exchange | None = None,
    ) -> LatentStore:
        """Check and fill in one go; see `__init__` and `fill`."""
        cache = cls(
            plan,
            vae_id=vae_id,
            dtype=dtype,
            channels=channels,
            kind=kind,
            sampling=sampling,
            to_disk=to_disk,
            trust_foreign=trust_foreign,
            skip_check=skip_check,
            threads=threads,
            rank=rank,
            world_size=world_size,
            exchange=exchange,
        )
        return cache.fill(encode, vae_batch_size=vae_batch_size, wait=wait)

    @property
    def missing(self) -> int:
        """Pictures that this process has to encode; 0 means that no VAE is needed for caching."""
        return len(self._todo)

    def fill(self, encode: Encode, *, vae_batch_size: int = 1, wait: Callable[[], None] | None = None) -> LatentStore:
        """Encode what is missing, in batches of one bucket, while threads decode and resize the pictures ahead.

        Pictures that can't be used don't stop it: they are named together at the end.

        Args:
            wait: called at the end, whatever was found; returns when every process has come so far.

        Raises:
            UserError: pictures can't be decoded, the VAE gave NaN, a file can't be written, or another process said so.
        """
        memory: Held = {}
        bad = self._bad
        try:
            self._add_masks()
            self._encode_all(encode, max(1, vae_batch_size), memory)
        except UserError as error:
            bad = [*error.problems, *bad]
        remember_damages(self._damaged, before=self._before)
        if self._exchange is not None:
            memory, bad = _shared(self._exchange, memory, bad)
        if wait is not None:
            wait()
        _refuse(bad)
        if self._files is not None:
            lost = self._files.find_made(self._others, self.threads)
            if lost:
                where = f"{len(lost)} pictures, such as {self.wanted[lost[0]].path}"
                raise UserError.single(where, "another process could not cache them", "mend what it says")
        files = None if self._files is None else self._files.made()
        return LatentStore(
            self._slots.of_record, self._slots.masked, files, memory, self.channels, self.sampling == "sample"
        )

    def _note(self, picture: "_Bad") -> None:
        self._bad.extend(picture.problems)
        if picture.damaged:
            found = {Path(problem.where): problem.wrong for problem in picture.problems}
            self._damaged |= found
            self._before |= {path: state for path, state in picture.before.items() if path in found}

    def _add_masks(self) -> None:
        """Give a mask to files whose latents fit. Needs no VAE."""

        def add(slot: int) -> None:
            read = self._read(slot)
            if isinstance(read, _Bad):
                self._note(read)
            elif self._files is not None:
                self._files.add_mask(slot, read.hashes, read.mask)

        if self._maskless:
            added = ahead(add, self._maskless, threads=self.threads, depth=2 * self.threads)
            with closing(added):
                for _ in console.track(added, "caching masks", len(self._maskless)):
                    continue

    def _encode_all(self, encode: Encode, batch_size: int, memory: Held) -> None:
        def keep(done: _Encoded) -> None:
            if self._files is not None:
                self._files.write(done.slot, done.hashes, done.latents, done.mask)
                return
            memory.update({(done.slot, name): array for name, array in done.latents.items()})
            if done.mask is not None:
                memory[done.slot, MASK] = done.mask

        if not self._todo:
            return
        writers = min(_WRITERS, self.threads) if self.to_disk else 0
        encoded = self._encode(encode, batch_size)
        with closing(ahead(keep, encoded, threads=writers, depth=2 * batch_size + writers)) as kept:
            for _ in console.track(kept, "caching latents", len(self._todo)):
                continue

    def _encode(self, encode: Encode, batch_size: int) -> Iterator["_Encoded"]:
        """Three stages: threads read pictures, one thread makes batches of them, and this one encodes."""
        depth = 2 * max(batch_size, self.threads)
        with (
            closing(ahead(self._read, self._todo, threads=self.threads, depth=depth)) as pictures,
            closing(
                ahead(
                    _batch,
                    _chunks(pictures, batch_size, self._note),
                    threads=min(1, self.threads),
                    depth=1,
                )
            ) as batches,
        ):
            for chunk, pixels in batches:
                yield from self._encode_chunk(encode, chunk, pixels)

    def _encode_chunk(self, encode: Encode, chunk: Sequence["_Picture"], pixels: torch.Tensor) -> Iterator["_Encoded"]:
        made = self._encode_batch(encode, pixels, chunk, flipped=False)
        turned = [i for i, picture in enumerate(chunk) if self.wanted[picture.slot].flipped]
        if turned:
            mirrored = self._encode_batch(encode, pixels[turned].flip(-1), [chunk[i] for i in turned], flipped=True)
            for i, more in zip(turned, mirrored, strict=True):
                made[i] |= more
        for picture, latents in zip(chunk, made, strict=True):
            if not all(np.isfinite(array).all() for array in latents.values()):
                self._bad.append(Problem(str(self.wanted[picture.slot].path), NAN_LATENTS, NAN_ADVICE))
                continue
            yield _Encoded(picture.slot, picture.hashes, latents, picture.mask)

    def _encode_batch(
        self, encode: Encode, pixels: torch.Tensor, chunk: Sequence["_Picture"], *, flipped: bool
    ) -> list[Arrays]:
        made = encode(pixels).detach().to("cpu", torch.float32).numpy()
        channels, height, width = self.wanted[chunk[0].slot].shape
        kinds = (False, True) if self.sampling == "sample" else (False,)
        if made.shape != (len(chunk), channels * len(kinds), height, width):
            raise ValueError(f"the VAE made latents of {made.shape[1:]}, not {(channels * len(kinds), height, width)}")
        return [
            {
                entry_of(flipped, logvar): np.ascontiguousarray(one[logvar * channels : (logvar + 1) * channels])
                for logvar in kinds
            }
            for one in made
        ]

    def _read(self, slot: int) -> "_Picture | _Bad":
        wanted = self.wanted[slot]
        before = {path: state for path in wanted.sources if (state := state_of(path)) is not None}
        try:
            hashes = latent_files.hash_sources(wanted) if self.to_disk else Hashes("")
            picture = read_picture(wanted.record, wanted.fit, wanted.subset)
        except UserError as error:
            return _Bad(error.problems, _is_damage(error), before)
        except OSError as error:
            where = str(error.filename or wanted.path)
            return _Bad((Problem(where, f"can't be read ({error.strerror or error})", "replace or remove it"),))
        return _Picture(slot, hashes, picture.pixels, picture.mask if wanted.mask is not None else None)


@dataclass(frozen=True)
class _Picture:
    """A decoded picture of a slot; `hashes` were taken before it was decoded, and are empty if nobody needs them."""

    slot: int
    hashes: Hashes
    pixels: Pixels
    mask: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Bad:
    """A picture that can't be used; `damaged` if decoding showed it of what its files were `before`."""

    problems: tuple[Problem, ...]
    damaged: bool = False
    before: Mapping[Path, State] = field(default_factory=dict)


@dataclass(frozen=True)
class _Encoded:
    """Latents of a slot, with its mask."""

    slot: int
    hashes: Hashes
    latents: Arrays
    mask: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Share:
    """What a process tells the others at a time; `more` is still to come."""

    arrays: Held
    problems: tuple[Problem, ...]
    more: bool


def _chunks(pictures: Iterable[_Picture | _Bad], size: int, note: Callable[[_Bad], None]) -> Iterator[list[_Picture]]:
    """Up to `size` pictures of one shape at a time."""
    chunk: list[_Picture] = []
    for picture in pictures:
        if isinstance(picture, _Bad):
            note(picture)
            continue
        if chunk and (len(chunk) == size or chunk[0].pixels.shape != picture.pixels.shape):
            yield chunk
            chunk = []
        chunk.append(picture)
    if chunk:
        yield chunk


def _batch(chunk: list[_Picture]) -> tuple[list[_Picture], torch.Tensor]:
    return chunk, torch.from_numpy(unit_range([picture.pixels for picture in chunk]))


def _is_damage(error: UserError) -> bool:
    """Whether a picture is at fault, not a disk that couldn't be read or somebody who changed the file."""
    return error.__cause__ is not None and getattr(error.__cause__, "errno", None) is None


def _check_files(files: Files, mine: Sequence[int], threads: int) -> tuple[list[int], list[int]]:
    """Which of the slots `mine` have no file that fits, and which have one that only lacks its mask; says so."""
    latent_files.sweep({path.parent for path in files.paths})
    verdicts = files.check(mine, threads)
    for slot, verdict in zip(mine, verdicts, strict=True):
        if verdict == "damaged":
            console.warn(f"{files.paths[slot]}: damaged; it is made anew")
    _say_verdicts(verdicts)
    judged = list(zip(mine, verdicts, strict=True))
    todo = [slot for slot, verdict in judged if verdict not in (*USABLE, "maskless")]
    return todo, [slot for slot, verdict in judged if verdict == "maskless"]


def _say_verdicts(verdicts: Sequence[Verdict]) -> None:
    foreign, stale, maskless = (verdicts.count(kind) for kind in ("foreign", "stale", "maskless"))
    if foreign:
        console.say(
            f"{foreign} cached latents of another program are used: they fit in size and crop and are newer than their "
            "pictures; --trust_foreign_caches no makes them anew"
        )
    if stale:
        console.say(f"{stale} cached latents no longer fit their picture, size or VAE; they are made anew")
    if maskless:
        console.say(f"{maskless} cached latents lack the mask that is wanted now; only that is added")


def _refuse(bad: Sequence[Problem]) -> None:
    """Raise what was found: ten problems, and the count of the others."""
    problems = list(dict.fromkeys(bad))
    if len(problems) > SHOWN:
        rest = Problem("pictures", f"{len(problems) - SHOWN} more that can't be cached")
        problems = [*problems[:SHOWN], rest]
    if problems:
        raise UserError(problems)


def _shared(exchange: Exchange, memory: Held, bad: Sequence[Problem]) -> tuple[Held, list[Problem]]:
    """What all processes made and found, in rounds that don't need much memory at a time."""
    rest = list(memory.items())
    everything = dict(memory)
    problems: list[Problem] = []
    more = True
    while more:
        arrays: Held = {}
        held = 0
        while rest and held < _SHARE_BYTES:
            key, array = rest.pop()
            arrays[key] = array
            held += array.nbytes
        shares: list[_Share] = exchange(_Share(arrays, tuple(bad), bool(rest)))
        bad = ()
        for share in shares:
            everything |= share.arrays
            problems += share.problems
        more = any(share.more for share in shares)
    return everything, problems
