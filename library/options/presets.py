"""`--preset`: ready settings from library/presets, below a config file and the command line, and the repeats of
pictures that they compute."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import Problem, nearest
from library.options.config_file import FromFile, read_config
from library.options.flags import Flag
from library.options.registry import Options, flags_of_script
from library.options.scripts import SCRIPTS, Script
from library.options.specs import DatasetSpec, SubsetSpec
from library.options.values import round_half_up, written

FOLDER = Path(__file__).resolve().parents[1] / "presets"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
_MISPLACED = {
    **dict.fromkeys(("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), "embeddings are trained"),
    "ti_train_steps_ratio": "only embeddings are trained",
}
_NOT_SHOWN = ("config_file", "output_config", "preset", "print_command", "dry_run")


@dataclass(frozen=True)
class Length:
    """How long a run of a preset is: optimizer steps, and the epochs that they make up."""

    steps: int
    epochs: int


@dataclass
class Preset:
    """What the presets of a run say together; `length` is that of the last one that has any. `name` is as written."""

    name: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    length: Length | None = None

    def add_length(self, file: FromFile, where: str) -> None:
        """The `[preset]` table of a file: how long the run is."""
        if not file.preset:
            return
        wanted = {"steps", "epochs"}
        values = [file.preset.get(name) for name in ("steps", "epochs")]
        if set(file.preset) != wanted or not all(type(value) is int and value > 0 for value in values):
            wrong = "[preset] is no table of steps and epochs"
            self.problems.append(Problem(where, wrong, "such as steps = 2000 and epochs = 10"))
            return
        self.length = Length(*(int(str(value)) for value in values))


def names() -> list[str]:
    """The presets that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_presets(text: str, where: str) -> Preset:
    """The presets named in `text`, one or several with commas between; a later one wins."""
    found = Preset(text)
    for name in filter(None, (part.strip() for part in text.split(","))):
        path = FOLDER / f"{name}.toml"
        if name not in names():
            advice = nearest(name, names()) or f"there are {', '.join(names())}"
            found.problems.append(Problem(where, f"there is no preset {name}", advice))
            continue
        file = read_config(path)
        found.problems += file.problems
        found.values |= file.values
        found.places |= {key: f"preset {name}: {key}" for key in file.values}
        found.add_length(file, str(path))
    return found


def settle(values: dict[str, Any], places: dict[str, str], script: Script) -> list[str]:
    """Drop from all that was said what the run can't do: of what a preset says, a cache of text that embeddings change,
    and of what a file says, too, which may be meant for both scripts, the end of embeddings before that of the run
    where nothing else is trained. The lines that tell it."""
    lines = []
    for name, why in _MISPLACED.items():
        place = places.get(name, "")
        if name == "ti_train_steps_ratio":
            moot = "network" in script.without and bool(place) and not place.startswith("--")
        else:
            moot = bool(values.get("token_string")) and place.startswith("preset ")
        if moot:
            del values[name]
            del places[name]
            lines.append(f"{'--' if place.startswith('preset ') else ''}{place}: left out, because {why}")
    return lines


def repeats(
    length: Length, once: Sequence[DatasetSpec], twice: Sequence[DatasetSpec], batches: int = 1
) -> tuple[int, int]:
    """(repeats, pictures) with which subsets that name no repeats make epochs of the preset's length; (1, 0) where
    every subset names its own. Pictures that are held out for validation are no part of it.

    Args:
        once, twice: the datasets if `--dataset_repeats` is 1 and 2: subsets that differ follow the flag.
        batches: so many batches make a step: one for each process, and for each micro-step that is accumulated.
    """
    following, samples, batch = 0, 0, 1
    for one, two in zip(once, twice, strict=True):
        for subset, other in zip(one.subsets, two.subsets, strict=True):
            count = _trained(subset)
            batch = max(batch, one.batch_size if count else 1)
            if subset.num_repeats != other.num_repeats:
                following += count
            else:
                samples += count * subset.num_repeats
    wanted = length.steps * batch * batches / length.epochs - samples
    return (max(1, round(wanted / following)), following) if following else (1, 0)


def _trained(subset: SubsetSpec) -> int:
    """How many pictures of a folder are trained on. Those held out are no part of it."""
    if subset.is_reg or subset.source != "folder":
        return 0
    paths = subset.image_dir.rglob("*") if subset.recursive else subset.image_dir.iterdir()
    count = sum(path.suffix.lower() in _PICTURES for path in paths)
    return count - round_half_up(count, subset.validation_split)


def command(options: Options) -> str:
    """The full command that the options amount to: every flag that was set, wherever; secrets are left out."""
    lines = [f"accelerate launch {SCRIPTS[options.script].file}"]
    for name, flag in flags_of_script(options.script).items():
        value = options.value(name)
        if name in options.explicit and name not in _NOT_SHOWN and not flag.secret and value != flag.default:
            lines.append(_words(flag, value))
    return " \\\n  ".join(lines)


def _words(flag: Flag, value: Any) -> str:
    """A flag as it is typed; switches are off by default, so that a set one needs no value."""
    plain = written(value)
    if flag.shape == "flag":
        return flag.option
    if flag.shape == "size" and not flag.many:
        plain = ",".join(str(side) for side in plain)
    elif flag.shape == "size":
        plain = [",".join(str(side) for side in size) for size in plain]
    items = plain if isinstance(plain, list) else [plain]
    return f"{flag.option} {' '.join(shlex.quote(str(item)) for item in items)}"
