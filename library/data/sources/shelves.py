"""The small files of each folder that a scan needs, headers of pictures and texts of captions, each read at most once.

What an earlier run has read comes from the folder's index (data.sources.index); what is new is put into it by
`Shelves.close`. Which files are wanted, and what for, is not known here (data.sources.scan).
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from library.data.sources import index as indexes
from library.data.sources.images import Damage, Header, decode, probe
from library.data.sources.index import CAPTION, DAMAGE, Index, Numbers
from library.data.sources.listing import lines_of
from library.data.sources.reading import LateBar, read_all
from library.errors import Problem

Value = TypeVar("Value")
Text = str | Problem
"""All lines of a caption file that aren't blank, stripped, joined by newlines; or why it can't be read."""
_LONGEST_KEPT = 1 << 16
_FIRST_READ = 8192


class Shelf:
    """One folder.

    Attributes:
        folder: its path.
        names: the files in it; empty if it can't be listed.
        headers: what was found of pictures so far, by name.
        texts: the same of caption files.
    """

    def __init__(self, folder: str, names: frozenset[str] | None = None) -> None:
        self.folder = folder
        self.names: frozenset[str] = names or frozenset()
        if names is None:
            with contextlib.suppress(OSError):
                self.names = frozenset(entry.name for entry in os.scandir(folder))
        self.headers: dict[str, Header | Damage] = {}
        self.texts: dict[str, Text] = {}
        self._index = indexes.load(folder)
        self._fresh: list[Index] = []

    def read_headers(self, names: Iterable[str], *, threads: int, progress: LateBar) -> None:
        """Find the headers of these pictures."""
        wanted = [name for name in dict.fromkeys(names) if name not in self.headers]
        looked, states, rows = self._look_up(wanted)
        facts = self._index.facts[rows] if len(self._index.names) else np.empty((len(rows), 3), np.int64)
        facts[rows < 0, 2] = CAPTION
        unread = []
        known = zip(wanted, rows.tolist(), *facts.T.tolist(), states[:, 0].tolist(), strict=True)
        for i, (name, row, width, height, orientation, length) in enumerate(known):
            if orientation > DAMAGE:
                self.headers[name] = Header((width, height), orientation, length)
            elif orientation == DAMAGE:
                self.headers[name] = Damage(self._index.texts[row])
            else:
                unread.append(i)
        progress.add(len(wanted) - len(unread))
        found = self._read(probe, [wanted[i] for i in unread], threads, progress)
        self.headers.update(zip((wanted[i] for i in unread), found, strict=True))
        new = [
            (i, (*header.size, header.orientation), "")
            for i, header in zip(unread, found, strict=True)
            if isinstance(header, Header) and header.file_bytes == states[i, 0]
        ]
        self._keep(wanted, states, looked, new)

    def read_texts(self, names: Iterable[str], *, threads: int, progress: LateBar) -> None:
        """Find the texts of these caption files."""
        wanted = [name for name in dict.fromkeys(names) if name not in self.texts]
        looked, states, rows = self._look_up(wanted)
        kinds = self._index.facts[rows, 2].tolist() if len(self._index.names) else []
        unread = []
        for i, row in enumerate(rows.tolist()):
            if row >= 0 and kinds[i] == CAPTION:
                self.texts[wanted[i]] = self._index.texts[row]
            else:
                unread.append(i)
        progress.add(len(wanted) - len(unread))
        found = self._read(read_caption, [wanted[i] for i in unread], threads, progress)
        self.texts.update(zip((wanted[i] for i in unread), found, strict=True))
        new = [
            (i, (0, 0, CAPTION), text)
            for i, text in zip(unread, found, strict=True)
            if isinstance(text, str) and len(text) <= _LONGEST_KEPT
        ]
        self._keep(wanted, states, looked, new)

    def decode_all(self, names: Iterable[str], *, threads: int, progress: LateBar) -> None:
        """Decode these pictures, of those whose headers are whole; damage takes their headers' places."""
        wanted = [name for name in dict.fromkeys(names) if isinstance(self.headers.get(name), Header)]
        before = [indexes.state_of(f"{self.folder}/{name}") for name in wanted]
        found = self._read(decode, wanted, threads, progress, always=True)
        damaged = {name: damage for name, damage in zip(wanted, found, strict=True) if damage is not None}
        self.headers.update(damaged)
        states = {Path(self.folder, name): state for name, state in zip(wanted, before, strict=True) if state}
        told = {Path(self.folder, name): damage.wrong for name, damage in damaged.items()}
        indexes.remember_damages(told, before=states)

    def close(self) -> None:
        """Write what is new into the folder's index, without files that have gone."""
        if not self._fresh and all(name in self.names for name in self._index.names):
            return
        fresh = Index()
        for found in self._fresh:
            fresh = fresh.joined(found)
        self._index, self._fresh = indexes.add(self.folder, fresh, self.names), []

    def _look_up(self, names: Sequence[str]) -> tuple[float, Numbers, Numbers]:
        """When the files were looked at, their states, and their rows in the index."""
        looked = indexes.now()
        states = indexes.states_of(self.folder, names)
        return looked, states, self._index.rows(names, states)

    def _read(
        self,
        read: Callable[[str], Value],
        names: Sequence[str],
        threads: int,
        progress: LateBar,
        *,
        always: bool = False,
    ) -> list[Value]:
        return read_all(
            read, [f"{self.folder}/{name}" for name in names], threads=threads, progress=progress, always=always
        )

    def _keep(
        self, names: Sequence[str], states: Numbers, looked: float, new: Sequence[tuple[int, tuple[int, int, int], str]]
    ) -> None:
        """Entries for the index, (place in `names`, facts, text), of files that had been left alone for long enough
        when they were looked at, and that are the same after they were read."""
        calm = indexes.settled(states, looked).tolist()
        kept = [entry for entry in new if calm[entry[0]]]
        if not kept:
            return
        rows, facts, texts = zip(*kept, strict=True)
        chosen, known = np.array(rows, np.int64), [names[i] for i in rows]
        same = (indexes.states_of(self.folder, known) == states[chosen]).all(1)
        found = Index(known, states[chosen], np.array(facts, np.int64), list(texts))
        self._fresh.append(found.only(np.flatnonzero(same).tolist()))


class Shelves:
    """The folders of a scan by path."""

    def __init__(self) -> None:
        self._shelves: dict[str, Shelf] = {}

    def __getitem__(self, folder: str) -> Shelf:
        found = self._shelves.get(folder)
        if found is None:
            found = self._shelves[folder] = Shelf(folder)
        return found

    def add(self, folder: str, names: frozenset[str]) -> None:
        """A folder whose files are known already."""
        if folder not in self._shelves:
            self._shelves[folder] = Shelf(folder, names)

    def close(self) -> None:
        """Write the indexes."""
        for shelf in self._shelves.values():
            shelf.close()


def read_caption(path: str) -> Text:
    """The text of one caption file; UTF-8, with or without a byte order mark."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            data = os.read(descriptor, _FIRST_READ)
            if len(data) == _FIRST_READ:
                with os.fdopen(os.dup(descriptor), "rb") as file:
                    data += file.read()
        finally:
            os.close(descriptor)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"caption isn't UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"
        return Problem(path, wrong, "save it as UTF-8")
    except OSError as error:
        return Problem(path, f"caption can't be read: {error.strerror or error}")
    return "\n".join(lines_of(text))
