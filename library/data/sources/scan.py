"""Everything that datasets name -> `ImageRecord`s: the one place that knows all sources, and the order of the steps.

Folders are listed by data.sources.folders, other sources by modules of their own; headers and captions are read by
data.sources.shelves. Then pictures are held out (data.sources.split) and regularization pictures balanced
(data.sources.balance). Nothing is decoded unless that is asked for. Epochs and batches are made elsewhere (data.plan).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from library.data.captions import replaces
from library.data.garbage import uncollected
from library.data.records import ImageRecord
from library.data.sources.balance import balance
from library.data.sources.caption_files import Place, caption_from_name, find_caption_files
from library.data.sources.folders import list_pictures
from library.data.sources.hub_source import list_hub
from library.data.sources.images import EXTENSIONS, Damage, Header
from library.data.sources.listing import Findings, Listed
from library.data.sources.masks import Masked, check_masks, pair_masks
from library.data.sources.metadata_files import list_jsonl, list_metadata
from library.data.sources.picture_files import SHOWN, shortened, some
from library.data.sources.reading import LateBar, default_threads
from library.data.sources.shelves import Shelves, Text
from library.data.sources.split import hold_out
from library.errors import Problem, UserError
from library.options.specs import DatasetSpec, SubsetSpec

_UNREADABLE = "can't be read"


@dataclass(frozen=True)
class SubsetCounts:
    """What was found in one source. `repeats` is the sum over its pictures, after regularization was balanced.

    `name` is what tables call it: the folder, or the file or hub dataset that lists the pictures. `held_out` counts the
    pictures that are kept for validation.
    """

    dataset: int
    subset: int
    folder: Path
    found: int
    captioned: int
    unreadable: int
    repeats: int
    is_reg: bool
    ignored: str = ""
    held_out: int = 0
    name: str = ""


@dataclass(frozen=True)
class Scan:
    """Everything found. `problems` would stop a real run.

    `records` are trained, `held_out` ones are for validation; both in the order of datasets, subsets and keys.
    `unreadable` pictures stop a run unless `skip_bad`.
    """

    records: tuple[ImageRecord, ...]
    unreadable: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    notices: tuple[str, ...]
    counts: tuple[SubsetCounts, ...]
    held_out: tuple[ImageRecord, ...] = ()
    skip_bad: bool = False

    def check(self) -> None:
        """Raise a `UserError` if a real run can't use what was found; unreadable pictures are listed up to ten."""
        bad = () if self.skip_bad else self.unreadable
        listed = [*self.problems, *shortened(bad, "pictures", "mend them all, or use --skip_bad_images")]
        if listed:
            raise UserError(listed)


@dataclass(frozen=True)
class _Part:
    """The pictures of a source that lie in one folder: their places in `_Source.keys`, and their file names."""

    folder: str
    places: Sequence[int]
    names: Sequence[str]


@dataclass(frozen=True)
class _Source:
    """One subset while it is read. `listed` is empty where `keys` say all that the source knows."""

    dataset: int
    subset: int
    spec: SubsetSpec
    keys: Sequence[str]
    listed: Sequence[Listed]

    @cached_property
    def parts(self) -> tuple[_Part, ...]:
        """The folders in which the pictures lie, in the order of their first pictures."""
        top = os.fspath(self.spec.image_dir)
        if not any("/" in key for key in self.keys):
            return (_Part(top, range(len(self.keys)), self.keys),)
        found: dict[str, list[int]] = defaultdict(list)
        for i, key in enumerate(self.keys):
            found[key.rpartition("/")[0] or key[: key.startswith("/")]].append(i)
        return tuple(
            _Part(
                (folder if folder.startswith("/") else f"{top}/{folder}") if folder else top,
                places,
                [self.keys[i].rpartition("/")[2] for i in places],
            )
            for folder, places in found.items()
        )


def scan(
    specs: Sequence[DatasetSpec], *, threads: int | None = None, skip_bad: bool = False, verify: bool = False
) -> Scan:
    """All pictures of all datasets; arguments as of `survey`.

    Raises:
        UserError: sources missing or without pictures, unreadable pictures, captions that can't be read or don't
            have the extension that the user named, masks that don't fit.
    """
    found = survey(specs, threads=threads, skip_bad=skip_bad, verify=verify)
    found.check()
    return found


def survey(
    specs: Sequence[DatasetSpec], *, threads: int | None = None, skip_bad: bool = False, verify: bool = False
) -> Scan:
    """`scan` that raises nothing: a dry run shows what is there before it stops.

    Args:
        threads: at most so many read at a time, where the disk makes us wait.
        skip_bad: leave pictures out that can't be used, with notices.
        verify: decode every picture.
    """
    with uncollected():
        return _survey(specs, default_threads() if threads is None else threads, skip_bad, verify)


def _survey(specs: Sequence[DatasetSpec], threads: int, skip_bad: bool, verify: bool) -> Scan:
    findings, shelves = Findings(), Shelves()
    sources = [source for number, spec in enumerate(specs) for source in _open_sources(number, spec, shelves, findings)]
    _read_headers(sources, shelves, threads, verify)
    files = [_caption_files(source, shelves, findings) for source in sources]
    _read_captions(sources, files, shelves, threads)
    records: list[ImageRecord] = []
    counts: dict[tuple[int, int], SubsetCounts] = {}
    for source, captions in zip(sources, files, strict=True):
        made, broken = _records(source, captions, shelves, findings, threads)
        records += made
        captioned = sum(record.captioned for record in made)
        counts[source.dataset, source.subset] = replace(
            _no_counts(source.dataset, source.subset, source.spec),
            found=len(source.keys),
            captioned=captioned,
            unreadable=broken,
        )
    shelves.close()
    findings.problems += shortened(list(findings.captions), "captions")
    _check_training_pictures(specs, sources, records, findings, skip_bad)
    if skip_bad:
        _notice_bad(findings)
    training, held_out = hold_out(records, specs, findings)
    balanced = balance(training, len(specs), findings)
    return Scan(
        tuple(balanced),
        tuple(findings.unreadable),
        tuple(findings.problems),
        tuple(findings.notices),
        tuple(_all_counts(specs, counts, balanced, held_out, findings.ignored)),
        tuple(held_out),
        skip_bad,
    )


def _open_sources(number: int, spec: DatasetSpec, shelves: Shelves, findings: Findings) -> Iterator[_Source]:
    """The usable subsets of one dataset, listed; one that stands twice or has no repeats is left out."""
    seen: set[object] = set()
    for index, subset in enumerate(spec.subsets):
        title = _title(subset)
        if subset.num_repeats < 1:
            findings.ignored[number, index] = f"num_repeats is {subset.num_repeats}"
            findings.notices.append(f"{title}: ignored, its num_repeats is {subset.num_repeats}")
            continue
        lists = None if subset.metadata_file is None else subset.metadata_file.resolve()
        identity = (subset.image_dir.resolve(), lists, subset.hub)
        if identity in seen:
            findings.ignored[number, index] = "stands twice"
            findings.notices.append(f"{title}: stands twice in one dataset; only the first counts")
            continue
        seen.add(identity)
        before = len(findings.problems)
        keys, listed = _list(subset, shelves, findings)
        if keys:
            yield _Source(number, index, subset, keys, listed)
        elif len(findings.problems) > before:
            findings.ignored[number, index] = _UNREADABLE
        else:
            findings.ignored[number, index] = "no pictures"
            findings.notices.append(f"{title}: no pictures there; ignored")


def _list(spec: SubsetSpec, shelves: Shelves, findings: Findings) -> tuple[Sequence[str], Sequence[Listed]]:
    """The keys of a source's pictures, and what else it says of them."""
    if spec.source != "folder":
        list_source = {"metadata": list_metadata, "jsonl": list_jsonl, "hub": list_hub}[spec.source]
        listed = list_source(spec, findings)
        return [one.key for one in listed], listed
    try:
        tree = list_pictures(spec.image_dir, recursive=spec.recursive, without=spec.mask_dir)
    except OSError as error:
        wrong = f"{spec.image_dir} can't be read as a folder of pictures ({error.strerror})"
        findings.problems.append(Problem(spec.where or str(spec.image_dir), wrong, "name an existing folder"))
        return (), ()
    findings.notices += tree.notices
    for folder, names in tree.folders.items():
        shelves.add(folder, names)
    return tree.keys, ()


def _read_headers(sources: Sequence[_Source], shelves: Shelves, threads: int, verify: bool) -> None:
    """Read, and with `verify` decode, the pictures of all sources, and remember what was found."""
    wanted = _by_folder((part.folder, part.names) for source in sources for part in source.parts)
    total = sum(map(len, wanted.values()))
    progress = LateBar("reading pictures", total)
    for folder, names in wanted.items():
        shelves[folder].read_headers(names, threads=threads, progress=progress)
    progress.close()
    if not verify:
        return
    shelves.close()
    progress, cores = LateBar("decoding pictures", total), os.cpu_count() or 1
    for folder, names in wanted.items():
        shelves[folder].decode_all(names, threads=cores, progress=progress)
    progress.close()


def _caption_files(source: _Source, shelves: Shelves, findings: Findings) -> dict[str, list[str | None]]:
    """The caption file of each picture that may have one, by folder and in the order of `_Part.names`. Nothing is said
    of files that aren't trained."""
    if source.spec.caption_from != "file" or (source.listed and all(one.caption is not None for one in source.listed)):
        return {}
    places = [Place(shelves[part.folder].names, part.names) for part in source.parts]
    aside = Findings() if replaces(source.spec.caption) else findings
    found = find_caption_files(source.spec, places, aside)
    return {part.folder: files for part, files in zip(source.parts, found, strict=True)}


def _read_captions(
    sources: Sequence[_Source], files: Sequence[dict[str, list[str | None]]], shelves: Shelves, threads: int
) -> None:
    wanted = _by_folder((folder, filter(None, names)) for found in files for folder, names in found.items())
    progress = LateBar("reading captions", sum(map(len, wanted.values())))
    for folder, names in wanted.items():
        shelves[folder].read_texts(names, threads=threads, progress=progress)
    progress.close()


def _by_folder(pairs: Iterable[tuple[str, Iterable[str | None]]]) -> dict[str, list[str]]:
    """Names by folder, each folder once."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder, names in pairs:
        found[folder] += [name for name in names if name is not None]
    return found


def _records(
    source: _Source, files: dict[str, list[str | None]], shelves: Shelves, findings: Findings, threads: int
) -> tuple[list[ImageRecord], int]:
    """Records of the readable pictures of one source, and the count of the others."""
    spec = source.spec
    headers: list[Header | Damage] = [Damage("")] * len(source.keys)
    texts: list[str | None] = [one.caption for one in source.listed] or [None] * len(source.keys)
    if spec.caption_from == "class_tokens":
        texts = [None] * len(source.keys)
    elif spec.caption_from == "filename":
        texts = list(map(caption_from_name, source.keys))
    for part in source.parts:
        shelf = shelves[part.folder]
        for i, name in zip(part.places, part.names, strict=True):
            headers[i] = shelf.headers[name]
        for i, file in zip(part.places, files.get(part.folder, ()), strict=False):
            if file is not None and texts[i] is None:
                texts[i] = _caption(shelf.texts[file], spec.caption.wildcards, findings)
    masks = _masks(source, headers, shelves, findings, threads)
    instead, dataset, subset = spec.class_tokens or "", source.dataset, source.subset
    top, repeats, is_reg = spec.image_dir, spec.num_repeats, spec.is_reg
    records, broken = [], 0
    for i, (key, header, text) in enumerate(zip(source.keys, headers, texts, strict=True)):
        if isinstance(header, Damage):
            place = source.listed[i].where if source.listed else ""
            where = some([str(top / key)]) + f" ({place})" * bool(place)
            findings.unreadable.append(Problem(where, header.wrong, header.advice))
            broken += 1
            continue
        captioned = text is not None
        caption = text if text is not None else instead
        mask, mask_bytes = masks.get(i, (None, 0)) if masks else (None, 0)
        size, orientation, length = header.size, header.orientation, header.file_bytes
        about = (dataset, subset, repeats, is_reg, length, mask, mask_bytes)
        records.append(ImageRecord(top, key, size, orientation, caption, captioned, *about))
    _notice_captions(source, files, texts, findings)
    return records, broken


def _caption(text: Text, all_lines: bool, findings: Findings) -> str:
    """What trains of a caption file's lines; their problem is taken down where they can't be read."""
    if isinstance(text, Problem):
        findings.captions[text] = None
        return ""
    return text if all_lines else text.partition("\n")[0]


def _masks(
    source: _Source, headers: Sequence[Header | Damage], shelves: Shelves, findings: Findings, threads: int
) -> dict[int, tuple[str, int]]:
    """Path and length of the mask's file of each readable picture that has one, by its place in the source."""
    spec = source.spec
    if spec.mask_dir is None and not any(one.mask for one in source.listed):
        return {}
    listed = source.listed or [Listed(key) for key in source.keys]
    named = {one.key: one.mask for one in listed if one.mask}
    if spec.mask_dir is not None:
        named |= pair_masks(spec, listed, findings)
    places, wanted = [], []
    for i, (key, header) in enumerate(zip(source.keys, headers, strict=True)):
        if key in named and isinstance(header, Header):
            places.append(i)
            wanted.append(Masked(str(spec.image_dir / key), header.size, named[key]))
    lengths = check_masks(wanted, findings, threads=threads, shelves=shelves)
    return {i: (one.mask, length) for i, one, length in zip(places, wanted, lengths, strict=True)}


def _notice_captions(
    source: _Source, files: dict[str, list[str | None]], texts: Sequence[str | None], findings: Findings
) -> None:
    """What stands in for missing captions, and how many are empty; templates that stand for all of them."""
    spec, title = source.spec, _title(source.spec)
    if replaces(spec.caption):
        own = "caption files" if files else "own captions"
        unused = f"; its {own} aren't used (--keep_original_captions would)" if any(texts) else ""
        findings.notices.append(f"{title}: captions are templates around {spec.caption.subject}{unused}")
        return
    instead = f'the class tokens "{spec.class_tokens}" are' if spec.class_tokens else "an empty caption is"
    missing = sum(text is None for text in texts)
    if missing and spec.caption_from == "class_tokens":
        if not spec.class_tokens:
            findings.notices.append(f"{title}: every caption is empty, since there are no class tokens")
    elif missing:
        used = next((name for names in files.values() for name in names if name), spec.caption_extension)
        what = f".{used.rpartition('.')[2]} file" if files else "caption"
        findings.notices.append(f"{title}: {missing} of {len(texts)} pictures have no {what}; {instead} used")
    empty = sum(text == "" for text in texts)
    if empty and spec.source == "folder":
        findings.notices.append(f"{title}: {empty} of {len(texts)} captions are empty")


def _title(spec: SubsetSpec) -> str:
    """How messages call a source."""
    return str(spec.image_dir if spec.source == "folder" else spec.metadata_file or spec.name)


def _check_training_pictures(
    specs: Sequence[DatasetSpec],
    sources: Sequence[_Source],
    records: Sequence[ImageRecord],
    findings: Findings,
    skip_bad: bool,
) -> None:
    """Each dataset needs at least one picture that isn't for regularization."""
    if not specs:
        findings.problems.append(
            Problem("dataset", "no folder of pictures was named", "use --train_data_dir or --dataset_config")
        )
    readable = {record.dataset for record in records if not record.is_reg}
    for number, spec in enumerate(specs):
        mine = [source for source in sources if source.dataset == number]
        places = ", ".join(_title(subset) for subset in spec.subsets if not subset.is_reg) or "its folders"
        where = spec.where or "dataset"
        if any(not source.spec.is_reg for source in mine):
            if skip_bad and number not in readable:
                findings.problems.append(Problem(where, f"none of the pictures can be used in {places}"))
            continue
        if any(findings.ignored.get((number, i)) == _UNREADABLE for i in range(len(spec.subsets))) and not mine:
            continue
        kind = "only regularization pictures" if mine else "no pictures"
        advice = f"put {', '.join(EXTENSIONS[:6])} files directly into them"
        if any(subset.recursive or subset.source != "folder" for subset in spec.subsets):
            advice = "see what is said about them"
        findings.problems.append(Problem(where, f"{kind} to train on in {places}", advice))


def _notice_bad(findings: Findings) -> None:
    bad = findings.unreadable
    findings.notices += [f"left out: {problem.where}: {problem.wrong}" for problem in bad[:SHOWN]]
    if len(bad) > SHOWN:
        findings.notices.append(f"left out: {len(bad) - SHOWN} more of {len(bad)} pictures that can't be used")


def _no_counts(number: int, index: int, spec: SubsetSpec) -> SubsetCounts:
    return SubsetCounts(number, index, spec.image_dir, 0, 0, 0, 0, spec.is_reg, name=_title(spec))


def _all_counts(
    specs: Sequence[DatasetSpec],
    counts: dict[tuple[int, int], SubsetCounts],
    records: Sequence[ImageRecord],
    held_out: Sequence[ImageRecord],
    ignored: dict[tuple[int, int], str],
) -> Iterable[SubsetCounts]:
    repeats: Counter[tuple[int, int]] = Counter()
    for record in records:
        repeats[record.dataset, record.subset] += record.repeats
    held = Counter((record.dataset, record.subset) for record in held_out)
    for number, spec in enumerate(specs):
        for index, subset in enumerate(spec.subsets):
            place = (number, index)
            nothing = replace(_no_counts(number, index, subset), ignored=ignored.get(place, ""))
            yield replace(counts.get(place, nothing), repeats=repeats[place], held_out=held[place])
