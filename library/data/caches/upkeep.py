"""Looking after cached files: what the wanted ones are worth, and which of ours nobody wants any more.

Nothing here makes a cache, and files of other programs are never touched.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library import console
from library.data.caches import latent_files, npz
from library.data.caches.latent_files import ENTRY, USABLE, Trust, Verdict
from library.data.caches.npz import UNREADABLE
from library.data.caches.slots import Files, Recipe, slots
from library.data.caches.text_files import ENDING, TextFiles
from library.data.caches.verified import in_order
from library.data.caption_plan import size_text
from library.data.plan import Plan
from library.errors import Problem, UserError

_SAID = {
    "foreign": "of another program",
    "absent": "missing",
    "stale": "no longer fits",
    "damaged": "damaged",
    "maskless": "lacks its mask",
}


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


def prune(folders: Sequence[Path], findings: Sequence[Finding], ending: Sequence[str], *, dry_run: bool) -> int:
    """Delete our files that nothing wants, and temporary ones that were left; say which. Returns the bytes freed.

    Args:
        folders: where to look.
        findings: on all files that are wanted, of the plans of these folders.
        ending: of the names that may go.
        dry_run: only say it.

    Raises:
        UserError: a file can't be deleted.
    """
    kept = {finding.path.resolve() for finding in findings if finding.usable or finding.verdict == "maskless"}
    unwanted = [
        path
        for folder in folders
        for path in _files(folder)
        if path.name.endswith(tuple(ending)) and path.resolve() not in kept and _is_ours(path)
    ]
    freed, problems = 0, []
    unwanted += latent_files.leftovers(folders)
    for path in unwanted:
        try:
            size = path.stat().st_size
            if not dry_run:
                path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(Problem(str(path), f"can't be deleted ({error.strerror or error})"))
            continue
        freed += size
        print(f"{'would delete' if dry_run else 'deleted'} {path} ({size_text(size)})")
    print(f"{len(unwanted) - len(problems)} files{' would go' if dry_run else ' are gone'}, {size_text(freed)}")
    if problems:
        raise UserError(problems)
    return freed


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".npz")
    except OSError:
        return []


def _is_ours(path: Path) -> bool:
    """Whether our entry stands in it, whatever else does."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return isinstance(json.loads(str(npz.read(path, ENTRY)[ENTRY])), dict)
    except UNREADABLE:
        return False
