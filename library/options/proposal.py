"""A dataset file and a training file for a folder of pictures: what the presets say, fitted to what lies there.

Pure: facts in, texts out. The folder is looked at by data.survey; presets are library/presets.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.errors import UserError
from library.options.config_file import toml_value
from library.options.presets import Length, read_presets

Goal = Literal["character", "style"]
PRESET_OF: dict[Goal, str] = {"character": "character", "style": "style-soft"}
_VARIED = ("flip_aug", "caption_dropout_rate", "caption_tag_dropout_rate")
_OF_DATASETS = ("enable_bucket", "shuffle_caption", "keep_tokens", *_VARIED)
_STEP = 64
_MOST_EPOCHS = 100
_USUAL = Length(2000, 10)
_LARGE = 768


@dataclass(frozen=True)
class Subset:
    """One folder: its pictures, how many of them have captions, and what its name `10_mycat` says."""

    folder: Path
    count: int
    captioned: int
    repeats: int | None = None
    words: str = ""


@dataclass(frozen=True)
class Wish:
    """What is to be trained.

    Attributes:
        model: `--pretrained_model_name_or_path`.
        side: pixels of the squares that the base model was made for.
        usual_side: of a square with as many pixels as the middle one of the pictures.
        trigger: the word that is to mean it; "" for none.
        named: it stands in most captions already.
        extension: of the caption files; None without any.
        tags: captions are lists of tags.
        steps: None takes the preset's.
    """

    preset: str
    model: str
    side: int
    usual_side: int
    trigger: str
    named: bool
    extension: str | None
    tags: bool
    output_dir: str
    output_name: str
    steps: int | None = None


@dataclass(frozen=True)
class Proposal:
    """Both texts, and what they amount to: samples an epoch, and optimizer steps, as far as buckets don't add any."""

    dataset: str
    training: str
    resolution: int
    samples: int
    epochs: int
    steps: int


def propose(wish: Wish, subsets: Sequence[Subset], dataset_file: Path) -> Proposal:
    """Write both texts; `dataset_file` is where the first will stand.

    Raises:
        UserError: there is no such preset.
    """
    preset = read_presets(wish.preset, "--preset")
    if preset.problems:
        raise UserError(preset.problems)
    values, length = dict(preset.values), preset.length or _USUAL
    length = Length(wish.steps or length.steps, length.epochs)
    batch = int(values.get("train_batch_size", 1))
    numbered = all(subset.repeats for subset in subsets)
    pictures = sum(subset.count for subset in subsets)
    common = max(1, round(length.steps * batch / length.epochs / pictures))
    repeats = [subset.repeats or 1 if numbered else common for subset in subsets]
    samples = sum(count * subset.count for count, subset in zip(repeats, subsets, strict=True))
    batch = min(batch, samples)
    a_time = math.ceil(samples / batch)
    epochs = min(_MOST_EPOCHS, max(1, round(length.steps / a_time)))
    resolution = _resolution(wish)
    dataset = "\n".join(_dataset(wish, values, list(zip(subsets, repeats, strict=True)), resolution, batch, numbered))
    training = "\n".join(_training(wish, values, dataset_file, epochs, a_time))
    return Proposal(dataset + "\n", training + "\n", resolution, samples, epochs, a_time * epochs)


def _resolution(wish: Wish) -> int:
    """The base model's own, or a smaller one where most pictures have fewer pixels."""
    return min(wish.side, max(_STEP, wish.usual_side // _STEP * _STEP))


def _dataset(
    wish: Wish,
    values: dict[str, Any],
    subsets: Sequence[tuple[Subset, int]],
    resolution: int,
    batch: int,
    numbered: bool,
) -> Iterator[str]:
    kept = {name: values[name] for name in _OF_DATASETS if name in values}
    yield "# What is trained on: pictures, captions, sizes. Every key is explained in docs/datasets.md."
    yield "[general]"
    if wish.extension:
        yield _line("caption_extension", wish.extension, "captions stand beside the pictures")
    yield _line("shuffle_caption", wish.tags, "captions are lists of tags" if wish.tags else "captions are sentences")
    leads = wish.tags and bool(wish.trigger) and kept.get("keep_tokens", 0) > 0
    yield _line("keep_tokens", 1 if leads else 0, "the first tag stays first" if leads else "nothing has to stay first")
    if wish.trigger and wish.extension and not wish.named:
        yield _line("caption_prefix", f"{wish.trigger},", "the word that means it, put before every caption")
    for name in _VARIED:
        if name in kept and (name != "caption_tag_dropout_rate" or wish.tags):
            yield _line(name, kept[name])
    yield ""
    yield "[[datasets]]"
    small = resolution < wish.side
    why = f"most pictures are smaller than the {wish.side} that the model was made for" if small else "the model's own"
    yield _line("resolution", resolution, why)
    yield _line("batch_size", batch)
    yield _line("enable_bucket", True, "pictures keep their aspect ratio")
    if resolution < 512:
        yield _line("min_bucket_reso", max(_STEP, resolution // 2 // _STEP * _STEP))
        yield _line("max_bucket_reso", 2 * resolution)
    yield _line("bucket_no_upscale", False, "true leaves small pictures small")
    yield "# validation_split = 0.1        # holds pictures out, so that you see when to stop"
    for subset, count in subsets:
        yield ""
        yield "  [[datasets.subsets]]"
        yield f"  # {subset.count} pictures, {subset.captioned} of them with captions"
        yield "  " + _line("image_dir", str(subset.folder))
        yield "  " + _line("num_repeats", count, "as the folder's name says" if numbered else "")
        words = subset.words or wish.trigger
        if words:
            without = subset.count - subset.captioned
            yield "  " + _line("class_tokens", words, f"the caption of the {without} without one" if without else "")


def _training(wish: Wish, values: dict[str, Any], dataset_file: Path, epochs: int, a_time: int) -> Iterator[str]:
    yield f"# How it is trained: the preset {wish.preset}, fitted to the pictures. docs/options.md explains every key."
    yield f"#     accelerate launch train_network.py --config_file {wish.output_name}.toml"
    yield _line("pretrained_model_name_or_path", wish.model)
    yield _line("dataset_config", str(dataset_file))
    yield _line("output_dir", wish.output_dir)
    yield _line("output_name", wish.output_name)
    yield ""
    for name, value in values.items():
        if name not in (*_OF_DATASETS, "train_batch_size"):
            yield _line(name, value)
    if wish.side > _LARGE and "gradient_checkpointing" not in values:
        yield _line("gradient_checkpointing", True, "less memory, more time")
    yield ""
    yield _line("max_train_epochs", epochs, f"about {a_time} steps each, {a_time * epochs} in all")
    yield _line("save_every_n_epochs", max(1, epochs // 5))
    yield _line("seed", 42)


def _line(name: str, value: Any, why: str = "") -> str:
    line = f"{name} = {toml_value('', value)}"
    return f"{line:<31} # {why}" if why else line
