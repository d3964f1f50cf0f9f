"""A dataset file and a training file for a folder of pictures: what the presets say, fitted to what lies there.

Pure: facts in, texts out. The folder is looked at by data.survey; presets are library/presets.
"""

import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.errors import UserError
from library.options.config_file import toml_value
from library.options.dataset_schema import KEYS
from library.options.presets import Length, Preset, read_presets, settle
from library.options.registry import FLAGS, flags_of_script
from library.options.scripts import TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION, Script
from library.options.values import round_half_up

Goal = Literal["character", "style"]
PRESET_OF: dict[Goal, str] = {"character": "character", "style": "style-soft"}
_VARIED = ("flip_aug", "caption_dropout_rate", "caption_tag_dropout_rate")
_OF_DATASETS = ("enable_bucket", "shuffle_caption", "keep_tokens", *_VARIED)
_OF_TASKS = ("pretrained_model_name_or_path", "train_data_dir", "dataset_config", "output_dir", "output_name")
_LENGTHS = ("max_train_steps", "max_train_epochs", "dataset_repeats")
_STEP = 64
_MOST_EPOCHS = 100
_USUAL = Length(2000, 10)
_LARGE = 768


@dataclass(frozen=True)
class Subset:
    """One folder: its pictures, how many of them have captions and in files of which ending, and what its name
    `10_mycat` says."""

    folder: Path
    count: int
    captioned: int
    extension: str | None = None
    repeats: int | None = None
    words: str = ""


@dataclass(frozen=True)
class Wish:
    """What is to be trained.

    Attributes:
        preset: as `--preset` is written; "" takes the goal's. One that trains nothing by itself is put on the goal's.
        model: `--pretrained_model_name_or_path`.
        side: pixels of the squares that the base model was made for.
        usual_side: of a square with as many pixels as the middle one of the pictures.
        trigger: the word that is to mean it; "" for none.
        named: it stands in most captions already.
        extension: of most caption files; None without any.
        tags: captions are lists of tags.
        steps: None takes the preset's.
        bad: how many pictures can't be read.
    """

    goal: Goal
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
    bad: int = 0


@dataclass(frozen=True)
class Proposal:
    """Both texts, and what they amount to: samples an epoch, and optimizer steps, as far as buckets don't add any.
    `preset` is what was taken, `script` is the file that trains it."""

    dataset: str
    training: str
    preset: str
    script: str
    resolution: int
    samples: int
    epochs: int
    steps: int


def stands_in(word: str, text: str) -> bool:
    """Whether a word, or several in a row, stands in a text: whole, in any case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags=re.IGNORECASE) is not None


def propose(wish: Wish, subsets: Sequence[Subset], dataset_file: Path) -> Proposal:
    """Write both texts; `dataset_file` is where the first will stand.

    Raises:
        UserError: there is no such preset, it is a task with pictures of its own, or it trains a new word and there is
            no trigger.
    """
    preset, script = _preset(wish)
    held_out = _drop_empty_split(preset, subsets)
    values, length = dict(preset.values), preset.length or _USUAL
    length = Length(wish.steps or length.steps, length.epochs)
    batch, at_once = int(values.get("train_batch_size", 1)), int(values.get("gradient_accumulation_steps", 1))
    numbered = any(subset.repeats for subset in subsets)
    pictures = sum(subset.count for subset in subsets)
    common = max(1, round(length.steps * batch * at_once / length.epochs / pictures))
    repeats = [subset.repeats or 1 if numbered else common for subset in subsets]
    samples = sum(count * subset.count for count, subset in zip(repeats, subsets, strict=True))
    fitted = min(batch, samples)
    a_time = math.ceil(math.ceil(samples / fitted) / at_once)
    epochs = min(_MOST_EPOCHS, max(1, round(length.steps / a_time)))
    resolution = _resolution(wish)
    sizes = _sizes(wish, resolution, fitted, "the preset's" if fitted == batch else "all there are")
    why = f"so that {length.epochs} epochs of {pictures} pictures make about {length.steps} steps"
    parts = (
        "# What is trained on: pictures, captions, sizes. Every key is explained in docs/datasets.md.",
        "[general]",
        *_general(wish, values),
        "",
        "[[datasets]]",
        *sizes,
        *(
            ()
            if "validation_split" in values
            else (held_out or "# validation_split = 0.1        # holds pictures out",)
        ),
        *(
            line
            for subset, count in zip(subsets, repeats, strict=True)
            for line in _subset(wish, values, subset, _line("num_repeats", count, _reason(subset) if numbered else why))
        ),
    )
    dataset = "\n".join(parts)
    training = "\n".join(_training(wish, preset, script, dataset, dataset_file, epochs, a_time))
    steps = a_time * epochs
    return Proposal(dataset + "\n", training + "\n", preset.name, script.file, resolution, samples, epochs, steps)


def _reason(subset: Subset) -> str:
    return "as the folder's name says" if subset.repeats else "other folders' names say theirs, this one's doesn't"


def _drop_empty_split(preset: Preset, subsets: Sequence[Subset]) -> str:
    """Take away a share of pictures to hold out that is none of any folder, and what needs it; a line that says so."""
    split = preset.values.get("validation_split")
    if not split or any(round_half_up(subset.count, split) for subset in subsets):
        return ""
    for name in ("validation_split", "early_stopping_patience"):
        preset.values.pop(name, None)
    return f"# validation_split = {split}        # would hold none of so few pictures out"


def _preset(wish: Wish) -> tuple[Preset, Script]:
    """The settings to start from, without what can't go together, and the script that trains them."""
    name = wish.preset or PRESET_OF[wish.goal]
    found = read_presets(name, "--preset")
    if not found.problems and not found.values.keys() & {"network_module", *_OF_TASKS} and not _of_words(found):
        found = read_presets(f"{PRESET_OF[wish.goal]},{name}", "--preset")
    if found.problems:
        raise UserError(found.problems)
    if own := [key for key in _OF_TASKS if key in found.values]:
        wrong = f"{name} is a whole task, with {' and '.join(own[:2])} of its own"
        raise UserError.single("--preset", wrong, "run it as it is, or start from another, such as character")
    script = TRAIN_NETWORK if "network_module" in found.values else TRAIN_TEXTUAL_INVERSION
    if _of_words(found):
        if not wish.trigger or len(wish.trigger.split()) > 1:
            wrong = f"{wish.trigger!r} is more than one word" if wish.trigger else "is missing"
            raise UserError.single("--trigger", wrong, f"{name} trains a new word: give it, such as mycat")
        found.values["token_string"], found.places["token_string"] = wish.trigger, "--trigger"
    settle(found.values, found.places, script)
    if found.values.get("network_train_unet_only"):
        found.values.pop("text_encoder_lr", None)
    return found, script


def _of_words(preset: Preset) -> bool:
    """Whether it trains the vectors of a new word."""
    return any(name in FLAGS and FLAGS[name].group == "embeddings" for name in preset.values)


def _resolution(wish: Wish) -> int:
    """The base model's own, or a smaller one where most pictures have fewer pixels."""
    return min(wish.side, max(_STEP, wish.usual_side // _STEP * _STEP))


def _general(wish: Wish, values: dict[str, Any]) -> Iterator[str]:
    kept = {name: values[name] for name in _OF_DATASETS if name in values}
    if "caption_preset" in values:
        yield "# Captions are templates around the word; keep_original_captions = true adds those of the pictures."
    else:
        if wish.extension:
            yield _line("caption_extension", wish.extension, "captions stand beside the pictures")
        what = "lists of tags" if wish.tags else "sentences"
        yield _line("shuffle_caption", wish.tags, f"captions are {what}" if wish.extension else "there are no tags")
        leads = wish.tags and bool(wish.trigger) and kept.get("keep_tokens", 0) > 0
        why = "the first tag stays first" if leads else "nothing has to stay first"
        yield _line("keep_tokens", 1 if leads else 0, why)
        if _prefixed(wish):
            yield _line("caption_prefix", f"{wish.trigger},", "the word that means it, put before every caption")
    for name in _VARIED:
        if name in kept and (name != "caption_tag_dropout_rate" or wish.tags):
            yield _line(name, kept[name], "the preset's")


def _prefixed(wish: Wish) -> bool:
    return bool(wish.trigger and wish.extension) and not wish.named


def _sizes(wish: Wish, resolution: int, batch: int, whose: str) -> Iterator[str]:
    small = resolution < wish.side
    why = f"most pictures are smaller than the {wish.side} that the model was made for" if small else "the model's own"
    yield _line("resolution", resolution, why)
    yield _line("batch_size", batch, whose)
    yield _line("enable_bucket", True, "pictures keep their aspect ratio")
    if resolution < 512:
        yield _line("min_bucket_reso", max(_STEP, resolution // 2 // _STEP * _STEP), "half the resolution")
        yield _line("max_bucket_reso", 2 * resolution, "twice the resolution")
    yield _line("bucket_no_upscale", False, "true leaves small pictures small")


def _subset(wish: Wish, values: dict[str, Any], subset: Subset, repeats: str) -> Iterator[str]:
    yield ""
    yield "  [[datasets.subsets]]"
    yield f"  # {subset.count} pictures, {subset.captioned} of them with captions"
    yield "  " + _line("image_dir", str(subset.folder))
    yield "  " + repeats
    if "caption_preset" in values:
        return
    if subset.extension and subset.extension != wish.extension:
        yield "  " + _line("caption_extension", subset.extension, "captions here end otherwise")
    words = subset.words or ("" if _prefixed(wish) else wish.trigger)
    if wish.trigger and stands_in(wish.trigger, words) == _prefixed(wish):
        words = _without(wish.trigger, words) if _prefixed(wish) else f"{wish.trigger} {words}"
    if words:
        without = subset.count - subset.captioned
        yield "  " + _line("class_tokens", words, f"the caption of the {without} without one" if without else "")


def _without(word: str, text: str) -> str:
    """A text without a word that the prefix puts before it."""
    return " ".join(re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", text, flags=re.IGNORECASE).split())


def _training(
    wish: Wish, preset: Preset, script: Script, dataset: str, dataset_file: Path, epochs: int, a_time: int
) -> Iterator[str]:
    yield f"# How it is trained: the preset {preset.name}, fitted to the pictures. docs/options.md explains every key."
    yield f"#     accelerate launch {script.file} --config_file {wish.output_name}.toml"
    yield _line("pretrained_model_name_or_path", wish.model)
    yield _line("dataset_config", str(dataset_file))
    yield _line("output_dir", wish.output_dir)
    yield _line("output_name", wish.output_name)
    values = {name: value for name, value in preset.values.items() if name in flags_of_script(script.name)}
    if "token_string" in values:
        yield _line("token_string", values.pop("token_string"), "the new word")
        yield '# init_word = "..."             # a word for what it is: the vectors learn sooner from it'
    if wish.bad:
        one = "1 picture" if wish.bad == 1 else f"{wish.bad} pictures"
        yield _line("skip_bad_images", True, f"{one} can't be read")
    yield ""
    yield f"# As {preset.name} has it:"
    left_out = {*_said_by(dataset), *_OF_DATASETS, *_LENGTHS}
    for name, value in values.items():
        if name not in left_out:
            yield _line(name, value)
    if wish.side > _LARGE and "gradient_checkpointing" not in values:
        yield _line(
            "gradient_checkpointing", True, f"the model is large (it draws {wish.side} pixels): less memory, more time"
        )
    yield ""
    yield _line("max_train_epochs", epochs, f"about {a_time} steps each, {a_time * epochs} in all")
    if "save_every_n_epochs" not in values:
        yield _line("save_every_n_epochs", max(1, epochs // 5), "five times or so, to choose from")
    if "seed" not in values:
        yield _line("seed", 42, "any number: the same one gives the same result")


def _said_by(dataset: str) -> set[str]:
    """Flags that a dataset file counts instead of, for all of its pictures."""
    content = tomllib.loads(dataset)
    names = {*content["general"], *content["datasets"][0], "num_repeats"}
    return {KEYS[name].fallback or name for name in names if name in KEYS}


def _line(name: str, value: Any, why: str = "") -> str:
    line = f"{name} = {toml_value('', value)}"
    return f"{line:<31} # {why}" if why else line
