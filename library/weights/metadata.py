"""The text that stands in a LoRA file beside its tensors: how it was trained (`ss_*`) and what it is (`modelspec.*`).

Galleries, front ends and merge tools read these keys; names and value formats are those of the files in the field.
Everything is passed in, also times and hashes, so that the same training gives the same text.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Self

MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v1_v": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
}
_SIDES = {"sd_v2_v": 768, "sdxl_base_v1-0": 1024}
_GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"


@dataclass(frozen=True)
class SubsetFacts:
    """One source of pictures. `image_dir` is the last path component of its folder, or the name of its metadata file or
    dataset (`from_metadata`); `img_count` is without repeats."""

    image_dir: str
    img_count: int
    num_repeats: int
    is_reg: bool = False
    class_tokens: str | None = None
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str | None = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    resize_interpolation: str | None = None
    from_metadata: bool = False


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset. Image numbers count repeats; `buckets` are ((width, height), images with repeats), in order.

    `tag_frequency` maps a folder's name to its tags and how many pictures have each.
    """

    batch_size: int
    num_train_images: int
    num_reg_images: int
    resolution: tuple[int, int]
    enable_bucket: bool
    min_bucket_reso: int | None
    max_bucket_reso: int | None
    bucket_no_upscale: bool
    subsets: tuple[SubsetFacts, ...]
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    buckets: tuple[tuple[tuple[int, int], int], ...] = ()
    mean_ar_error: float = 0.0
    resize_interpolation: str | None = None

    def bucket_info(self) -> dict[str, Any] | None:
        """The JSON object of `ss_bucket_info`; null where buckets are off."""
        if not self.enable_bucket:
            return None
        listed = {
            str(number): {"resolution": list(size), "count": count} for number, (size, count) in enumerate(self.buckets)
        }
        return {"buckets": listed, "mean_img_ar_error": self.mean_ar_error}


@dataclass(frozen=True)
class FileFacts:
    """A model file as metadata names it: the last path component, or a hub name without hashes."""

    name: str
    legacy_hash: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a training is besides its settings. Times are unix seconds; image numbers count repeats.

    `base_model_version` is sd_v1, sd_v1_v, sd_v2, sd_v2_v or sdxl_base_v1-0; `optimizer` reads like
    `torch.optim.adamw.AdamW(weight_decay=0.1)`; `network_args` is None unless the user gave some.
    """

    session_id: int
    started_at: float
    base_model_version: str
    base_model: FileFacts
    optimizer: str
    num_batches_per_epoch: int
    num_epochs: int
    total_batch_size: int
    datasets: tuple[DatasetFacts, ...]
    from_config: bool
    network_args: Mapping[str, Any] | None = None
    vae: FileFacts | None = None
    num_validation_images: int = 0


@dataclass(frozen=True)
class Settings:
    """The settings that metadata tells, under their flag names; each becomes the key `ss_<name>` (see `_RENAMED`)."""

    output_name: object = None
    learning_rate: object = None
    text_encoder_lr: object = None
    unet_lr: object = None
    gradient_checkpointing: object = False
    gradient_accumulation_steps: object = 1
    max_train_steps: object = None
    lr_warmup_steps: object = 0
    lr_scheduler: object = "constant"
    network_module: object = None
    network_dim: object = None
    network_alpha: object = None
    network_dropout: object = None
    mixed_precision: object = "no"
    full_fp16: object = False
    v2: object = False
    clip_skip: object = None
    max_token_length: object = None
    cache_latents: object = False
    seed: object = None
    lowram: object = False
    noise_offset: object = None
    multires_noise_iterations: object = None
    multires_noise_discount: object = 0.3
    adaptive_noise_scale: object = None
    zero_terminal_snr: object = False
    training_comment: object = None
    max_grad_norm: object = 1.0
    caption_dropout_rate: object = 0.0
    caption_dropout_every_n_epochs: object = 0
    caption_tag_dropout_rate: object = 0.0
    face_crop_aug_range: object = None
    prior_loss_weight: object = 1.0
    min_snr_gamma: object = None
    scale_weight_norms: object = None
    ip_noise_gamma: object = None
    debiased_estimation_loss: object = False
    noise_offset_random_strength: object = False
    ip_noise_gamma_random_strength: object = False
    loss_type: object = "l2"
    huber_schedule: object = "snr"
    huber_scale: object = 1.0
    huber_c: object = 0.1
    fp8_base: object = False
    fp8_base_unet: object = False
    validation_seed: object = None
    validation_split: object = 0.0
    max_validation_steps: object = None
    validate_every_n_epochs: object = None
    validate_every_n_steps: object = None
    resize_interpolation: object = None

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """The settings among `values` (flag name: value); what is not in it keeps its default."""
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})


_RENAMED = {"debiased_estimation_loss": "ss_debiased_estimation"}


@dataclass(frozen=True)
class Progress:
    """Where a saved file stands: finished epochs, optimizer steps, and the time of saving in unix seconds."""

    epoch: int
    steps: int
    finished_at: float


@dataclass(frozen=True)
class ModelSpec:
    """What `modelspec.*` tells. `date` is local time; `texts` holds author, description, license, tags, usage_hint,
    thumbnail, merged_from, trigger_phrase, preprocessor and is_negative_embedding where the user gave them.
    """

    base_model_version: str
    date: datetime
    implementation_version: str
    title: str | None = None
    resolution: tuple[int, int] | None = None
    v_prediction: bool = False
    min_timestep: int | None = None
    max_timestep: int | None = None
    clip_skip: int | None = None
    texts: Mapping[str, str | None] = field(default_factory=dict)
    kind: str = "lora"


def training_metadata(run: RunFacts, settings: Settings) -> dict[str, str]:
    """Every `ss_` key that holds for the whole run; `lora_metadata` adds the progress and `modelspec.*`."""
    found: dict[str, object] = {"ss_session_id": run.session_id, "ss_training_started_at": run.started_at}
    for item in fields(settings):
        found[_RENAMED.get(item.name, f"ss_{item.name}")] = getattr(settings, item.name)
    found |= {
        "ss_base_model_version": run.base_model_version,
        "ss_optimizer": run.optimizer,
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_num_train_images": sum(dataset.num_train_images for dataset in run.datasets),
        "ss_num_validation_images": run.num_validation_images,
        "ss_num_reg_images": sum(dataset.num_reg_images for dataset in run.datasets),
        "ss_num_batches_per_epoch": run.num_batches_per_epoch,
        "ss_num_epochs": run.num_epochs,
    }
    if run.network_args is not None:
        found["ss_network_args"] = json.dumps({"dropout": settings.network_dropout} | dict(run.network_args))
    found |= _file("sd_model", run.base_model)
    if run.vae is not None:
        found |= _file("vae", run.vae)
    found |= _config_mode(run.datasets) if run.from_config else _folder_mode(run.datasets[0], run.total_batch_size)
    return {key: str(value) for key, value in found.items()}


def lora_metadata(
    training: Mapping[str, str], progress: Progress, spec: ModelSpec, *, no_metadata: bool = False
) -> dict[str, str]:
    """All text of one file. With `no_metadata` only the minimum of `ss_` keys and `modelspec.*` remain."""
    found = dict(training)
    found["ss_training_finished_at"] = str(progress.finished_at)
    found["ss_steps"] = str(progress.steps)
    found["ss_epoch"] = str(progress.epoch)
    if no_metadata:
        found = {key: found[key] for key in MINIMUM if key in found}
    return found | modelspec(spec)


def modelspec(spec: ModelSpec) -> dict[str, str]:
    """The `modelspec.*` keys (SAI model spec 1.0.1). `date` has whole seconds and no zone."""
    sdxl = spec.base_model_version.startswith("sdxl")
    native = spec.kind == "lora" and not sdxl
    width, height = spec.resolution or (_SIDES.get(spec.base_model_version, 512),) * 2
    found: dict[str, object] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{_ARCHITECTURES[spec.base_model_version]}/{spec.kind}",
        "implementation": "diffusers" if native else _GENERATIVE_MODELS,
        "implementation_version": spec.implementation_version,
        "title": spec.title or f"{'LoRA' if spec.kind == 'lora' else 'TextualInversion'}@{spec.date.timestamp()}",
        "resolution": f"{width}x{height}",
        "date": spec.date.replace(tzinfo=None).isoformat(timespec="seconds"),
        "prediction_type": "v" if spec.v_prediction else "epsilon",
    }
    if spec.min_timestep is not None or spec.max_timestep is not None:
        low = 0 if spec.min_timestep is None else spec.min_timestep
        high = 1000 if spec.max_timestep is None else spec.max_timestep
        found["timestep_range"] = f"{low},{high}"
    if spec.clip_skip is not None:
        found["encoder_layer"] = spec.clip_skip
    found |= {name: text for name, text in spec.texts.items() if text is not None}
    return {f"modelspec.{name}": str(value) for name, value in found.items()}


def _file(kind: str, file: FileFacts) -> dict[str, object]:
    found: dict[str, object] = {f"ss_{kind}_name": file.name}
    if file.legacy_hash is not None:
        found[f"ss_{kind}_hash"] = file.legacy_hash
    if file.sha256 is not None:
        found[f"ss_new_{kind}_hash"] = file.sha256
    return found


def _folder_mode(dataset: DatasetFacts, total_batch_size: int) -> dict[str, object]:
    """The keys of a training from kohya folders: one dataset, whose augmentation settings hold for every folder."""

    def any_subset(name: str) -> bool:
        return any(getattr(subset, name) for subset in dataset.subsets)

    return {
        "ss_batch_size_per_device": dataset.batch_size,
        "ss_total_batch_size": total_batch_size,
        "ss_resolution": dataset.resolution,
        "ss_color_aug": any_subset("color_aug"),
        "ss_flip_aug": any_subset("flip_aug"),
        "ss_random_crop": any_subset("random_crop"),
        "ss_shuffle_caption": any_subset("shuffle_caption"),
        "ss_enable_bucket": dataset.enable_bucket,
        "ss_bucket_no_upscale": dataset.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.min_bucket_reso,
        "ss_max_bucket_reso": dataset.max_bucket_reso,
        "ss_keep_tokens": max((subset.keep_tokens for subset in dataset.subsets), default=0),
        "ss_dataset_dirs": json.dumps(_folders(subset for subset in dataset.subsets if not subset.is_reg)),
        "ss_reg_dataset_dirs": json.dumps(_folders(subset for subset in dataset.subsets if subset.is_reg)),
        "ss_tag_frequency": json.dumps(dataset.tag_frequency),
        "ss_bucket_info": json.dumps(dataset.bucket_info()),
    }


def _config_mode(datasets: Iterable[DatasetFacts]) -> dict[str, object]:
    """The keys of a training from a dataset config: all datasets as one list, and what older readers know, merged."""
    listed = []
    trained: list[SubsetFacts] = []
    tags: dict[str, Mapping[str, int]] = {}
    for dataset in datasets:
        listed.append(
            {
                "is_dreambooth": not any(subset.from_metadata for subset in dataset.subsets),
                "batch_size_per_device": dataset.batch_size,
                "num_train_images": dataset.num_train_images,
                "num_reg_images": dataset.num_reg_images,
                "resolution": list(dataset.resolution),
                "enable_bucket": dataset.enable_bucket,
                "min_bucket_reso": dataset.min_bucket_reso,
                "max_bucket_reso": dataset.max_bucket_reso,
                "tag_frequency": dataset.tag_frequency,
                "bucket_info": dataset.bucket_info(),
                "resize_interpolation": dataset.resize_interpolation,
                "subsets": [_subset(subset) for subset in dataset.subsets],
            }
        )
        trained += [subset for subset in dataset.subsets if not subset.is_reg]
        tags = dict(dataset.tag_frequency) | tags
    return {
        "ss_datasets": json.dumps(listed),
        "ss_dataset_dirs": json.dumps(_folders(trained)),
        "ss_tag_frequency": json.dumps(tags),
    }


def _subset(subset: SubsetFacts) -> dict[str, object]:
    """One subset of `ss_datasets`, in the order in which files have it."""
    last = ("image_dir", "class_tokens", "is_reg")
    named = {item.name: getattr(subset, item.name) for item in fields(subset)}
    found = {name: value for name, value in named.items() if name not in (*last, "from_metadata")}
    if subset.from_metadata:
        return found | {"metadata_file": subset.image_dir}
    return found | {name: named[name] for name in last}


def _folders(subsets: Iterable[SubsetFacts]) -> dict[str, dict[str, int]]:
    """Repeats and images by folder name; a name that comes again gets " (2)", " (3)" ..."""
    found: dict[str, dict[str, int]] = {}
    for subset in subsets:
        name, number = subset.image_dir, 2
        while name in found:
            name = f"{subset.image_dir} ({number})"
            number += 1
        found[name] = {"n_repeats": subset.num_repeats, "img_count": subset.img_count}
    return found
