"""What to train on, as frozen specs: from --dataset_config, from a metadata file, or from `<repeats>_<name>` folders.

Pictures are not looked for here (data.sources.scan), only their folders and files.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError
from library.known_files import cache_folder
from library.options import subset_specs
from library.options.dataset_file import Table, read_dataset_file
from library.options.dataset_schema import SOURCES
from library.options.dataset_specs import Datasets, add_dataset
from library.options.embedding_checks import has_network
from library.options.lookup import Lookup
from library.options.registry import FLAGS, Options
from library.options.specs import Columns, DatasetSpec, HubDataset, SubsetSpec

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"}
_COLUMNS = ("image_column", "caption_column", "mask_column")
_ONLY_HUB = ("dataset_config_name", "hf_cache_dir")
_ONLY_FOLDERS = ("caption_extension", "caption_from", "recursive")
_UNUSED = {
    "folder": (*_COLUMNS, *_ONLY_HUB),
    "metadata": (*_COLUMNS, *_ONLY_HUB, *_ONLY_FOLDERS),
    "jsonl": (*_ONLY_HUB, *_ONLY_FOLDERS),
    "hub": _ONLY_FOLDERS,
}
"""Keys that mean nothing to a kind of source."""
_KINDS = {"metadata_file": "metadata", "jsonl_path": "jsonl", "dataset_name": "hub"}
_TITLES = {
    "folder": "a folder",
    "metadata": "a metadata file",
    "jsonl": "a .jsonl file",
    "hub": "a Hugging Face dataset",
}


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
    elif flags.in_json is not None:
        _from_metadata(options, flags.in_json, found, bad)
    elif flags.train_data_dir is not None:
        _from_folders(options, flags.train_data_dir, found, bad)
    return found


def _from_file(options: Options, path: Path, found: Datasets, bad: frozenset[str]) -> None:
    for name in ("train_data_dir", "reg_data_dir", "in_json"):
        if options.value(name) is not None:
            found.notices.append(f"{options.where(name)}: ignored, because --dataset_config names the pictures")
    file = read_dataset_file(path, options.where("dataset_config"))
    found.problems += file.problems
    found.notices += file.notices
    general = Lookup(options, (file.general,))
    for table, subset_tables in file.datasets:
        lookup, problems = general.inner(table), len(found.problems)
        subsets: list[SubsetSpec] = []
        for inner in subset_tables:
            subset = _subset_of_table(lookup.inner(inner), inner, found)
            if subset is None:
                continue
            if any(_same(subset, other) for other in subsets):
                what = subset.hub.name if subset.hub else subset.metadata_file or subset.image_dir
                found.notices.append(f"{subset.where}: ignored, because this dataset already has {what}")
                continue
            subsets.append(subset)
        kinds = {subset.source: subset.where for subset in subsets}
        if len(kinds) > 1:
            parts = " and ".join(f"{_TITLES[kind]} ({where})" for kind, where in kinds.items())
            wrong = f"subsets of one dataset are of different kinds: {parts}"
            found.problems.append(Problem(table.where, wrong, "give each kind a [[datasets]] of its own"))
        is_wrong = bool(file.problems) or len(found.problems) > problems
        add_dataset(lookup, table.where, subsets, found, bad, file_is_wrong=is_wrong)


def _same(one: SubsetSpec, other: SubsetSpec) -> bool:
    """Both have the same pictures."""
    if one.source != other.source or one.hub != other.hub:
        return False
    if one.metadata_file is not None and other.metadata_file is not None:
        return one.metadata_file.resolve() == other.metadata_file.resolve()
    return one.image_dir.resolve() == other.image_dir.resolve()


def _subset_of_table(lookup: Lookup, table: Table, found: Datasets) -> SubsetSpec | None:
    problems = list(subset_specs.problems(lookup, table.where))
    source = _source(lookup, table, problems)
    found.problems += problems
    found.notices += subset_specs.notices(lookup)
    if source is None:
        return None
    kind = source.get("source", "folder")
    for name in _UNUSED[kind]:
        if name in table.values:
            found.notices.append(f"{table.places[name]}: has no effect, pictures come from {_TITLES[kind]}")
    if lookup["num_repeats"] < 1:
        what = source["where"]
        found.notices.append(f"{what}: left out, because it is repeated {lookup['num_repeats']} times")
        return None
    told = {"class_tokens": lookup["class_tokens"], "is_reg": lookup["is_reg"]}
    found.problems += subset_specs.subject_problems(lookup, source["where"], **told)
    return subset_specs.subset_spec(lookup, num_repeats=lookup["num_repeats"], **told, **source)


def _source(lookup: Lookup, table: Table, problems: list[Problem]) -> dict[str, Any] | None:
    """The fields of a spec that say where a subset's pictures come from; None, with a problem, where nothing does."""
    named = [name for name in SOURCES if name in table.values]
    folder = table.values.get("image_dir")
    if len(named) > 1:
        places = ", ".join(table.places[name] for name in named)
        problems.append(Problem(places, "a subset has one source of pictures", "give each a subset of its own"))
        return None
    if not named and folder is None:
        if not {"image_dir", *SOURCES} & table.bad:
            advice = f"name the folder that holds its pictures, or one of {', '.join(SOURCES)}"
            problems.append(Problem(table.where, "a subset without image_dir", advice))
        return None
    if folder is not None and not folder.is_dir():
        problems.append(Problem(table.places["image_dir"], f"there is no folder {folder}"))
        return None
    if not named:
        return {"image_dir": folder, "where": table.places["image_dir"]}
    (name,) = named
    value, where = table.values[name], table.places[name]
    columns = Columns(lookup["image_column"], lookup["caption_column"], lookup["mask_column"])
    if name == "dataset_name":
        hub = HubDataset(value, lookup["dataset_config_name"], lookup["hf_cache_dir"])
        place = _export_folder(hub, columns, masks=lookup.options.dataset.masked_loss)
        return {"image_dir": place, "source": "hub", "hub": hub, "columns": columns, "where": where}
    problems += _metadata_problems(value, where, jsonl=name == "jsonl_path")
    if problems:
        return None
    place = folder or value.parent
    return {
        "image_dir": place, "source": _KINDS[name], "metadata_file": value, "columns": columns, "where": where
    }  # fmt: skip


def _metadata_problems(path: Path, where: str, *, jsonl: bool) -> Iterator[Problem]:
    wanted = (".jsonl",) if jsonl else (".json", ".jsonl")
    if not path.is_file():
        yield Problem(where, f"there is no file {path}")
    elif path.suffix.lower() not in wanted:
        yield Problem(where, f"{path} is no {' or '.join(wanted)} file")


def _export_folder(hub: HubDataset, columns: Columns, *, masks: bool) -> Path:
    """Where the pictures of a Hugging Face dataset are kept as files: one folder for each choice of their columns."""
    name = "".join(letter if letter.isalnum() else "_" for letter in hub.name)[-60:]
    local = Path(hub.name)
    told = "\0".join(
        [str(local.resolve() if local.exists() else hub.name), str(hub.config), columns.image]
        + [columns.mask] * masks
    )  # fmt: skip
    return cache_folder() / "lorasmith" / "datasets" / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _from_metadata(options: Options, path: Path, found: Datasets, bad: frozenset[str]) -> None:
    """--in_json: one subset, whose names are relative to --train_data_dir."""
    lookup, where = Lookup(options, ()), options.where("in_json")
    folder = options.dataset.train_data_dir
    found.problems += _metadata_problems(path, where, jsonl=False)
    if folder is not None and not folder.is_dir():
        found.problems.append(Problem(options.where("train_data_dir"), f"there is no folder {folder}"))
    if options.dataset.reg_data_dir is not None:
        found.notices.append(f"{options.where('reg_data_dir')}: ignored, because --in_json names the pictures")
    found.problems += subset_specs.problems(lookup, where)
    found.problems += subset_specs.subject_problems(lookup, where, None, is_reg=False)
    subset = subset_specs.subset_spec(
        lookup,
        class_tokens=None,
        image_dir=folder or path.parent,
        num_repeats=lookup["num_repeats"],
        source="metadata",
        metadata_file=path,
        where=where,
    )
    add_dataset(lookup, where, [subset], found, bad, file_is_wrong=bool(found.problems))


def _from_folders(options: Options, train: Path, found: Datasets, bad: frozenset[str]) -> None:
    lookup = Lookup(options, ())
    found.problems += subset_specs.problems(lookup, str(train))
    wrong = len(found.problems)
    subsets = _folders(lookup, train, "train_data_dir", False, found)
    if options.dataset.reg_data_dir is not None:
        subsets += _folders(lookup, options.dataset.reg_data_dir, "reg_data_dir", True, found)
    add_dataset(lookup, str(train), subsets, found, bad, file_is_wrong=len(found.problems) > wrong)


def _folders(lookup: Lookup, parent: Path, flag: str, is_reg: bool, found: Datasets) -> list[SubsetSpec]:
    """The subsets of the `<repeats>_<name>` folders in `parent`, sorted by name. Where new tokens are trained, pictures
    that lie in `parent` itself are a subset if it has no such folder; so they are where only the tokens are missing.
    """
    where = lookup.options.where(flag)
    try:
        entries = sorted(parent.iterdir())
    except OSError as error:
        reasons = {FileNotFoundError: "there is no such folder", NotADirectoryError: "that is no folder"}
        found.problems.append(Problem(where, f"{parent}: {reasons.get(type(error), error.strerror or str(error))}"))
        return []
    subsets = []
    other = []
    numbered = False
    for folder in entries:
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        repeats, class_tokens = _folder_name(folder.name)
        numbered |= repeats is not None
        if repeats == 0:
            found.notices.append(f"{folder}: ignored, because its name asks for 0 repeats")
            continue
        if repeats is None:
            other.append(folder.name)
            continue
        told: dict[str, Any] = {"class_tokens": class_tokens, "is_reg": is_reg}
        found.problems += subset_specs.subject_problems(lookup, str(folder), **told)
        subset = subset_specs.subset_spec(lookup, **told, image_dir=folder, num_repeats=repeats, where=str(folder))
        subsets.append(replace(subset, mask_dir=None) if is_reg else subset)
    if other and subsets:
        found.notices.append(f"{parent}: ignored, because they aren't named like 10_name: {_some(other)}")
    loose = sum(entry.suffix.lower() in _PICTURES for entry in entries)
    if loose and subsets:
        found.notices.append(f"{parent}: ignored, because they are in no folder like 10_name: {loose} pictures")
    flat = lookup.options.embeddings.token_string is not None or not has_network(lookup.options)
    if loose and not numbered and not is_reg and flat:
        return [_flat(lookup, parent, loose, other, found)]
    if not subsets:
        parts = [f"the folders {_some(other)}"] if other else []
        parts += [f"{loose} pictures, which belong into such a folder"] if loose else []
        wrong = f"{parent} holds no folder named like 10_name (10 repeats), but {' and '.join(parts) or 'nothing else'}"
        advice = f"move the pictures into {parent / '10_name'}"
        if loose and not is_reg and any(FLAGS[name].needs == "token_string" for name in lookup.options.explicit):
            advice += ", or add --token_string: new words do without such a folder"
        found.problems.append(Problem(where, wrong, advice))
    return subsets


def _flat(lookup: Lookup, parent: Path, pictures: int, other: Sequence[str], found: Datasets) -> SubsetSpec:
    """The subset of the pictures in `parent`, as diffusers and invokeai-ti want them: their caption is the only token
    where they have none."""
    token = subset_specs.only_token(lookup)
    found.problems += subset_specs.subject_problems(lookup, str(parent), token, is_reg=False)
    repeats = lookup["num_repeats"]
    times = f"{repeats} times" if repeats != 1 else "once"
    found.notices.append(
        f"{parent}: its {pictures} pictures are in no folder like 10_name; each is shown {times} in an epoch"
    )
    if other and not lookup["recursive"]:
        found.notices.append(f"{parent}: ignored, because --recursive isn't given: the folders {_some(other)}")
    return subset_specs.subset_spec(
        lookup, class_tokens=token, image_dir=parent, num_repeats=repeats, where=str(parent)
    )


def _folder_name(name: str) -> tuple[int | None, str]:
    """Repeats and class tokens; None where the name doesn't begin with a number."""
    first, _, rest = name.partition("_")
    return (int(first) if first.isascii() and first.isdigit() else None), rest


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
