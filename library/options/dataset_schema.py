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
_LATER = "not supported yet; leave it out"


@dataclass(frozen=True)
class Key:
    """A key: how its value is read (as a flag's), its levels, and the flag that counts where no level names it."""

    value: Flag
    levels: tuple[Level, ...]
    fallback: str | None = None

    @property
    def off(self) -> object:
        """The value with which a refused key does nothing."""
        return self.value.default

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
        "resolution enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale "
        "validation_split validation_seed",
    ),
    **_own(
        _DATASET, Flag("network_multiplier", "float", 1.0, text="strength of the network", kind="refused", why=_LATER)
    ),
    "resize_interpolation": Key(_INTERPOLATION, _EVERYWHERE, "resize_interpolation"),
    "num_repeats": Key(replace(_REPEATS, name="num_repeats"), _EVERYWHERE, "dataset_repeats"),
    **_from_flags(
        _EVERYWHERE,
        "shuffle_caption caption_separator caption_extension keep_tokens keep_tokens_separator secondary_separator "
        "enable_wildcard caption_prefix caption_suffix caption_dropout_rate caption_dropout_every_n_epochs "
        "caption_tag_dropout_rate flip_aug random_crop cache_info color_aug token_warmup_min token_warmup_step",
    ),
    "face_crop_aug_range": Key(replace(FLAGS["face_crop_aug_range"], shape="float", many=True), _EVERYWHERE),
    **_own(_EVERYWHERE, Flag("custom_attributes", "table", None, text="a free table", kind="refused", why=_LATER)),
    **_own(_EVERYWHERE, Flag("class_tokens", "str", None, text="caption of pictures that have none")),
    **_own(_SUBSET, Flag("image_dir", "path", None, text="folder of pictures")),
    **_own(_SUBSET, Flag("is_reg", "flag", False, text="these are regularization pictures")),
    **_from_flags(_SUBSET, "alpha_mask conditioning_data_dir"),
    **_own(
        _SUBSET,
        Flag(
            "metadata_file", "path", None, text="metadata file with captions", kind="refused", why=FLAGS["in_json"].why
        ),
    ),
}
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
