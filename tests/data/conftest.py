"""Real picture files and the specs that name their folder."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library.options.specs import DatasetSpec, SubsetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


@pytest.fixture
def make_picture() -> MakePicture:
    """Write one picture: a gradient with noise, so that turns, flips and crops can be told apart."""

    def make(
        path: Path, size: tuple[int, int] = (80, 64), *, caption: str | None = None, orientation: int = 1, **how: Any
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        draws = np.random.default_rng(zlib.crc32(f"{path.name} {size}".encode()))
        across = np.linspace(0, 200, width)[None, :].repeat(height, 0)
        down = np.linspace(0, 200, height)[:, None].repeat(width, 1)
        pixels = np.stack([across, down, np.full((height, width), 60.0)], -1) + draws.uniform(0, 50, (height, width, 3))
        exif = Image.Exif()
        if orientation != 1:
            exif[0x0112] = orientation
        Image.fromarray(pixels.astype(np.uint8)).save(path, exif=exif, **how)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return make


@pytest.fixture
def make_spec() -> MakeSpec:
    """A dataset of one folder, 64 px with buckets of 32; keywords of the dataset or of its subset."""

    def make(*folders: Path | SubsetSpec, **settings: Any) -> DatasetSpec:
        names = set(DatasetSpec.__dataclass_fields__)
        outer: dict[str, Any] = {
            "batch_size": 2,
            "resolution": (64, 64),
            "enable_bucket": True,
            "min_bucket_reso": 32,
            "max_bucket_reso": 128,
            "bucket_reso_steps": 32,
        }
        outer |= {name: value for name, value in settings.items() if name in names}
        inner: dict[str, Any] = {"caption_extension": ".txt"}
        inner |= {name: value for name, value in settings.items() if name not in names}
        subsets = tuple(f if isinstance(f, SubsetSpec) else SubsetSpec(image_dir=f, **inner) for f in folders)
        return DatasetSpec(subsets=subsets, **outer)

    return make
