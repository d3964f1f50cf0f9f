"""Folders of pictures and caption files -> `ImageRecord`s. Reads headers, file ends and captions; decodes nothing.

A folder is read flat, sorted by name, without hidden files. A caption is `<base><extension>`, or, for the names that
face detection writes, the base without its last four `_` pieces. Epochs and batches are made elsewhere (data.plan).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.data.images import EXTENSIONS, Damage, Header, probe_all
from library.data.records import ImageRecord
from library.errors import Problem, UserError
from library.options.specs import DatasetSpec, SubsetSpec

CAPTION_EXTENSIONS = (".txt", ".caption", ".captions", ".cap", ".tags", ".tag", ".text")
"""Where captions are looked for when the extension that was asked for finds none."""
OTHER_PICTURES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".jfif", ".psd")
SHOWN = 10
_FACE_PIECES = 4


@dataclass(frozen=True)
class SubsetCounts:
    """What was found in one folder. `repeats` is the sum over its pictures, after regularization was balanced."""

    dataset: int
    subset: int
    folder: Path
    found: int
    captioned: int
    unreadable: int
    repeats: int
    is_reg: bool
    ignored: str = ""


@dataclass(frozen=True)
class Scan:
    """Everything found, `records` in the order of datasets, subsets and names. `problems` would stop a real run."""

    records: tuple[ImageRecord, ...]
    unreadable: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    notices: tuple[str, ...]
    counts: tuple[SubsetCounts, ...]

    def check(self) -> None:
        """Raise a `UserError` if a real run can't use what was found; unreadable pictures are listed up to ten."""
        listed = list(self.problems) + list(self.unreadable[:SHOWN])
        if len(self.unreadable) > SHOWN:
            total = len(self.unreadable)
            listed.append(Problem("pictures", f"{total - SHOWN} more of {total} that can't be used", "mend them all"))
        if listed:
            raise UserError(listed)


@dataclass(frozen=True)
class _Folder:
    """One subset while it is read."""

    dataset: int
    subset: int
    spec: SubsetSpec
    names: frozenset[str]
    pictures: tuple[str, ...]


class _Findings:
    """What the reading of all folders collects besides records."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.unreadable: list[Problem] = []
        self.notices: list[str] = []
        self.ignored: dict[tuple[int, int], str] = {}


def default_threads() -> int:
    """Threads that read headers: file systems with latency want a few more than there are cores."""
    return min(16, (os.cpu_count() or 1) + 2)


def scan(specs: Sequence[DatasetSpec], *, threads: int | None = None) -> Scan:
    """All pictures of all datasets.

    Raises:
        UserError: folders missing or without pictures, unreadable pictures, captions that can't be read or don't
            have the extension that the user named.
    """
    found = survey(specs, threads=threads)
    found.check()
    return found


def survey(specs: Sequence[DatasetSpec], *, threads: int | None = None) -> Scan:
    """`scan` that raises nothing: a dry run shows what is there before it stops."""
    findings = _Findings()
    folders = [folder for number, spec in enumerate(specs) for folder in _open_folders(number, spec, findings)]
    paths = [folder.spec.image_dir / name for folder in folders for name in folder.pictures]
    headers = iter(probe_all(paths, default_threads() if threads is None else threads))
    records: list[ImageRecord] = []
    counts: dict[tuple[int, int], SubsetCounts] = {}
    for folder in folders:
        read, broken = _read_folder(folder, [next(headers) for _ in folder.pictures], findings)
        records += read
        captioned = sum(record.captioned for record in read)
        counts[folder.dataset, folder.subset] = SubsetCounts(
            folder.dataset,
            folder.subset,
            folder.spec.image_dir,
            len(folder.pictures),
            captioned,
            broken,
            0,
            folder.spec.is_reg,
        )
    _check_training_pictures(specs, folders, findings)
    balanced = _balance(records, specs, findings)
    return Scan(
        tuple(balanced),
        tuple(findings.unreadable),
        tuple(findings.problems),
        tuple(findings.notices),
        tuple(_all_counts(specs, counts, balanced, findings.ignored)),
    )


def _open_folders(number: int, spec: DatasetSpec, findings: _Findings) -> Iterable[_Folder]:
    """The usable subsets of one dataset, listed; a folder that stands twice or has no repeats is left out."""
    seen: set[Path] = set()
    for index, subset in enumerate(spec.subsets):
        folder, place = subset.image_dir, subset.where or str(subset.image_dir)
        if subset.num_repeats < 1:
            findings.ignored[number, index] = f"num_repeats is {subset.num_repeats}"
            findings.notices.append(f"{folder}: ignored, its num_repeats is {subset.num_repeats}")
            continue
        resolved = folder.resolve()
        if resolved in seen:
            findings.ignored[number, index] = "stands twice"
            findings.notices.append(f"{folder}: stands twice in one dataset; only the first counts")
            continue
        seen.add(resolved)
        try:
            names = [
                entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and not entry.is_dir()
            ]
        except OSError as error:
            findings.ignored[number, index] = "can't be read"
            wrong = f"{folder} can't be read as a folder of pictures ({error.strerror})"
            findings.problems.append(Problem(place, wrong, "name an existing folder"))
            continue
        pictures = sorted(name for name in names if _extension(name) in EXTENSIONS)
        others = Counter(ext for name in names if (ext := _extension(name)) in OTHER_PICTURES)
        if others:
            what = ", ".join(f"{count} {ext}" for ext, count in sorted(others.items()))
            findings.notices.append(f"{folder}: {what} not used: convert pictures to {', '.join(EXTENSIONS[:4])}")
        if pictures:
            yield _Folder(number, index, subset, frozenset(names), tuple(pictures))
        else:
            findings.ignored[number, index] = "no pictures"
            findings.notices.append(f"{folder}: no pictures there; ignored")


def _check_training_pictures(specs: Sequence[DatasetSpec], folders: Sequence[_Folder], findings: _Findings) -> None:
    """Each dataset needs at least one picture that isn't for regularization."""
    if not specs:
        findings.problems.append(
            Problem("dataset", "no folder of pictures was named", "use --train_data_dir or --dataset_config")
        )
    for number, spec in enumerate(specs):
        mine = [folder for folder in folders if folder.dataset == number]
        if any(not folder.spec.is_reg for folder in mine):
            continue
        wanted = [subset for subset in spec.subsets if not subset.is_reg]
        if any(findings.ignored.get((number, i)) == "can't be read" for i in range(len(spec.subsets))) and not mine:
            continue
        places = ", ".join(str(subset.image_dir) for subset in wanted) or "its folders"
        kind = "only regularization pictures" if mine else "no pictures"
        advice = f"put {', '.join(EXTENSIONS[:6])} files directly into them"
        findings.problems.append(Problem(spec.where or "dataset", f"{kind} to train on in {places}", advice))


def _read_folder(
    folder: _Folder, headers: Sequence[Header | Damage], findings: _Findings
) -> tuple[list[ImageRecord], int]:
    """Records of the readable pictures of one folder, and the count of unreadable ones."""
    spec = folder.spec
    _notice_shared_stems(folder, findings)
    extension = _caption_extension(folder, findings)
    records, broken, missing, empty = [], 0, 0, 0
    for name, header in zip(folder.pictures, headers, strict=True):
        path = spec.image_dir / name
        if isinstance(header, Damage):
            findings.unreadable.append(Problem(str(path), header.wrong, header.advice))
            broken += 1
            continue
        file = next((file for file in _caption_names(name, extension) if file in folder.names), None)
        text = None if file is None else _read_caption(spec.image_dir / file, spec.caption.wildcards, findings)
        missing += file is None
        empty += text == ""
        records.append(
            ImageRecord(
                path=path,
                key=name,
                size=header.size,
                orientation=header.orientation,
                caption=(spec.class_tokens or "") if text is None else text,
                captioned=text is not None,
                dataset=folder.dataset,
                subset=folder.subset,
                repeats=spec.num_repeats,
                is_reg=spec.is_reg,
                file_bytes=header.file_bytes,
            )
        )
    if missing:
        instead = f'the class tokens "{spec.class_tokens}"' if spec.class_tokens else "an empty caption"
        findings.notices.append(
            f"{spec.image_dir}: {missing} of {len(folder.pictures)} pictures have no {extension} file; "
            f"{instead} is used"
        )
    if empty:
        findings.notices.append(f"{spec.image_dir}: {empty} caption files are empty")
    return records, broken


def _notice_shared_stems(folder: _Folder, findings: _Findings) -> None:
    stems: dict[str, list[str]] = defaultdict(list)
    for name in folder.pictures:
        stems[_base(name)].append(name)
    for same in stems.values():
        if len(same) > 1:
            findings.notices.append(f"{folder.spec.image_dir}: {' and '.join(same)} share one caption file")


def _caption_names(picture: str, extension: str) -> list[str]:
    """The caption files that may belong to a picture, best first."""
    base = _base(picture)
    if base.count("_") < _FACE_PIECES:
        return [base + extension]
    return [base + extension, base.rsplit("_", _FACE_PIECES)[0] + extension]


def _has_captions(folder: _Folder, extension: str) -> int:
    """How many pictures of a folder have a caption file of this extension."""
    if not any(name.endswith(extension) for name in folder.names):
        return 0
    return sum(any(file in folder.names for file in _caption_names(name, extension)) for name in folder.pictures)


def _base(name: str) -> str:
    """A file's name without its extension; `Path` would take a third of the time of a scan."""
    return name.rpartition(".")[0]


def _extension(name: str) -> str:
    """The extension of a file's name in lower case, with its dot; empty if there is none."""
    _, dot, ending = name.rpartition(".")
    return (dot + ending).lower() if dot else ""


def _caption_extension(folder: _Folder, findings: _Findings) -> str:
    """The extension to use: the one asked for, or `.txt` if none was named and only such files are there."""
    spec = folder.spec
    asked = spec.caption_extension if spec.caption_extension.startswith(".") else f".{spec.caption_extension}"
    if not folder.pictures or _has_captions(folder, asked):
        return asked
    there = {ext: count for ext in CAPTION_EXTENSIONS if ext != asked and (count := _has_captions(folder, ext))}
    if not there:
        return asked
    listed = ", ".join(f"{count} {ext}" for ext, count in there.items())
    if spec.caption_extension_named:
        wrong = f"no picture in {spec.image_dir} has a {asked} caption, but there are {listed}"
        advice = f"use --caption_extension {next(iter(there))}"
        findings.problems.append(Problem(spec.where or str(spec.image_dir), wrong, advice))
    elif ".txt" in there:
        findings.notices.append(f"{spec.image_dir}: no {asked} captions; its {there['.txt']} .txt files are used")
        return ".txt"
    else:
        findings.notices.append(
            f"{spec.image_dir}: no {asked} captions, but {listed}: name them with --caption_extension"
        )
    return asked


def _read_caption(path: Path, all_lines: bool, findings: _Findings) -> str:
    """The first line that isn't blank, stripped; all of them for wildcards, joined by newlines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"caption isn't UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"
        findings.problems.append(Problem(str(path), wrong, "save it as UTF-8"))
        return ""
    except OSError as error:
        findings.problems.append(Problem(str(path), f"caption can't be read: {error.strerror}"))
        return ""
    lines = [line for raw in text.splitlines() if (line := raw.strip())]
    return "\n".join(lines if all_lines else lines[:1])


def _balance(records: Sequence[ImageRecord], specs: Sequence[DatasetSpec], findings: _Findings) -> list[ImageRecord]:
    """Repeats of regularization pictures such that, per dataset, they reach the number of training samples.

    A first round gives each picture its own repeats, following rounds one more each, until the number is reached.
    Pictures that are never reached are left out.
    """
    repeats = [record.repeats for record in records]
    for number in range(len(specs)):
        wanted = sum(record.repeats for record in records if record.dataset == number and not record.is_reg)
        regs = [i for i, record in enumerate(records) if record.dataset == number and record.is_reg]
        if not regs:
            continue
        for i in regs:
            repeats[i] = 0
        reached, first = 0, True
        while reached < wanted:
            for i in regs:
                more = records[i].repeats if first else 1
                repeats[i] += more
                reached += more
                if reached >= wanted:
                    break
            first = False
        unused = sum(repeats[i] == 0 for i in regs)
        if unused and wanted:
            findings.notices.append(
                f"{unused} of {len(regs)} regularization pictures are not used: there are {wanted} training samples"
            )
    pairs = zip(records, repeats, strict=True)
    return [replace(record, repeats=count) if count != record.repeats else record for record, count in pairs if count]


def _all_counts(
    specs: Sequence[DatasetSpec],
    counts: dict[tuple[int, int], SubsetCounts],
    records: Sequence[ImageRecord],
    ignored: dict[tuple[int, int], str],
) -> Iterable[SubsetCounts]:
    repeats: Counter[tuple[int, int]] = Counter()
    for record in records:
        repeats[record.dataset, record.subset] += record.repeats
    for number, spec in enumerate(specs):
        for index, subset in enumerate(spec.subsets):
            place = (number, index)
            nothing = SubsetCounts(number, index, subset.image_dir, 0, 0, 0, 0, subset.is_reg, ignored.get(place, ""))
            yield replace(counts.get(place, nothing), repeats=repeats[place])
