"""One picture with its caption, as the planning half of this room hands it on. Nothing is decoded to make one."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A picture of a subset.

    `key` is its posix path relative to the subset's folder: the coordinate of its random draws. `size` is the upright
    (width, height), after EXIF `orientation` (1..8). `caption` is the raw text; with wildcards its lines are joined by
    newlines. `dataset` and `subset` index the specs. `repeats` counts the samples of one epoch.
    """

    path: Path
    key: str
    size: tuple[int, int]
    orientation: int
    caption: str
    captioned: bool
    dataset: int
    subset: int
    repeats: int
    is_reg: bool
    file_bytes: int = 0
