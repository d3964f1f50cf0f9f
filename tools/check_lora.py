"""Look a LoRA file over: what it holds, how large its changes are, what is broken, and which programs take it.

    python tools/check_lora.py lora.safetensors
    python tools/check_lora.py --json a.safetensors b.safetensors

The rank that is used counts the singular values of a change that are more than the rounding of the file's numbers.
Which program takes which keys is told by the rules of their loaders, not by running them. Exit code 1: a file is
broken, with numbers that are not finite, or no program takes any of it; 2: a file can't be read as a LoRA.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    from library.weights.loras.checked import Checked
    from library.weights.loras.conformance import Verdict
    from library.weights.loras.statistics import BlockFacts

BROKEN = 1
_SHOWN = 2
_FACTORS = ("lora_up", "lora_down", "lora_A", "lora_B", "oft_")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("file", type=Path, nargs="+", metavar="FILE", help="LoRA files")
    found.add_argument("--keys", action="store_true", help="list the factors, too: key,shape,mean,least (of |x|)")
    found.add_argument("-s", "--show_all_keys", action="store_true", help="list all keys so")
    found.add_argument(
        "--verbose", action="store_true", help="a table of modules, and all names instead of the first few"
    )
    found.add_argument("--json", action="store_true", help="everything as JSON")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if a file is broken; 2 if one can't be read as a LoRA; 130 after Ctrl-C."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.tool_script import run

    broken: list[Path] = []
    return run(lambda: work(given, broken)) or (BROKEN if broken else 0)


def work(given: argparse.Namespace, broken: list[Path]) -> None:
    """Check all files and show what was found; those that are broken join `broken`.

    Raises:
        UserError: files are missing, damaged or no LoRAs; the others are shown before.
    """
    from library.errors import Problem, UserError
    from library.weights.loras.checked import as_json, check

    problems: list[Problem] = []
    found = []
    for path in given.file:
        try:
            checked = check(path)
        except UserError as fault:
            problems += fault.problems
            continue
        found.append(checked)
        if checked.broken:
            broken.append(path)
        if not given.json:
            show(checked, every=given.verbose)
            if given.keys or given.show_all_keys:
                list_keys(path, every=given.show_all_keys)
    if given.json:
        import json

        listed = [as_json(one) | _listed_keys(given, one.lora.path) for one in found]
        sys.stdout.write(json.dumps(listed, indent=2) + "\n")
    if problems:
        raise UserError(problems)


def show(found: "Checked", *, every: bool) -> None:
    """Print what was found in a file."""
    from library.weights.loras.statistics import by_block, together
    from library.weights.loras.tables import show_table

    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(one.kind for one in found.modules).most_common())
    path, layout, title = found.lora.path, found.lora.layout, found.family.title
    _line(f"{path}: {title}, layout {layout}, {', '.join(found.dtypes)}, {len(found.modules)} modules ({kinds})")
    if found.keys.bundled:
        _line(f"{len(found.keys.bundled)} tensors of bundled embeddings")
    if every:
        columns = ("module", "kind", "rank", "alpha", "rank used", "norm")
        modules = (
            (one.name, one.kind, *map(_number, (one.rank, one.alpha, one.used, one.norm))) for one in found.modules
        )
        show_table("Modules", columns, modules, words=2)
    columns = ("block", "modules", "rank", "alpha", "rank used", "norm of the change")
    blocks = map(_block_row, by_block(found.modules))
    show_table("Blocks", columns, blocks, last=_block_row(together("all", found.modules)))
    rows = ((one.program, f"{one.taken:,}", one.takes) for one in found.verdicts)
    show_table("Programs", ("program", "modules taken", "takes"), rows)
    for one in found.verdicts:
        for remark in _remarks(one, every=every):
            _line(f"{one.program}: {remark}")
    for what, names in _findings(found):
        _line(f"{what}: {_listed(names, every=every)}")
    for gap in found.gaps:
        _line(f"metadata: {gap}")
    _line("broken" if found.broken else "sound")


def _findings(found: "Checked") -> list[tuple[str, list[str]]]:
    """What is wrong with tensors and names, with the modules that it is about."""
    told = [
        ("not finite", [f"{one.name}.{leaf}" for one in found.modules for leaf in one.not_finite]),
        ("more than float16 can hold", [f"{one.name}.{leaf}" for one in found.modules for leaf in one.too_large]),
        ("changes nothing", [one.name for one in found.modules if one.is_zero]),
        (f"no module of {found.family.title}", list(found.strange)),
        (f"of another size than in {found.family.title}'s full-size models", list(found.sized)),
    ]
    return [(f"{len(names)} {what}", names) for what, names in told if names]


def _remarks(verdict: "Verdict", *, every: bool) -> list[str]:
    if verdict.refused:
        return [f"doesn't load it, {verdict.refused}"]
    reasons: dict[str, list[str]] = {}
    for key, reason in verdict.dropped:
        reasons.setdefault(reason, []).append(key)
    told = [f"{len(keys)} left out, {reason}: {_listed(keys, every=every)}" for reason, keys in reasons.items()]
    return [*told, *verdict.notes]


def _listed(names: Sequence[str], *, every: bool) -> str:
    shown = names if every else names[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _block_row(one: "BlockFacts") -> tuple[str, ...]:
    return (one.block, str(one.modules), _span(one.ranks), _span(one.alphas), _span(one.used), _number(one.norm))


def _span(numbers: Sequence[float]) -> str:
    """The least and the greatest of sorted numbers."""
    if not numbers:
        return "-"
    return f"{numbers[0]:g}" if numbers[0] == numbers[-1] else f"{numbers[0]:g}-{numbers[-1]:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _line(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def list_keys(path: Path, *, every: bool) -> None:
    """Print a line for each key as sd-scripts' check_lora_weights.py does; only factors unless `every`."""
    found = list(_key_facts(path, every=every))
    _line(f"number of LoRA modules: {len(found)}")
    for key, shape, mean, least in found:
        _line(f"{key},{str(shape).replace(', ', '-')},{mean},{least}")


def _listed_keys(given: argparse.Namespace, path: Path) -> dict[str, object]:
    """The same for JSON; nothing where it wasn't asked for."""
    if not given.keys and not given.show_all_keys:
        return {}
    names = ("key", "shape", "mean", "least")
    return {"keys": [dict(zip(names, one, strict=True)) for one in _key_facts(path, every=given.show_all_keys)]}


def _key_facts(path: Path, *, every: bool) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Key, shape, and of the numbers without their signs the mean and the least."""
    from library.weights.files import read_tensors

    for key, tensor in read_tensors(path).items():
        if every or any(part in key for part in _FACTORS):
            size = tensor.float().abs()
            mean, least = (float(size.mean()), float(size.min())) if size.numel() else (0.0, 0.0)
            yield key, tuple(tensor.shape), mean, least


if __name__ == "__main__":
    sys.exit(main())
