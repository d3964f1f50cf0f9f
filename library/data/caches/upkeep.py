"""Looking after cached files: what the wanted ones are worth, and which of ours no run can use any more.

Nothing here makes a cache, and files of other programs are never touched.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from library import console
from library.data.caches import npz
from library.data.caches.latent_files import (
    ENTRY,
    LATENTS,
    USABLE,
    Trust,
    Verdict,
    hash_arrays,
    hash_file,
    leftovers,
)
from library.data.caches.npz import UNREADABLE, State
from library.data.caches.slots import Files, Recipe, slots
from library.data.caches.text_files import ENDING, TextFiles
from library.data.caches.verified import in_order
from library.data.caption_plan import size_text
from library.data.plan import Plan
from library.data.sources.images import Damage, decode, probe
from library.data.sources.picture_files import is_picture, list_folder
from library.errors import Problem, UserError

_SAID = {
    "foreign": "of another program",
    "absent": "missing",
    "stale": "no longer fits",
    "damaged": "damaged",
    "maskless": "lacks its mask",
}
_MIDDLES = (re.compile(r"(.+)_\d{4,}x\d{4,}"), re.compile(r"(.+)_\d+x\d+_\d+x\d+"))
_NUMBERED = re.compile(r"(.+)_\d+")


@dataclass(frozen=True)
class Finding:
    """A file that a plan wants, what it is worth, whether a run would use it, and for which picture or caption."""

    path: Path
    verdict: Verdict
    usable: bool
    of: str


def look_at_latents(
    plan: Plan, recipe: Recipe, *, trust_foreign: bool = True, threads: int = 4, afresh: bool = True
) -> list[Finding]:
    """The verdicts on all latent files of a plan.

    Args:
        afresh: read and hash all, whatever is known from before.
    """
    files = Files(slots(plan, recipe).wanted, Trust(trust_foreign), afresh)
    verdicts = files.check(range(len(files.wanted)), threads)
    pairs = zip(files.wanted, files.paths, verdicts, strict=True)
    return [Finding(path, verdict, verdict in USABLE, str(wanted.path)) for wanted, path, verdict in pairs]


def look_at_texts(files: TextFiles, *, threads: int = 4, afresh: bool = True) -> list[Finding]:
    """The verdicts on all text files; those of other programs can't be used. `afresh` as for latents."""
    pairs = [(path, caption) for caption, paths in files.files.items() for path in paths]
    judged = in_order(lambda pair: files.judge(*pair, afresh=afresh), pairs, threads)
    verdicts = list(console.track(judged, "checking cached text", len(pairs)))
    files.verified.save()
    return [
        Finding(path, verdict, verdict == "ours", caption)
        for (path, caption), verdict in zip(pairs, verdicts, strict=True)
    ]


def report(findings: Sequence[Finding]) -> int:
    """Print what isn't ours and whole, and how many there are of each kind; returns the exit code.

    That is 0 if every file is usable, else 1.
    """
    for finding in findings:
        if finding.verdict != "ours":
            print(f"{finding.path}: {_SAID[finding.verdict]} ({finding.of!r})")
    counts = {"good": sum(finding.verdict == "ours" for finding in findings)}
    counts |= {said: sum(finding.verdict == kind for finding in findings) for kind, said in _SAID.items()}
    told = ", ".join(f"{count} {said}" for said, count in counts.items() if count)
    print(f"{len(findings)} files wanted{': ' * bool(told)}{told}")
    return 0 if all(finding.usable for finding in findings) else 1


def folders_of(plan: Plan) -> list[Path]:
    """The folders of a plan's pictures, and those that its subsets name; of recursive ones, all that are in them."""
    found = {record.path.parent for record in plan.records}
    for dataset in plan.datasets:
        for subset in dataset.spec.subsets:
            found.add(subset.image_dir)
            if subset.recursive:
                found |= {path for path in subset.image_dir.rglob("*") if path.is_dir()}
    return sorted({path.resolve(): path for path in sorted(found)}.values())


def endings(kind: str) -> tuple[str, ...]:
    """How the names of latent files of a kind (`sd`, `sdxl`) end."""
    return (f"_{kind}.npz",)


TEXT_ENDINGS = (ENDING,)


def prune(
    plan: Plan, findings: Sequence[Finding], ending: Sequence[str], *, others: bool = False, dry_run: bool
) -> int:
    """Delete files of ours that no run can use any more, and temporary ones that were left; say which and why.

    That are files whose picture is gone or has other content than the one that they were made from, and damaged ones.
    The files of a picture that is there but can't be read stay.

    Args:
        plan: whose folders are looked through.
        findings: on all files that the plan wants.
        ending: of the names that may go.
        others: delete also what only this plan doesn't want.
        dry_run: only say it.

    Returns the bytes freed.

    Raises:
        UserError: a file can't be deleted.
    """
    kept = {finding.path.resolve() for finding in findings if finding.usable or finding.verdict == "maskless"}
    records = defaultdict(list)
    for record in plan.records:
        records[record.path.parent.resolve()].append(record.path.name)
    doomed: list[_Doomed] = []
    folders = folders_of(plan)
    for folder in folders:
        judge = _Judge(folder, records[folder.resolve()], tuple(ending), others)
        unwanted = [path for path in _files(folder, tuple(ending)) if path.resolve() not in kept]
        doomed += [found for path in unwanted if (found := judge(path)) is not None]
    doomed += [_Doomed(path, npz.state_of(path), "was left by a process that is gone") for path in leftovers(folders)]
    freed, problems, gone = 0, [], 0
    for one in doomed:
        if one.state is None or npz.state_of(one.path) != one.state:
            continue
        try:
            if not dry_run:
                one.path.unlink()
        except OSError as error:
            problems.append(Problem(str(one.path), f"can't be deleted ({error.strerror or error})"))
            continue
        freed, gone = freed + one.state[0], gone + 1
        print(f"{'would delete' if dry_run else 'deleted'} {one.path} ({size_text(one.state[0])}): {one.why}")
    print(f"{gone} files{' would go' if dry_run else ' are gone'}, {size_text(freed)}")
    if problems:
        raise UserError(problems)
    return freed


@dataclass(frozen=True)
class _Doomed:
    """A file to delete while it is still in this state, and why."""

    path: Path
    state: State | None
    why: str


class _Judge:
    """Tells which files of a folder can go.

    Args:
        names: of pictures in it, besides those whose names tell that they are some.
        others: whatever is ours can go.
    """

    def __init__(self, folder: Path, names: Sequence[str], ending: tuple[str, ...], others: bool) -> None:
        self._ending, self._others = ending, others
        self._pictures: dict[str, set[Path]] = defaultdict(set)
        for name in {*names, *list_folder(str(folder)).pictures}:
            for base in (Path(name).stem, name):
                self._pictures[base].add(folder / name)
        self._hash = lru_cache(maxsize=None)(hash_file)

    def __call__(self, path: Path) -> _Doomed | None:
        state = npz.state_of(path)
        if path.is_symlink() or not path.is_file():
            return None
        try:
            said = json.loads(str(npz.read(path, ENTRY, state=state)[ENTRY]))
        except UNREADABLE:
            return None
        why = self._why(path, said) if isinstance(said, dict) else ""
        return _Doomed(path, state, why) if why else None

    def _why(self, path: Path, said: dict[str, object]) -> str:
        """Why a file of ours can go; empty if it stays."""
        pictures = {picture for base in _bases(path.name, self._ending) for picture in self._pictures.get(base, ())}
        if not pictures:
            return "its picture is gone"
        if _is_damaged(path, said):
            return "it is damaged"
        if "picture" in said and not any(self._may_be_of(picture, said) for picture in pictures):
            return "its picture has changed"
        return "these settings don't want it" if self._others else ""

    def _may_be_of(self, picture: Path, said: dict[str, object]) -> bool:
        """Whether latents were made from this picture, or nobody can tell because it can't be read."""
        try:
            same = self._hash(picture) == said["picture"]
        except OSError:
            return True
        header = probe(picture)
        if isinstance(header, Damage):
            return True
        return header.orientation == said.get("orientation") if same else decode(picture) is not None


def _bases(name: str, ending: tuple[str, ...]) -> list[str]:
    """What a cached file's name may start with, that of its picture with or without its extension."""
    found = [Path(name).stem]
    for one in ending:
        rest = name.removesuffix(one)
        if rest != name:
            middles = () if one == ENDING else _MIDDLES
            found += [rest] + [match[1] for pattern in middles if (match := pattern.fullmatch(rest))]
            if (match := _NUMBERED.fullmatch(rest)) and is_picture(match[1]):
                found.append(match[1])
    return found


def _is_damaged(path: Path, said: dict[str, object]) -> bool:
    """Whether the arrays aren't those that our entry tells of. A bad mask beside good latents is mended by a run."""
    names = (*LATENTS, ENTRY) if "picture" in said else ()
    try:
        found = npz.read(path, *names)
    except UNREADABLE:
        return True
    found.pop(ENTRY, None)
    return "arrays" in said and hash_arrays(found) != said["arrays"]


def _files(folder: Path, ending: tuple[str, ...]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(ending))
    except OSError:
        return []
