"""What lies in a folder of pictures, told from headers and caption files: counts, sizes, captions; no judgement."""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.ahead import ahead
from library.data.sources.caption_files import CAPTION_EXTENSIONS
from library.data.sources.folders import list_pictures
from library.data.sources.images import Damage, Header, probe
from library.data.sources.reading import default_threads
from library.data.sources.shelves import read_caption
from library.errors import Problem

_NUMBERED = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Captions:
    """The caption files of one ending in a folder: first lines, files without any, and files that can't be read."""

    texts: tuple[str, ...] = ()
    empty: tuple[Path, ...] = ()
    bad: tuple[Problem, ...] = ()

    @property
    def count(self) -> int:
        """All such files."""
        return len(self.texts) + len(self.empty) + len(self.bad)


@dataclass(frozen=True)
class FolderFacts:
    """The pictures directly in one folder.

    Attributes:
        sizes: upright (width, height) of those that can be read.
        bad: those that can't, with the reason.
        captions: of those that can be read, by ending, where there are any.
        repeats, words: what a name like `10_mycat cat` says; None and "" of any other.
    """

    folder: Path
    sizes: tuple[tuple[int, int], ...]
    bad: tuple[tuple[Path, str], ...]
    captions: dict[str, Captions]
    repeats: int | None = None
    words: str = ""

    @property
    def count(self) -> int:
        """Pictures that can be trained on."""
        return len(self.sizes)

    def extension(self, usual: str | None) -> str | None:
        """The ending of captions that is taken here: `usual`, unless far more files have another one; None without."""
        counts = {name: captions.count for name, captions in self.captions.items()}
        most = max(counts, key=counts.__getitem__, default=None)
        return usual if usual and most and 2 * counts.get(usual, 0) >= counts[most] else most


def look_at(top: Path) -> tuple[list[FolderFacts], tuple[str, ...]]:
    """The facts of every folder that pictures are in, from `top` down; and what was passed over, in a line each.

    Raises:
        OSError: `top` can't be read as a folder.
    """
    tree = list_pictures(top, recursive=True)
    inside: dict[Path, list[Path]] = defaultdict(list)
    for key in tree.keys:
        path = top / key
        inside[path.parent].append(path)
    found = [_facts(folder, pictures, tree.folders[str(folder)]) for folder, pictures in sorted(inside.items())]
    return found, tree.notices


def _facts(folder: Path, pictures: Sequence[Path], names: Collection[str]) -> FolderFacts:
    threads = default_threads()
    headers = list(ahead(probe, pictures, threads=threads, depth=4 * threads))
    pairs = list(zip(pictures, headers, strict=True))
    sizes = tuple(found.size for found in headers if isinstance(found, Header))
    bad = tuple((path, found.wrong) for path, found in pairs if isinstance(found, Damage))
    good = [path for path, found in pairs if isinstance(found, Header)]
    captions = {}
    for extension in CAPTION_EXTENSIONS:
        beside = [path.with_suffix(extension) for path in good]
        files = [path for path in dict.fromkeys(beside) if path.name in names]
        if files:
            captions[extension] = _captions(files)
    numbered = _NUMBERED.fullmatch(folder.name)
    if numbered is None:
        return FolderFacts(folder, sizes, bad, captions)
    return FolderFacts(folder, sizes, bad, captions, int(numbered[1]), numbered[2])


def _captions(files: Sequence[Path]) -> Captions:
    texts = [read_caption(str(path)) for path in files]
    return Captions(
        tuple(text.partition("\n")[0] for text in texts if isinstance(text, str) and text),
        tuple(path for path, text in zip(files, texts, strict=True) if text == ""),
        tuple(text for text in texts if isinstance(text, Problem)),
    )


def usual_side(folders: Sequence[FolderFacts]) -> int:
    """The side of a square with as many pixels as the middle one of all pictures has."""
    areas = [width * height for folder in folders for width, height in folder.sizes]
    return int(statistics.median_low(areas) ** 0.5) if areas else 0


def usual_extension(folders: Sequence[FolderFacts]) -> str | None:
    """The ending that most caption files have; None where there are none."""
    counts: Counter[str] = Counter()
    for one in folders:
        counts.update({name: captions.count for name, captions in one.captions.items()})
    return counts.most_common(1)[0][0] if counts else None


def are_tags(captions: Sequence[str]) -> bool:
    """Whether captions look like lists of tags: in the middle one, three commas or more, and few words between them."""
    if not captions:
        return False
    commas = statistics.median(text.count(",") for text in captions)
    words = statistics.median(len(text.split()) for text in captions)
    return commas >= 3 and words <= 4 * (commas + 1)
