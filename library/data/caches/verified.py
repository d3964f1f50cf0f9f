"""What was found out about cached files before, so that a start needn't read and hash all of them again.

A verdict counts only while every file that it was made from has the same size, times and inode, and only if these had
settled when it was made. It stands in the user's cache folder, one small file for each folder of cached files; where
that can't be read or written, everything is judged anew.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from library.data.ahead import ahead
from library.known_files import cache_folder

Item = TypeVar("Item")
Result = TypeVar("Result")

_SETTLED_NS = 2 * 10**9
_CHUNK = 16
Verdicts = dict[str, tuple[str, str]]
"""By a cached file's name: a hash of the claim and of the files' states, and the verdict."""


class Verified:
    """Verdicts on files of any folders. Safe to use from several threads.

    Args:
        kept: the verdicts that are worth remembering.
    """

    def __init__(self, kept: Sequence[str]) -> None:
        self._kept = frozenset(kept)
        self._known: dict[Path, Verdicts] = {}
        self._fresh: dict[Path, Verdicts] = {}
        self._lock = threading.Lock()

    def verdict(self, paths: Sequence[Path], claim: str, judge: Callable[[], str]) -> str:
        """The verdict on the file `paths[0]`: what was found before, else what `judge` finds.

        Args:
            paths: every file that the verdict depends on.
            claim: everything else that it depends on.
        """
        before = _states(paths)
        if before is None:
            return judge()
        folder, name = paths[0].parent, paths[0].name
        mark = hashlib.blake2b(repr((claim, before)).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        known, verdict = self._of_folder(folder).get(name, ("", ""))
        if known == mark and verdict in self._kept:
            return verdict
        now = time.time_ns()
        verdict = judge()
        settled = all(max(state[1:3]) < now - _SETTLED_NS for state in before)
        if verdict in self._kept and settled and _states(paths) == before:
            with self._lock:
                self._fresh.setdefault(folder, {})[name] = (mark, verdict)
        return verdict

    def save(self) -> None:
        """Write down what was found since the start; what is known of files that are gone is forgotten."""
        with self._lock:
            fresh, self._fresh = self._fresh, {}
        for folder, found in fresh.items():
            place = _place(folder)
            temporary = place.with_name(f"{place.name}.{os.getpid()}")
            with contextlib.suppress(OSError):
                there = {path.name for path in folder.iterdir()}
                kept = {name: value for name, value in _read(place).items() if name in there}
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    temporary.write_text(json.dumps({**kept, **found}), encoding="utf-8")
                    temporary.replace(place)
                finally:
                    temporary.unlink(missing_ok=True)

    def _of_folder(self, folder: Path) -> Verdicts:
        with self._lock:
            if folder not in self._known:
                self._known[folder] = _read(_place(folder))
            return self._known[folder]


def in_order(judge: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """`map(judge, items)` by threads, a few items at a time: what is remembered takes less than handing it over."""

    def judge_all(chunk: Sequence[Item]) -> list[Result]:
        return [judge(item) for item in chunk]

    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    for results in ahead(judge_all, chunks, threads=threads, depth=4 * max(1, threads)):
        yield from results


def _place(folder: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(folder.absolute()), digest_size=16).hexdigest()
    return cache_folder() / "lorasmith" / "verified" / f"{name}.json"


def _read(place: Path) -> Verdicts:
    try:
        read = json.loads(place.read_text(encoding="utf-8"))
        return {str(name): (str(mark), str(verdict)) for name, (mark, verdict) in read.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _states(paths: Sequence[Path]) -> list[tuple[int, int, int, int]] | None:
    """Size, times and inode of each file; None if one is missing."""
    try:
        found = [path.stat() for path in paths]
    except OSError:
        return None
    return [(one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for one in found]
