"""Flags of the pictures and captions, and of the caches made from them."""

from pathlib import Path
from typing import Literal

from library.options.flags import Group, equivalent, honoured


class Dataset(Group):
    """Pictures and captions"""

    train_data_dir: Path | None = honoured(
        None,
        "folder that holds `<repeats>_<name>` folders of pictures; where new tokens are trained, pictures may stand "
        "directly in it, too",
    )
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
    cache_info: bool = equivalent(
        False, "keep sizes and captions in a file", "an index of our own remembers them, and notices changes"
    )
    in_json: Path | None = honoured(
        None, "metadata file (.json or .jsonl) with captions and tags; names in it are relative to --train_data_dir"
    )
    recursive: bool = honoured(False, "pictures in sub-folders too")
    caption_from: Literal["file", "filename", "class_tokens"] = honoured(
        "file", "captions come from caption files, from the pictures' names, or are all the class tokens"
    )
    shuffle_caption_delimiter: str | None = honoured(
        None, "shuffle the parts between these; the same as --shuffle_caption with this --caption_separator"
    )
    caption_preset: Literal["object", "style"] | None = honoured(
        None, "caption templates that come with lorasmith, for an object or for a style"
    )
    caption_templates: tuple[str, ...] | None = honoured(
        None,
        "templates of which one is drawn for each caption; {} stands for the new token, class tokens or caption",
    )
    keep_original_captions: bool = honoured(False, "put the template before the caption, not in its place")
    token_warmup_min: int = honoured(1, "tags of a caption that are used at the start of a token warmup", ge=0)
    token_warmup_step: float = honoured(0.0, "step from which all tags are used; below 1 a fraction of all steps", ge=0)
    color_aug: bool = honoured(False, "vary hue and gamma a little; not with cached latents")
    face_crop_aug_range: str | None = honoured(
        None,
        "crop around faces that the files' names tell (tools/detect_faces.py), scaled so that a face's larger side is "
        "1/MAX to 1/MIN of the picture's; not with cached latents",
        metavar="MIN,MAX",
    )
    aspect_ratio_buckets: tuple[int, ...] | None = honoured(
        None,
        "invoke-training's buckets: target resolution, shortest and longest side, and what sides are divisible by",
        metavar="N",
        each_ge=1,
    )
    bucket_choice: Literal["ratio", "log_ratio"] = honoured(
        "ratio", "a picture's bucket is the nearest by aspect ratio (as sd-scripts), or by its logarithm"
    )
    more_resolutions: tuple[tuple[int, int], ...] | None = honoured(
        None, "train every picture at these sizes too, each as a dataset of its own", metavar="W,H"
    )
    max_crop_loss: float | None = honoured(
        None, "name pictures of which more than this fraction is cropped away", ge=0, le=1
    )
    skip_small_images: bool = honoured(
        False, "with --bucket_no_upscale, leave out pictures that are too small for a bucket"
    )
    skip_bad_images: bool = honoured(False, "leave out pictures that can't be read")
    verify_images: bool = honoured(False, "decode every picture before anything else, to find damaged ones")
    keep_in_memory: bool = honoured(False, "keep decoded pictures in memory; for runs without cached latents")
    alpha_mask: bool = honoured(False, "use the alpha channel as a mask of the loss")
    masked_loss: bool = honoured(False, "multiply the loss by mask pictures (conditioning_data_dir, mask columns)")
    conditioning_data_dir: Path | None = honoured(
        None, "folder of mask pictures with the pictures' names, for --masked_loss"
    )
    debug_dataset: bool = honoured(
        False, "write pictures of what the model would see into --output_dir, with captions and masks, and stop"
    )
    dataset_class: str | None = honoured(
        None, "package.module.Class: a dataset of your own, which gives batches", metavar="CLASS"
    )
    validation_split: float = honoured(0.0, "fraction of the pictures that is held out for validation", ge=0, le=1)
    validation_seed: int | None = honoured(
        None, "seed of the split and of validation's noise, whatever --seed is (default: 0)", ge=0
    )
    validate_every_n_steps: int | None = honoured(None, "steps between validations", ge=1)
    validate_every_n_epochs: int | None = honoured(None, "epochs between validations (default: 1)", ge=1)
    max_validation_steps: int | None = honoured(None, "batches of a validation at most", ge=1)


class Caching(Group):
    """Caches"""

    cache_latents: bool = honoured(False, "encode every picture once, before training, and free the VAE")
    cache_latents_to_disk: bool = honoured(False, "the same, kept in .npz files beside the pictures")
    latent_sampling: Literal["mean", "sample"] = honoured(
        "mean", "train on the mean of the VAE's distribution, or on a new draw from it each time"
    )
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
