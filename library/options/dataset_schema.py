"""The keys of a dataset file: what each may hold, at which levels it stands, and which flag it falls back to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from library.errors import nearest
from library.options.flags import Flag
from library.options.registry import FLAGS

Level = Literal["general", "dataset", "subset"]
TITLES: Mapping[Level, str] = {"general": "[general]", "dataset": "[[datasets]]", "subset": "[[datasets.subsets]]"}
_EVERYWHERE: tuple[Level, ...] = ("general", "dataset", "subset")
_DATASET: tuple[Level, ...] = ("general", "dataset")
_SUBSET: tuple[Level, ...] = ("subset",)


@dataclass(frozen=True)
class Key:
    """A key: how its value is read (as a flag's), its levels, and the flag that counts where no level names it.

    A list may also be written as a table with the keys `parts`, in their order.
    """

    value: Flag
    levels: tuple[Level, ...]
    fallback: str | None = None
    parts: tuple[str, ...] = ()

    def title(self) -> str:
        """Its levels in words."""
        return " or ".join(TITLES[level] for level in self.levels)


def _from_flags(levels: tuple[Level, ...], names: str) -> dict[str, Key]:
    return {name: Key(FLAGS[name], levels, name) for name in names.split()}


def _renamed(levels: tuple[Level, ...], name: str, flag: str) -> dict[str, Key]:
    return {name: Key(replace(FLAGS[flag], name=name), levels, flag)}


def _own(levels: tuple[Level, ...], value: Flag) -> dict[str, Key]:
    return {value.name: Key(value, levels)}


_INTERPOLATION = replace(FLAGS["resize_interpolation"], choices=(*FLAGS["resize_interpolation"].choices, "box"))
_REPEATS = replace(
    FLAGS["dataset_repeats"], limits=(), text="how often a picture is shown in an epoch; 0 leaves it out"
)

KEYS: Mapping[str, Key] = {
    **_renamed(_DATASET, "batch_size", "train_batch_size"),
    **_from_flags(
        _DATASET,
        "resolution more_resolutions enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale "
        "bucket_choice validation_seed",
    ),
    "aspect_ratio_buckets": Key(
        FLAGS["aspect_ratio_buckets"],
        _DATASET,
        "aspect_ratio_buckets",
        ("target_resolution", "start_dim", "end_dim", "divisible_by"),
    ),
    **_own(_DATASET, Flag("network_multiplier", "float", 1.0, text="strength of the network while it is trained")),
    "resize_interpolation": Key(_INTERPOLATION, _EVERYWHERE, "resize_interpolation"),
    "num_repeats": Key(replace(_REPEATS, name="num_repeats"), _EVERYWHERE, "dataset_repeats"),
    **_from_flags(
        _EVERYWHERE,
        "shuffle_caption caption_separator caption_extension keep_tokens keep_tokens_separator secondary_separator "
        "enable_wildcard caption_prefix caption_suffix caption_dropout_rate caption_dropout_every_n_epochs "
        "caption_tag_dropout_rate flip_aug random_crop cache_info color_aug token_warmup_min token_warmup_step "
        "recursive caption_from shuffle_caption_delimiter caption_preset caption_templates keep_original_captions "
        "keep_in_memory validation_split",
    ),
    "face_crop_aug_range": Key(
        replace(FLAGS["face_crop_aug_range"], shape="float", many=True), _EVERYWHERE, "face_crop_aug_range"
    ),
    **_own(_EVERYWHERE, Flag("custom_attributes", "table", None, text="a free table, handed on with every sample")),
    **_own(_EVERYWHERE, Flag("class_tokens", "str", None, text="caption of pictures that have none")),
    **_own(_SUBSET, Flag("image_dir", "path", None, text="folder of pictures")),
    **_own(_SUBSET, Flag("is_reg", "flag", False, text="these are regularization pictures")),
    **_from_flags(_SUBSET, "alpha_mask conditioning_data_dir"),
    **_own(_SUBSET, Flag("metadata_file", "path", None, text="metadata file (.json or .jsonl) with captions and tags")),
    **_own(_SUBSET, Flag("jsonl_path", "path", None, text="a .jsonl file with columns for picture, caption and mask")),
    **_own(_SUBSET, Flag("dataset_name", "str", None, text="a Hugging Face dataset: hub id or local path")),
    **_own(_SUBSET, Flag("dataset_config_name", "str", None, text="configuration of the Hugging Face dataset")),
    **_own(_SUBSET, Flag("hf_cache_dir", "path", None, text="where Hugging Face datasets are downloaded to")),
    **_own(_SUBSET, Flag("image_column", "str", "image", text="column of the pictures")),
    **_own(_SUBSET, Flag("caption_column", "str", "text", text="column of the captions")),
    **_own(_SUBSET, Flag("mask_column", "str", "mask", text="column of the masks, where there is one")),
}
SOURCES = ("metadata_file", "jsonl_path", "dataset_name")
"""Keys of which a subset has at most one, besides `image_dir`."""
_OTHER_NAMES = {key.fallback: name for name, key in KEYS.items() if key.fallback and key.fallback != name}


def advice(name: str, level: Level) -> str:
    """What to do about the unknown key `name` at `level`: another level, another name, or a flag."""
    if name in KEYS:
        return f"it belongs in {KEYS[name].title()}"
    if name in _OTHER_NAMES:
        return f"it is called {_OTHER_NAMES[name]} here"
    if name in FLAGS:
        return f"it is no key of a dataset file; use the flag --{name}"
    here = [known for known, key in KEYS.items() if level in key.levels]
    return nearest(name, here) or nearest(name, KEYS) or f"known are {', '.join(sorted(here))}"
