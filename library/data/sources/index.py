"""What was read of a folder's small files before: headers of pictures, texts of captions, damage found by decoding.

An index lies in its folder as `.lorasmith-index`, or in the user's cache folder where that folder can't be written. An
entry counts only while name, size, both times and inode of its file are the same, and is made only of files that were
left alone for two seconds: times might not show a change right after another. A damaged or foreign index is ignored and
written anew. Several processes may write at once: each reads the file, adds what it found and replaces the whole, one
after another where they share a cache folder and the system has `flock`; elsewhere the last one stays.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from library.known_files import cache_folder

Numbers = NDArray[np.int64]
State = tuple[int, int, int, int]
"""Size in bytes, mtime and ctime in ns, inode."""

NAME = ".lorasmith-index"
VERSION = 2
SETTLED = 2.0
"""Seconds that a file must have been left alone."""
CAPTION, DAMAGE = -1, 0
"""What stands in place of an orientation for texts and for damaged pictures; damage found by decoding has one."""
_MAGIC = b"lorasmith index\n"
_STATE, _FACTS = 4, 3
_MISSING = (-1, 0, 0, 0)
_INODE_BITS = (1 << 63) - 1
_STALE = 3600.0
"""Seconds after which a file that was being written counts as left over by a process that was killed."""
_PATIENCE = 10.0
"""So long a process waits for others that write; then it writes all the same."""
_writing = threading.Lock()


@dataclass
class Index:
    """The entries of one folder.

    Attributes:
        names: of the files.
        states: int64 (n, 4): size in bytes, mtime and ctime in ns, inode.
        facts: int64 (n, 3): upright width and height and orientation of a picture; `DAMAGE` or `CAPTION` as the third.
        texts: the caption, or what is wrong with the picture; empty for the others.
    """

    names: list[str] = field(default_factory=list)
    states: Numbers = field(default_factory=lambda: np.empty((0, _STATE), np.int64))
    facts: Numbers = field(default_factory=lambda: np.empty((0, _FACTS), np.int64))
    texts: list[str] = field(default_factory=list)

    def rows(self, names: Sequence[str], states: Numbers) -> Numbers:
        """The row of each file that is as it was when its entry was made, -1 for the others."""
        if not self.names or not names:
            return np.full(len(names), -1, np.int64)
        rows = np.array(list(map(self._places.get, names, repeat(-1))), np.int64)
        same = (rows >= 0) & (states[:, 0] >= 0) & (self.states[rows] == states).all(1)
        return np.where(same, rows, -1)

    @cached_property
    def _places(self) -> dict[str, int]:
        return dict(zip(self.names, range(len(self.names)), strict=True))

    def joined(self, other: "Index") -> "Index":
        """All entries of both; where both know a file, that of `other`."""
        theirs = set(other.names)
        kept = self.only([i for i, name in enumerate(self.names) if name not in theirs])
        return Index(
            kept.names + other.names,
            np.concatenate([kept.states, other.states]),
            np.concatenate([kept.facts, other.facts]),
            kept.texts + other.texts,
        )

    def only(self, rows: Sequence[int]) -> "Index":
        """The entries of these rows."""
        if len(rows) == len(self.names):
            return self
        chosen = np.asarray(rows, np.int64)
        names, texts = [self.names[i] for i in rows], [self.texts[i] for i in rows]
        return Index(names, self.states[chosen], self.facts[chosen], texts)


def state_of(path: Path | str) -> State | None:
    """The state of one file, to be taken before it is read; None where it can't be looked at."""
    try:
        return _state(Path(path).stat())
    except (OSError, ValueError):
        return None


def _state(found: os.stat_result) -> State:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & _INODE_BITS


def states_of(folder: str, names: Iterable[str]) -> Numbers:
    """int64 (n, 4), as in `Index.states`, of files of a folder; a size of -1 where a file can't be looked at."""
    values = array("q")
    add, stat, start = values.extend, os.stat, f"{folder}/"
    for name in names:
        try:
            found = stat(start + name)
        except (OSError, ValueError):
            add(_MISSING)
        else:
            add(_state(found))
    return np.frombuffer(values, np.int64).reshape(-1, _STATE)


def settled(states: Numbers, now: float) -> NDArray[np.bool_]:
    """Which files were left alone for long enough at `now`, seconds since the epoch."""
    latest = np.int64((now - SETTLED) * 1e9)
    return np.asarray((states[:, 0] >= 0) & (states[:, 1:3] < latest).all(1))


def load(folder: str, kind: str = "") -> Index:
    """The index of a folder; an empty one if there is none that can be read.

    A `kind` is an index beside the one of headers and captions, such as `contents`. It lies in the user's cache folder.
    """
    for path in sorted(_places(folder, kind), key=_written_at, reverse=True):
        try:
            return _parse(path.read_bytes())
        except (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
            continue
    return Index()


def add(folder: str, fresh: Index, there: Container[str] | None = None, kind: str = "") -> Index:
    """Put entries into the index of a folder, beside those that are in it now; the index as it is then.

    Damage that decoding has found stays, while its file is the same, when a header comes in its place. Does nothing
    where neither the folder nor the cache can be written.

    Args:
        there: the names of files that haven't gone; entries of others are left out. None: all are there.
    """
    with _alone():
        known = load(folder, kind)
        rows = known.rows(fresh.names, fresh.states)
        if (rows >= 0).any():
            damaged = (rows >= 0) & (known.facts[rows, 2] == DAMAGE)
            fresh = fresh.only(np.flatnonzero(~damaged | (fresh.facts[:, 2] == DAMAGE)).tolist())
        if there is not None:
            known = known.only([i for i, name in enumerate(known.names) if name in there])
        found = known.joined(fresh)
        _save(_places(folder, kind), _written(found))
    return found


def remember_damages(found: Mapping[Path, str], *, before: Mapping[Path, State] | None = None) -> None:
    """Keep what only decoding has shown, path -> what is wrong, so that the next scan tells it without decoding.

    Unlike headers, damage is remembered of pictures that were just written, too: nobody mends one within the tick of a
    clock after its damage was told.

    Args:
        before: the state of each file before it was decoded (`state_of`). Damage is kept only of files that still have
            that state: what was mended meanwhile is not called damaged. None: the files are taken as they are now.
    """
    folders: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, wrong in found.items():
        if before is None or (path in before and state_of(path) == before[path]):
            folders[os.fspath(path.parent)].append((path.name, wrong))
    for folder, pictures in folders.items():
        names = [name for name, _ in pictures]
        states = states_of(folder, names)
        facts = np.zeros((len(names), _FACTS), np.int64)
        damaged = Index(names, states, facts, [wrong for _, wrong in pictures])
        add(folder, damaged.only([i for i in range(len(names)) if states[i, 0] >= 0]))


def now() -> float:
    """Seconds since the epoch: what `settled` compares file times with."""
    return time.time()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other thread, and no other process of this user on this machine, changes an index meanwhile.

    Where that can't be had, the work is done all the same.
    """
    with _writing, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            path = cache_folder() / "lorasmith" / "folders.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("ab"))
            _wait_for(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
        yield


_gave_up = threading.Event()
"""The lock's holder was waited for in vain; nobody waits for it again."""


def _wait_for(take: Callable[[], None]) -> None:
    """Call `take` until it gets the lock, but not for ever, and only once: its holder may have been stopped."""
    start = time.monotonic()
    while True:
        try:
            return take()
        except BlockingIOError:
            if _gave_up.is_set() or time.monotonic() - start > _PATIENCE:
                _gave_up.set()
                return None
            time.sleep(0.01)


def _places(folder: str, kind: str = "") -> tuple[Path, ...]:
    """Where the index of a folder may be, best first."""
    resolved = os.path.realpath(folder)
    digest = hashlib.blake2b(os.fsencode(resolved), digest_size=16).hexdigest()
    inside, outside = Path(folder, NAME), cache_folder() / "lorasmith" / (kind or "folders") / digest
    return (outside,) if kind else (inside, outside)


def _save(places: Sequence[Path], data: bytes) -> None:
    """Write an index at the first of its places that can be written, and remove it from the others."""
    for i, path in enumerate(places):
        with contextlib.suppress(OSError):
            if i or len(places) == 1:
                path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data)
            for other in places[i + 1 :]:
                with contextlib.suppress(OSError):
                    other.unlink(missing_ok=True)
            return


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    _sweep(path)


def _sweep(path: Path) -> None:
    """Remove what killed processes have left of this file, names such as `_replace` gives."""
    start = f"{path.name}."
    with contextlib.suppress(OSError):
        names = [entry.name for entry in os.scandir(path.parent) if entry.name.startswith(start)]
        for name in names:
            other = path.with_name(name)
            with contextlib.suppress(OSError):
                numbered = all(part.isdecimal() for part in name[len(start) :].split("."))
                if numbered and other.stat().st_mtime < time.time() - _STALE:
                    other.unlink()


def _written(index: Index) -> bytes:
    """Magic line, length of the table of contents (8 bytes), table, parts; the table has the sum of the parts."""
    lengths = np.fromiter(map(len, index.texts), np.int64, len(index.texts))
    parts = [
        "\0".join(index.names).encode("utf-8", "surrogatepass"),
        np.ascontiguousarray(index.states, "<i8").tobytes(),
        np.ascontiguousarray(index.facts, "<i4").tobytes(),
        lengths.astype("<i8").tobytes(),
        "".join(index.texts).encode("utf-8", "surrogatepass"),
    ]
    body = b"".join(parts)
    table = {"version": VERSION, "entries": len(index.names), "parts": list(map(len, parts)), "sum": zlib.crc32(body)}
    contents = json.dumps(table).encode()
    return b"".join([_MAGIC, len(contents).to_bytes(8, "little"), contents, body])


def _parse(data: bytes) -> Index:
    """The index in these bytes.

    Raises:
        ValueError, or another error of a reader: it is damaged, foreign, or of another version.
    """
    start = len(_MAGIC) + 8
    if not data.startswith(_MAGIC):
        raise ValueError("not an index")
    body = start + int.from_bytes(data[len(_MAGIC) : start], "little")
    table = json.loads(data[start:body])
    count = table["entries"]
    if table["version"] != VERSION or zlib.crc32(memoryview(data)[body:]) != table["sum"]:
        raise ValueError("another version, or damaged")
    pieces = []
    for length in table["parts"]:
        pieces.append(data[body : body + length])
        body += length
    names, states, facts, lengths, texts = pieces
    ends = np.cumsum(np.frombuffer(lengths, "<i8")).tolist()
    text = texts.decode("utf-8", "surrogatepass")
    found = Index(
        names.decode("utf-8", "surrogatepass").split("\0") if count else [],
        np.frombuffer(states, "<i8").astype(np.int64).reshape(-1, _STATE),
        np.frombuffer(facts, "<i4").astype(np.int64).reshape(-1, _FACTS),
        [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)],
    )
    if not len(found.names) == len(found.states) == len(found.facts) == len(found.texts) == count:
        raise ValueError("parts of different lengths")
    return found
