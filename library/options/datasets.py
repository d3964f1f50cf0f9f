"""What to train on, as frozen specs: from --dataset_config, or from folders named `<repeats>_<name>`.

A parameter is looked up in the subset, its dataset, [general], the flags and the default, in this order. Pictures are
not looked for here (data.sources), only their folders.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError
from library.options.dataset_file import Table, read_dataset_file
from library.options.dataset_schema import KEYS
from library.options.registry import Options
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"}


@dataclass
class Datasets:
    """What was found, lines to show, and what is wrong."""

    specs: list[DatasetSpec] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def load_datasets(options: Options) -> tuple[DatasetSpec, ...]:
    """The datasets that `options` ask for. `parse` has already shown the notices.

    Raises:
        UserError: with every problem of the dataset file or of the folders.
    """
    found = read_datasets(options)
    if found.problems:
        raise UserError(dict.fromkeys(found.problems))
    return tuple(found.specs)


def read_datasets(options: Options, bad: frozenset[str] = frozenset()) -> Datasets:
    """Specs, notices and problems together; flags in `bad` have been complained about already."""
    found = Datasets()
    flags = options.dataset
    if flags.dataset_config is not None:
        _from_file(options, flags.dataset_config, found, bad)
    elif flags.train_data_dir is not None:
        _from_folders(options, flags.train_data_dir, found, bad)
    return found


@dataclass(frozen=True)
class _Lookup:
    """Tables from the innermost to [general], then the flags."""

    options: Options
    tables: tuple[Table, ...]

    def find(self, name: str) -> tuple[Any, str]:
        """The value of a key and the place where it was set."""
        for table in self.tables:
            if name in table.values:
                return table.values[name], table.places[name]
        key = KEYS[name]
        if key.fallback is None:
            return key.value.default, name
        return self.options.value(key.fallback), self.options.where(key.fallback)

    def __getitem__(self, name: str) -> Any:
        return self.find(name)[0]

    def inner(self, table: Table) -> "_Lookup":
        return _Lookup(self.options, (table, *self.tables))

    def extension(self) -> tuple[str, bool]:
        """The extension of caption files with its dot, and whether the user named it."""
        in_file = any("caption_extension" in table.values for table in self.tables)
        old = self.options.dataset.caption_extention
        text = old if old is not None and not in_file else str(self["caption_extension"])
        named = in_file or bool(self.options.explicit & {"caption_extension", "caption_extention"})
        return text if text.startswith(".") else f".{text}", named


def _from_file(options: Options, path: Path, found: Datasets, bad: frozenset[str]) -> None:
    for name in ("train_data_dir", "reg_data_dir"):
        if options.value(name) is not None:
            found.notices.append(f"{options.where(name)}: ignored, because --dataset_config names the folders")
    file = read_dataset_file(path, options.where("dataset_config"))
    found.problems += file.problems
    found.notices += file.notices
    general = _Lookup(options, (file.general,))
    for table, subset_tables in file.datasets:
        lookup = general.inner(table)
        subsets: list[SubsetSpec] = []
        for inner in subset_tables:
            subset = _subset_of_table(lookup.inner(inner), inner, found)
            if subset is None:
                continue
            if any(_same(subset.image_dir, other.image_dir) for other in subsets):
                found.notices.append(f"{subset.where}: ignored, because this dataset already has {subset.image_dir}")
                continue
            subsets.append(subset)
        _add(lookup, table.where, subsets, found, bad, file_is_wrong=bool(file.problems))


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _subset_of_table(lookup: _Lookup, table: Table, found: Datasets) -> SubsetSpec | None:
    folder = table.values.get("image_dir")
    if folder is None:
        if "image_dir" not in table.bad:
            missing = Problem(table.where, "a subset without image_dir", "name the folder that holds its pictures")
            found.problems.append(missing)
        return None
    where = table.places["image_dir"]
    if not folder.is_dir():
        found.problems.append(Problem(where, f"there is no folder {folder}"))
        return None
    if lookup["num_repeats"] < 1:
        found.notices.append(f"{where}: {folder} is left out, because it is repeated {lookup['num_repeats']} times")
        return None
    return _subset(lookup, folder, lookup["num_repeats"], lookup["is_reg"], lookup["class_tokens"], where)


def _subset(
    lookup: _Lookup, folder: Path, repeats: int, is_reg: bool, class_tokens: str | None, where: str
) -> SubsetSpec:
    extension, named = lookup.extension()
    return SubsetSpec(
        image_dir=folder,
        num_repeats=repeats,
        is_reg=is_reg,
        class_tokens=class_tokens or None,
        caption_extension=extension,
        caption_extension_named=named,
        caption=CaptionSpec(
            prefix=lookup["caption_prefix"],
            suffix=lookup["caption_suffix"],
            dropout_rate=lookup["caption_dropout_rate"],
            dropout_every_n_epochs=lookup["caption_dropout_every_n_epochs"],
            tag_dropout_rate=lookup["caption_tag_dropout_rate"],
            separator=lookup["caption_separator"],
            keep_tokens=lookup["keep_tokens"],
            keep_tokens_separator=lookup["keep_tokens_separator"],
            secondary_separator=lookup["secondary_separator"],
            wildcards=lookup["enable_wildcard"],
            shuffle=lookup["shuffle_caption"],
        ),
        flip_aug=lookup["flip_aug"],
        random_crop=lookup["random_crop"],
        resize_interpolation=lookup["resize_interpolation"],
        where=where,
    )


def _from_folders(options: Options, train: Path, found: Datasets, bad: frozenset[str]) -> None:
    lookup = _Lookup(options, ())
    subsets = _folders(lookup, train, "train_data_dir", False, found)
    if options.dataset.reg_data_dir is not None:
        subsets += _folders(lookup, options.dataset.reg_data_dir, "reg_data_dir", True, found)
    _add(lookup, str(train), subsets, found, bad, file_is_wrong=bool(found.problems))


def _folders(lookup: _Lookup, parent: Path, flag: str, is_reg: bool, found: Datasets) -> list[SubsetSpec]:
    """The subsets of the `<repeats>_<name>` folders in `parent`, sorted by name."""
    where = lookup.options.where(flag)
    try:
        entries = sorted(parent.iterdir())
    except OSError as error:
        reasons = {FileNotFoundError: "there is no such folder", NotADirectoryError: "that is no folder"}
        found.problems.append(Problem(where, f"{parent}: {reasons.get(type(error), error.strerror or str(error))}"))
        return []
    subsets = []
    other = []
    for folder in entries:
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        repeats, class_tokens = _folder_name(folder.name)
        if repeats == 0:
            found.notices.append(f"{folder}: ignored, because its name asks for 0 repeats")
            continue
        if repeats is None:
            other.append(folder.name)
            continue
        subsets.append(_subset(lookup, folder, repeats, is_reg, class_tokens, str(folder)))
    if other and subsets:
        found.notices.append(f"{parent}: ignored, because they aren't named like 10_name: {_some(other)}")
    loose = sum(entry.suffix.lower() in _PICTURES for entry in entries)
    if loose and subsets:
        found.notices.append(f"{parent}: ignored, because they are in no folder like 10_name: {loose} pictures")
    if not subsets:
        parts = [f"the folders {_some(other)}"] if other else []
        parts += [f"{loose} pictures, which belong into such a folder"] if loose else []
        wrong = f"{parent} holds no folder named like 10_name (10 repeats), but {' and '.join(parts) or 'nothing else'}"
        found.problems.append(Problem(where, wrong, f"move the pictures into {parent / '10_name'}"))
    return subsets


def _folder_name(name: str) -> tuple[int | None, str]:
    """Repeats and class tokens; None where the name doesn't begin with a number."""
    first, _, rest = name.partition("_")
    return (int(first) if first.isascii() and first.isdigit() else None), rest


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _add(
    lookup: _Lookup, where: str, subsets: list[SubsetSpec], found: Datasets, bad: frozenset[str], *, file_is_wrong: bool
) -> None:
    """Check a dataset's sizes and subsets, and add it."""
    if not file_is_wrong and not any(not subset.is_reg for subset in subsets):
        wrong = "has only regularization pictures" if subsets else "has no subset left to train on"
        found.problems.append(Problem(where, wrong))
    if lookup.options.caching.cache_latents:
        found.problems.extend(
            Problem(subset.where, "random_crop can't be used with cached latents", "leave out one of the two")
            for subset in subsets
            if subset.random_crop
        )
    resolution, resolution_where = lookup.find("resolution")
    if resolution is None:
        if "resolution" not in bad and not any("resolution" in table.bad for table in lookup.tables):
            advice = "models were made for --resolution 512,512 (SD1, SD2), 768,768 (SD2 768-v) or 1024,1024 (SDXL)"
            found.problems.append(Problem("--resolution", "the size of training pictures is missing", advice))
        return
    steps = lookup["bucket_reso_steps"]
    low, high = lookup["min_bucket_reso"], lookup["max_bucket_reso"]
    if lookup["enable_bucket"]:
        low, high = _limits(lookup, resolution, resolution_where, found)
    found.specs.append(
        DatasetSpec(
            batch_size=lookup["batch_size"],
            resolution=resolution,
            subsets=tuple(subsets),
            enable_bucket=lookup["enable_bucket"],
            min_bucket_reso=low,
            max_bucket_reso=high,
            bucket_reso_steps=steps,
            bucket_no_upscale=lookup["bucket_no_upscale"],
            where=where,
        )
    )


def _limits(lookup: _Lookup, resolution: tuple[int, int], where: str, found: Datasets) -> tuple[int, int]:
    """Shortest and longest side of a bucket, as multiples of the steps: rounded down and up."""
    (steps, steps_where), (low, low_where) = lookup.find("bucket_reso_steps"), lookup.find("min_bucket_reso")
    high, high_where = lookup.find("max_bucket_reso")
    if steps % 64:
        found.notices.append(
            f"{steps_where}: {steps} is no multiple of 64, for which Stable Diffusion models were made"
        )
    if lookup["bucket_no_upscale"]:
        return low, high
    rounded_low, rounded_high = max(low // steps, 1) * steps, math.ceil(high / steps) * steps
    for value, rounded, place in ((low, rounded_low, low_where), (high, rounded_high, high_where)):
        if value != rounded:
            found.notices.append(f"{place}: {value} becomes {rounded}, a multiple of bucket_reso_steps {steps}")
    size = f"{resolution[0]}x{resolution[1]}"
    if min(resolution) < rounded_low:
        wrong = f"{size} has a side shorter than min_bucket_reso {rounded_low}"
        found.problems.append(Problem(where, wrong, f"set min_bucket_reso to {min(resolution)} or less ({low_where})"))
    if max(resolution) > rounded_high:
        wrong = f"{size} has a side longer than max_bucket_reso {rounded_high}"
        found.problems.append(Problem(where, wrong, f"set max_bucket_reso to {max(resolution)} or more ({high_where})"))
    return rounded_low, rounded_high
