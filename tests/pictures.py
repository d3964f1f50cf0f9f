"""Folders of small real picture files with captions, in sd-scripts' `N_name` layout."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((96, 64), (64, 96), (64, 64), (80, 80), (128, 64), (100, 72), (70, 110))


def make_pictures(
    parent: Path, count: int = 7, repeats: int = 2, name: str = "thing", sizes: Sequence[tuple[int, int]] = SIZES
) -> Path:
    """Write `parent/<repeats>_<name>` with `count` PNG and JPEG files, each with a .txt caption of four tags."""
    folder = parent / f"{repeats}_{name}"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(name))
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        corners = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        picture = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
        path = folder / f"picture{number:02d}.{'png' if number % 2 else 'jpg'}"
        picture.save(path)
        path.with_suffix(".txt").write_text(f"{name}, tag{number}, red, a place\n", encoding="utf-8")
    return parent
