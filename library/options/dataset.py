"""Flags of the pictures and captions, and of the caches made from them."""

from pathlib import Path
from typing import Literal

from library.options.flags import Group, equivalent, honoured, refused

_LATER = "not supported yet; leave it out"


class Dataset(Group):
    """Pictures and captions"""

    train_data_dir: Path | None = honoured(None, "folder that holds `<repeats>_<name>` folders of pictures")
    reg_data_dir: Path | None = honoured(None, "the same for regularization pictures")
    dataset_config: Path | None = honoured(
        None, "a .toml or .json file that describes the datasets; replaces --train_data_dir and --reg_data_dir"
    )
    dataset_repeats: int = honoured(1, "repeats of a subset that names none", ge=1)
    train_batch_size: int = honoured(1, "pictures per step and process", ge=1)
    resolution: tuple[int, int] | None = honoured(None, "size of a training picture in pixels", metavar="W,H")
    enable_bucket: bool = honoured(False, "keep aspect ratios: sizes of about the same area, in buckets")
    min_bucket_reso: int = honoured(256, "shortest side of a bucket", ge=1)
    max_bucket_reso: int = honoured(1024, "longest side of a bucket", ge=1)
    bucket_reso_steps: int = honoured(64, "sides of buckets are multiples of this", ge=1)
    bucket_no_upscale: bool = honoured(False, "never enlarge a picture: its bucket follows from its own size")
    resize_interpolation: Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"] | None = (
        honoured(None, "how pictures are resized (default: area when shrinking, lanczos when enlarging)")
    )
    shuffle_caption: bool = honoured(False, "shuffle the tags of a caption")
    caption_separator: str = honoured(",", "what stands between tags")
    caption_extension: str = honoured(".caption", "extension of caption files", metavar=".EXT")
    caption_extention: str | None = honoured(None, "old spelling of --caption_extension", metavar=".EXT")
    keep_tokens: int = honoured(0, "how many tags at the start stay where they are", ge=0)
    keep_tokens_separator: str = honoured("", "text that ends the tags that stay where they are")
    secondary_separator: str | None = honoured(
        None, "separator within a tag; becomes --caption_separator after shuffling"
    )
    enable_wildcard: bool = honoured(False, "captions may hold {a|b} and several lines, of which one is drawn")
    caption_prefix: str | None = honoured(None, "text before every caption")
    caption_suffix: str | None = honoured(None, "text after every caption")
    caption_dropout_rate: float = honoured(0.0, "how often a caption is left empty", ge=0, le=1)
    caption_dropout_every_n_epochs: int = honoured(0, "leave all captions empty in every n-th epoch", ge=0)
    caption_tag_dropout_rate: float = honoured(0.0, "how often a tag is left out", ge=0, le=1)
    weighted_captions: bool = honoured(
        False, "captions may weigh words: (words:1.2), (words) for 1.1, [words] for 1/1.1; \\( is a plain bracket"
    )
    flip_aug: bool = honoured(False, "mirror half of the samples")
    random_crop: bool = honoured(False, "crop at a random place, not in the middle; not with cached latents")
    exact_crop_conditioning: bool = honoured(
        False,
        "tell SDXL models which part of each picture was really cut out, not an estimate from its size",
    )
    max_data_loader_n_workers: int = honoured(
        8, "threads that prepare batches; the result is the same for any number", ge=0
    )
    persistent_data_loader_workers: bool = equivalent(
        False, "keep loader workers between epochs", "workers are threads, which cost nothing to start"
    )
    cache_info: bool = equivalent(False, "keep sizes and captions in a file", "headers are read anew, in little time")
    in_json: str | None = refused(
        None, "metadata file with captions", "not supported yet; write captions beside the pictures"
    )
    token_warmup_min: int = refused(1, "tags at the start of training", _LATER, needs="token_warmup_step")
    token_warmup_step: float = refused(0.0, "step from which all tags are used", _LATER)
    color_aug: bool = refused(False, "vary hue and gamma", _LATER)
    face_crop_aug_range: str | None = refused(None, "crop around faces", _LATER)
    alpha_mask: bool = refused(False, "use the alpha channel as a mask of the loss", _LATER)
    masked_loss: bool = refused(False, "multiply the loss by mask pictures", _LATER)
    conditioning_data_dir: str | None = refused(None, "folder of mask pictures", _LATER)
    debug_dataset: bool = refused(False, "show samples and stop", "use --dry_run")
    dataset_class: str | None = refused(None, "a dataset class of your own", "use --dataset_config or folders")
    validation_split: float = refused(0.0, "share of the pictures kept for validation", _LATER)
    validation_seed: int | None = refused(None, "seed of the validation", _LATER, needs="validation_split")
    validate_every_n_steps: int | None = refused(None, "steps between validations", _LATER, needs="validation_split")
    validate_every_n_epochs: int | None = refused(None, "epochs between validations", _LATER, needs="validation_split")
    max_validation_steps: int | None = refused(None, "batches of a validation", _LATER, needs="validation_split")


class Caching(Group):
    """Caches"""

    cache_latents: bool = honoured(False, "encode every picture once, before training, and free the VAE")
    cache_latents_to_disk: bool = honoured(False, "the same, kept in .npz files beside the pictures")
    vae_batch_size: int = honoured(1, "pictures that the VAE encodes at a time", ge=1)
    trust_foreign_caches: Literal["yes", "no"] = honoured(
        "yes", "use .npz files written by sd-scripts where sizes and crop match; `no` makes them anew"
    )
    skip_cache_check: bool = honoured(
        False, "take cached latents at their word: neither pictures nor arrays are hashed to see whether they still fit"
    )
    cache_text_encoder_outputs: bool = honoured(
        False,
        "encode captions once, before training, and free the text encoders; captions that vary are encoded when they "
        "come. The text encoders can't be trained then",
    )
    cache_text_encoder_outputs_to_disk: bool = honoured(
        False, "the same, kept in _te_outputs.npz files beside the pictures"
    )
    text_memo_mb: int = honoured(
        256,
        "MiB of encoded captions to keep, so that one that comes again isn't encoded again (0: only the last)",
        ge=0,
    )
