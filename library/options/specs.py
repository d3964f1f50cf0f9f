"""What the data room gets: one frozen record per dataset, subset and caption recipe. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SourceKind = Literal["folder", "metadata", "jsonl", "hub"]
"""Where a subset's pictures and captions are listed: a folder, sd-scripts' metadata file, a JSONL file with columns
(invoke-training), or a Hugging Face dataset."""
CaptionFrom = Literal["file", "filename", "class_tokens"]
PRESERVE = "diff_output_preservation"
"""The custom attribute of samples for which the network is to change nothing."""
BucketChoice = Literal["ratio", "log_ratio"]


@dataclass(frozen=True)
class CaptionSpec:
    """How the caption of a sample is made from its text; the order of the steps stands in data.captions.

    `warmup_step` is the number of steps over which tags are added, below 1 a fraction of all steps, 0 for none.
    `templates` hold one `{}` each, for which `subject` stands, or the picture's own caption where that is empty; with
    `keep_original` the caption follows the filled template.
    """

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
    warmup_min: int = 1
    warmup_step: float = 0.0
    templates: tuple[str, ...] = ()
    subject: str = ""
    keep_original: bool = False


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a JSONL file or a Hugging Face dataset; `mask` is optional in the data."""

    image: str = "image"
    caption: str = "text"
    mask: str = "mask"


@dataclass(frozen=True)
class HubDataset:
    """A Hugging Face dataset: hub id or local path, its configuration, where downloads go. The split is `train`."""

    name: str
    config: str | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class SubsetSpec:
    """One source of pictures. `where` says who asked for it: a folder, or file, line and key.

    `image_dir` is the folder that names of pictures are relative to. `metadata_file` is set for `metadata` and `jsonl`
    sources, `hub` for `hub` ones. `masks` says whether a mask that the source names (JSONL, hub) is used.
    `mask_dir` holds mask pictures; `alpha_mask` takes the alpha channel. `validation_split` is the fraction that is
    held out.
    """

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
    source: SourceKind = "folder"
    metadata_file: Path | None = None
    columns: Columns = Columns()
    hub: HubDataset | None = None
    recursive: bool = False
    caption_from: CaptionFrom = "file"
    alpha_mask: bool = False
    mask_dir: Path | None = None
    masks: bool = False
    color_aug: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    keep_in_memory: bool = False
    validation_split: float = 0.0
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tables and metadata call it: the folder's name, the metadata file's, or the hub id's last part."""
        if self.hub is not None:
            return self.hub.name.rstrip("/").rpartition("/")[2]
        return self.metadata_file.name if self.metadata_file is not None else self.image_dir.resolve().name


@dataclass(frozen=True)
class AspectBuckets:
    """invoke-training's buckets: for each height from `start` to `end` by steps of `step`, the width that gives
    `target` x `target` pixels, rounded down to the step; both orientations. Pixels."""

    target: int
    start: int
    end: int
    step: int


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that share a size and a batch size. Sizes are pixels, `resolution` is (width, height).

    `min_bucket_reso` and `max_bucket_reso` are multiples of `bucket_reso_steps` where buckets are on. With
    `aspect_buckets`, buckets are on and these limits don't count. `network_multiplier` is the strength at which the
    network is trained on this dataset. `split_seed` decides which pictures are held out for validation.
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
    aspect_buckets: AspectBuckets | None = None
    bucket_choice: BucketChoice = "ratio"
    network_multiplier: float = 1.0
    split_seed: int = 0
