"""What the data room gets: one frozen record per dataset, subset and caption recipe. Standard library only."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaptionSpec:
    """How the caption of a sample is made from its text; the order of the steps stands in data.captions."""

    prefix: str | None = None
    suffix: str | None = None
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0
    separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    wildcards: bool = False
    shuffle: bool = False


@dataclass(frozen=True)
class SubsetSpec:
    """One folder of pictures. `where` says who asked for it: a folder, or file, line and key."""

    image_dir: Path
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    caption_extension_named: bool = False
    caption: CaptionSpec = CaptionSpec()
    flip_aug: bool = False
    random_crop: bool = False
    resize_interpolation: str | None = None
    where: str = ""


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that share a size and a batch size. Sizes are pixels, `resolution` is (width, height).

    `min_bucket_reso` and `max_bucket_reso` are multiples of `bucket_reso_steps` where buckets are on.
    """

    batch_size: int
    resolution: tuple[int, int]
    subsets: tuple[SubsetSpec, ...]
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    where: str = ""
