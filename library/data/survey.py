"""What lies in a folder of pictures, told from headers and caption files: counts, sizes, captions; no judgement."""

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.ahead import ahead
from library.data.sources.images import EXTENSIONS, Damage, Header, probe
from library.data.sources.reading import default_threads
from library.data.sources.shelves import read_caption

CAPTION_EXTENSIONS = (".txt", ".caption")
_NUMBERED = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class FolderFacts:
    """The pictures directly in one folder.

    Attributes:
        sizes: upright (width, height) of those that can be read.
        bad: those that can't, with the reason.
        captions: the first line of each caption file that was found, by its ending.
        repeats, words: what a name like `10_mycat cat` says; None and "" of any other.
    """

    folder: Path
    sizes: tuple[tuple[int, int], ...]
    bad: tuple[tuple[Path, str], ...]
    captions: dict[str, tuple[str, ...]]
    repeats: int | None = None
    words: str = ""

    @property
    def count(self) -> int:
        """Pictures that can be trained on."""
        return len(self.sizes)


def look_at(top: Path) -> Iterator[FolderFacts]:
    """The facts of `top` and of each folder directly in it, where pictures are."""
    for folder in (top, *sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))):
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        pictures = [path for path in files if path.suffix.lower() in EXTENSIONS]
        if pictures:
            yield _facts(folder, pictures, set(files))


def _facts(folder: Path, pictures: Sequence[Path], files: set[Path]) -> FolderFacts:
    threads = default_threads()
    headers = list(ahead(probe, pictures, threads=threads, depth=4 * threads))
    sizes = tuple(found.size for found in headers if isinstance(found, Header))
    pairs = zip(pictures, headers, strict=True)
    bad = tuple((path, found.wrong) for path, found in pairs if isinstance(found, Damage))
    captions = {}
    for extension in CAPTION_EXTENSIONS:
        beside = [path.with_suffix(extension) for path in pictures if path.with_suffix(extension) in files]
        texts = [read_caption(str(path)) for path in beside]
        captions[extension] = tuple(text.partition("\n")[0] for text in texts if isinstance(text, str) and text)
    numbered = _NUMBERED.fullmatch(folder.name)
    if numbered is None:
        return FolderFacts(folder, sizes, bad, captions)
    return FolderFacts(folder, sizes, bad, captions, int(numbered[1]), numbered[2])


def usual_side(folders: Sequence[FolderFacts]) -> int:
    """The side of a square with as many pixels as the middle one of all pictures has."""
    areas = [width * height for folder in folders for width, height in folder.sizes]
    return int(statistics.median_low(areas) ** 0.5) if areas else 0


def usual_extension(folders: Sequence[FolderFacts]) -> str | None:
    """The ending that most caption files have; None where there are none."""
    counts = Counter({name: sum(len(one.captions[name]) for one in folders) for name in CAPTION_EXTENSIONS})
    name, count = counts.most_common(1)[0]
    return name if count else None


def are_tags(captions: Sequence[str]) -> bool:
    """Whether captions look like lists of tags: in the middle one, three commas or more, and few words between them."""
    if not captions:
        return False
    commas = statistics.median(text.count(",") for text in captions)
    words = statistics.median(len(text.split()) for text in captions)
    return commas >= 3 and words <= 4 * (commas + 1)
