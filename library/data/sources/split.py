"""Which pictures are held out for validation: a function of a picture's name, not of the order in which it was found.

The batches of a validation are made elsewhere (data.plan), the records are those of data.sources.scan.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from library.data.records import ImageRecord
from library.data.sources.listing import Findings
from library.data.sources.picture_files import some
from library.errors import Problem
from library.options.specs import DatasetSpec, SubsetSpec
from library.options.values import round_half_up
from library.rng import rng


def hold_out(
    records: Sequence[ImageRecord], specs: Sequence[DatasetSpec], findings: Findings
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training records and validation records, each in the order of `records`; the latter with one repeat.

    Of a subset of n pictures that asks for a fraction f, n * f rounded half up are held out: those whose keys have the
    lowest hashes under the dataset's `split_seed`. So a larger fraction holds out the same pictures and some more, and
    two datasets of the same pictures, fraction and seed are split alike. Regularization pictures always train. A
    picture that one subset would train on and another hold out, and a run that is left without pictures to train on,
    are problems.
    """
    if not any(subset.validation_split for spec in specs for subset in spec.subsets):
        return list(records), []
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        if not record.is_reg:
            members[record.dataset, record.subset].append(i)
    held: set[int] = set()
    for (dataset, subset), mine in members.items():
        fraction = specs[dataset].subsets[subset].validation_split
        count = round_half_up(len(mine), fraction)
        if fraction and not count:
            findings.notices.append(
                f"{_place(specs[dataset].subsets[subset])}: validation_split {fraction:g} of {len(mine)} pictures "
                "holds out none"
            )
        held.update(_lowest(records, mine, count, specs[dataset].split_seed))
    training = [record for i, record in enumerate(records) if i not in held]
    validation = [replace(record, repeats=1) for i, record in enumerate(records) if i in held]
    _check_overlap(training, validation, specs, findings)
    if held and all(record.is_reg for record in training):
        first = specs[validation[0].dataset]
        wrong = "validation_split holds out every picture; none is left to train on"
        findings.problems.append(Problem(first.where or _place(first.subsets[0]), wrong, "use a smaller fraction"))
    return training, validation


def _lowest(records: Sequence[ImageRecord], members: Sequence[int], count: int, seed: int) -> list[int]:
    """Those `count` of `members` whose keys have the lowest hashes."""
    if count in (0, len(members)):
        return list(members) if count else []
    salt = rng(seed, "split").bytes(16)

    def rank(i: int) -> tuple[bytes, str]:
        key = records[i].key
        return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, key=salt).digest(), key

    return sorted(members, key=rank)[:count]


def _check_overlap(
    training: Sequence[ImageRecord],
    validation: Sequence[ImageRecord],
    specs: Sequence[DatasetSpec],
    findings: Findings,
) -> None:
    """A picture on both sides, under whatever names and links, would make the validation worthless."""
    both: dict[tuple[int, int, int, int], list[str]] = defaultdict(list)
    for record, other in _same_pictures(training, validation):
        told = record.key if record.key == other.key else f"{record.key} (the same file as {other.key})"
        both[record.dataset, record.subset, other.dataset, other.subset].append(told)
    for (dataset, subset, other_dataset, other_subset), keys in both.items():
        mine, other_spec = specs[dataset].subsets[subset], specs[other_dataset].subsets[other_subset]
        wrong = (
            f"pictures would be held out for validation here, and trained on in {_place(other_spec)} "
            f"({len(keys)}): {some(keys)}"
        )
        advice = "use the same validation_split and the same pictures in both, or pictures of their own for validation"
        findings.problems.append(Problem(_place(mine), wrong, advice))


def _same_pictures(
    training: Sequence[ImageRecord], validation: Sequence[ImageRecord]
) -> Iterator[tuple[ImageRecord, ImageRecord]]:
    """Each record of `validation` whose file some record of `training` has, with that one.

    Files are looked at only where a picture of the other side has the same length and size; those that can't be looked
    at are told apart by their paths.
    """
    facts = {_facts(record) for record in validation}
    alike = [record for record in training if _facts(record) in facts]
    facts = {_facts(record) for record in alike}
    resolved: dict[Path, str] = {}
    trained = {_identity(record, resolved): record for record in alike}
    for record in validation:
        other = trained.get(_identity(record, resolved)) if _facts(record) in facts else None
        if other is not None:
            yield record, other


def _facts(record: ImageRecord) -> tuple[int, tuple[int, int], int]:
    return record.file_bytes, record.size, record.orientation


def _identity(record: ImageRecord, resolved: dict[Path, str]) -> tuple[int, int] | str:
    """Device and inode of a picture's file, through all links; its path with the folder resolved if that fails."""
    stat = os.stat  # in half the time of Path.stat
    try:
        found = stat(record.key if record.key.startswith("/") else f"{record.folder}/{record.key}")
        if found.st_ino:
            return found.st_dev, found.st_ino
    except (OSError, ValueError):
        pass
    folder = resolved.get(record.folder) or resolved.setdefault(record.folder, str(record.folder.resolve()))
    return record.key if record.key.startswith("/") else f"{folder}/{record.key}"


def _place(spec: SubsetSpec) -> str:
    return spec.where or str(spec.image_dir)
