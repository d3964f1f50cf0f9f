"""What a LoRA that was merged from others says of itself: the keys that loaders need, where it comes from, and what
helps to use it. How each of the files was trained is left to them. Imports no torch but for the types of `lora`."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from math import prod
from typing import Any

import library
from library.models.families import SD1, Family
from library.weights.loras.lora import Lora, Module, ranks_and_alphas
from library.weights.metadata import ModelSpec, modelspec

_TAGS = "ss_tag_frequency"
_JOINED = ("author", "license", "tags", "trigger_phrase")


def merged_metadata(
    files: Sequence[Lora],
    modules: Mapping[str, Module],
    family: Family | None,
    *,
    title: str,
    date: datetime,
    minimum: bool = False,
) -> dict[str, str]:
    """The metadata of a file with these modules, which are plain LoRAs.

    Args:
        files: what it was merged from, the first of which decides where they differ (resolution, prediction type).
        family: None counts as SD1.
        minimum: `ss_` keys alone, and of those only what loaders need.
    """
    family = family or SD1
    first = next((one.metadata for one in files if _version(one.metadata, family)), files[0].metadata)
    version = _version(first, family) or family.versions["epsilon"]
    linear, conv = _rank(modules, lambda kernel: kernel == 1), _rank(modules, lambda kernel: kernel > 1)
    main = linear or conv
    arguments = {"conv_dim": conv[0], "conv_alpha": conv[1]} if conv else {}
    found = {
        "ss_v2": str(family.v2),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": main[0] if main else "None",
        "ss_network_alpha": main[1] if main else "None",
        "ss_network_args": json.dumps(arguments),
    }
    if minimum:
        return found
    if tags := _tag_frequency(files):
        found[_TAGS] = json.dumps(tags)
    spec = ModelSpec(
        base_model_version=version,
        date=date,
        implementation_version=f"lorasmith/{library.__version__}",
        title=title,
        resolution=_resolution(first),
        v_prediction=_predicts_velocity(first, version, family),
        clip_skip=_clip_skip(files),
        texts={name: _joined(files, name) for name in _JOINED} | {"merged_from": merged_from(files)},
    )
    return found | modelspec(spec)


def merged_from(files: Sequence[Lora]) -> str:
    """The titles of files with commas between them; of one without a title, its name."""
    return ", ".join(one.metadata.get("modelspec.title") or one.path.stem for one in files)


def _version(metadata: Mapping[str, str], family: Family) -> str | None:
    found = metadata.get("ss_base_model_version")
    return found if found in family.versions.values() else None


def _rank(modules: Mapping[str, Module], wanted: Callable[[int], bool]) -> tuple[str, str] | None:
    """Rank and alpha as metadata tell them, of modules with such a kernel; None if there is none."""
    found = [one for one in modules.values() if wanted(prod(one.leaves["lora_down.weight"].shape[2:]))]
    return ranks_and_alphas(found) if found else None


def _predicts_velocity(metadata: Mapping[str, str], version: str, family: Family) -> bool:
    told = metadata.get("modelspec.prediction_type")
    return told.startswith("v") if told else version != family.versions["epsilon"]


def _resolution(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    width, _, height = metadata.get("modelspec.resolution", "").partition("x")
    return (int(width), int(height)) if width.isdecimal() and height.isdecimal() else None


def _clip_skip(files: Sequence[Lora]) -> int | None:
    """What all files were trained with."""
    told = {one.metadata.get("modelspec.encoder_layer", "") for one in files}
    only = told.pop()
    return int(only) if not told and only.isdecimal() else None


def _joined(files: Sequence[Lora], name: str) -> str | None:
    """What the files have under a key of `modelspec`, each text once."""
    texts = dict.fromkeys(text for one in files if (text := one.metadata.get(f"modelspec.{name}")))
    return ", ".join(texts) or None


def _tag_frequency(files: Sequence[Lora]) -> dict[str, Any]:
    """The tags of all files by folder. The same folder with the same tags counts once, with others it gets a number."""
    found: dict[str, Any] = {}
    for one in files:
        try:
            folders = json.loads(one.metadata.get(_TAGS, "{}"))
        except ValueError:
            continue
        for folder, tags in folders.items() if isinstance(folders, dict) else ():
            name, number = folder, 2
            while name in found and found[name] != tags:
                name = f"{folder} ({number})"
                number += 1
            found[name] = tags
    return found
