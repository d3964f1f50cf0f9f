"""The words that a LoRA listens to, told from its metadata: the trigger phrase that its author gave, the words that
its folders or subsets were trained with, and the tags of its captions by how many pictures have them. Imports no torch.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from library.errors import UserError

Origin = Literal["phrase", "class", "tag"]
_FOLDER = re.compile(r"\d+_(.+?)( \(\d+\))?")


@dataclass(frozen=True)
class Word:
    """A word, or several that stand together.

    Attributes:
        origin: `phrase`: modelspec.trigger_phrase; `class`: class tokens, or the name of a training folder behind its
            repeats; `tag`: of captions.
        pictures: how many have it, without repeats; 0 where that isn't told.
        share: of all pictures whose number is told, from 0 to 1; None where none is.
    """

    text: str
    origin: Origin
    pictures: int = 0
    share: float | None = None


def trigger_words(metadata: Mapping[str, str], limit: int, place: str) -> list[Word]:
    """The words, phrase and classes first, then the `limit` most frequent tags; regularisation pictures don't count.

    Args:
        place: the file, as messages name it.

    Raises:
        UserError: a key that should hold JSON doesn't.
    """
    datasets = [one for one in _json(metadata, "ss_datasets", list, place) if isinstance(one, dict)]
    subsets = [one for dataset in datasets for one in dataset.get("subsets") or () if isinstance(one, dict)]
    folders = _json(metadata, "ss_dataset_dirs", dict, place)
    regular = set(_json(metadata, "ss_reg_dataset_dirs", dict, place))
    regular |= {str(one.get("image_dir")) for one in subsets if one.get("is_reg")} - folders.keys()
    tags = {name: found for name, found in _frequencies(metadata, datasets, place) if name not in regular}
    pictures = {name: int(one.get("img_count") or 0) for name, one in folders.items() if isinstance(one, dict)}
    found: list[Word] = []
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        found.append(Word(phrase, "phrase"))
    classes: Counter[str] = Counter()
    for one in subsets:
        if one.get("class_tokens") and not one.get("is_reg"):
            classes[str(one["class_tokens"])] += int(one.get("img_count") or 0)
    if not subsets:
        for name in (*folders, *(name for name in tags if name not in folders)):
            if match := _FOLDER.fullmatch(name):
                classes[match[1]] += pictures.get(name, 0)
    counts: Counter[str] = Counter()
    for listed in tags.values():
        for text, count in listed.items():
            counts[text.strip()] += int(count)
    whole = sum(pictures.get(name, 0) for name in tags)
    everything = sum(pictures.values())
    classes.pop(phrase, None)
    found += [Word(text, "class", count, _share(count, everything)) for text, count in classes.items()]
    ranked = sorted(((text, count) for text, count in counts.items() if text), key=lambda pair: (-pair[1], pair[0]))
    return found + [Word(text, "tag", count, _share(count, whole)) for text, count in ranked[:limit]]


def _share(count: int, whole: int) -> float | None:
    return min(count / whole, 1.0) if whole and count else None


def _frequencies(
    metadata: Mapping[str, str], datasets: list[dict[str, Any]], place: str
) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Folder and its tags; of trainings from a config the merged table counts, or where it's missing each dataset's."""
    told = _json(metadata, "ss_tag_frequency", dict, place)
    tables = [told] if told else [one.get("tag_frequency") or {} for one in datasets]
    for table in tables:
        for name, listed in table.items():
            if isinstance(listed, dict):
                yield name, {str(text): count for text, count in listed.items() if isinstance(count, int)}


def _json(metadata: Mapping[str, str], key: str, kind: type, place: str) -> Any:
    """A value that is JSON; empty where it is missing or null."""
    try:
        found = json.loads(metadata.get(key) or "null")
    except ValueError as error:
        if metadata[key] == "None":
            return kind()
        raise UserError.single(place, f"its metadata {key} should be JSON and isn't", "it was damaged") from error
    return found if isinstance(found, kind) else kind()
