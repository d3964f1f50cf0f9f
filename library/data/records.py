"""One picture with its caption, as the planning half of this room hands it on. Nothing is decoded to make one."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A picture of a subset.

    `key` is its posix path relative to `folder`, the subset's, or absolute where it lies elsewhere: the coordinate of
    its random draws. `size` is the upright (width, height), after EXIF `orientation` (1..8). `caption` is the raw text;
    with wildcards its lines are joined by newlines. `dataset` and `subset` index the specs. `repeats` counts the
    samples of one epoch. `mask` is the path of a mask picture, `mask_bytes` the length of its file.
    """

    folder: Path
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
    mask: str | None = None
    mask_bytes: int = 0

    @property
    def path(self) -> Path:
        """The picture's file. Made when asked for: a hundred thousand `Path` objects would cost half of a scan."""
        return self.folder / self.key
