"""Compare what two LoRAs change: norms, direction and distance, by block and as a whole.

    python tools/compare_loras.py first.safetensors second.safetensors
    python tools/compare_loras.py first.safetensors second.safetensors --tolerance 0.001

Ranks, alphas, layouts and dtypes of the files may differ: compared are the changes of the weights. The relative
difference is the norm of the difference over the larger of both norms: 0 for the same change, 1 if one of them is zero,
2 for opposite ones. Of a DoRA the directions are compared, and the magnitudes count in a module's difference. With
--tolerance the exit code is 1 if the difference of any module is larger; a module that only one file has counts as 1.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    from library.weights.loras.comparing import Comparison, Pair

ABOVE = 1
_SHOWN = 8
_WIDTH = 44
_COLUMNS = ("norm A", "norm B", "cosine", "relative difference")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("first", type=Path, metavar="A", help="a LoRA file")
    found.add_argument("second", type=Path, metavar="B", help="another one for the same family")
    found.add_argument("--tolerance", type=float, metavar="X", help="exit with 1 if a module's difference is larger")
    found.add_argument("--verbose", action="store_true", help="a row for each module, and every name")
    found.add_argument("--device", metavar="NAME", help="where the algebra runs, e.g. cuda (default: cpu)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a difference is above the tolerance, or 2 after a line for each thing that is
    wrong with the input."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.tool_script import run

    outcome: list[int] = []
    return run(lambda: outcome.append(work(given))) or outcome[0]


def work(given: argparse.Namespace) -> int:
    """Compare and print; returns 1 if a difference is above the tolerance, else 0.

    Raises:
        UserError: an input that is no LoRA, or LoRAs that can't be compared.
    """
    _check(given)
    from library.console import warn
    from library.tool_script import device_of
    from library.weights.loras.comparing import compare
    from library.weights.loras.lora import read

    device = device_of(given.device)
    found = compare(read(given.first), read(given.second), device)
    _show(found, verbose=given.verbose)
    if given.tolerance is None or not (above := found.above(given.tolerance)):
        return 0
    warn(f"{len(above)} differ by more than --tolerance {given.tolerance:g}, e.g. {above[0]}")
    return ABOVE


def _check(given: argparse.Namespace) -> None:
    from library.errors import Problem, UserError
    from library.models.pickles import read_weights

    problems = []
    if given.tolerance is not None and not given.tolerance >= 0:
        problems.append(Problem(f"--tolerance {given.tolerance:g}", "is no difference", "give 0 or more"))
    for path in (given.first, given.second):
        try:
            read_weights(path, str(path))
        except UserError as fault:
            problems += fault.problems
    if problems:
        raise UserError(problems)


def _show(found: "Comparison", *, verbose: bool) -> None:
    from library.weights.loras.tables import block_of, block_order, show_table

    blocks: dict[str, list[Pair]] = {}
    for pair in found.pairs:
        blocks.setdefault(block_of(pair.name), []).append(pair)
    if verbose and found.pairs:
        rows = (
            (pair.name, *map(_rank, pair.ranks), *_numbers([pair])[:3], _share(pair.difference)) for pair in found.pairs
        )
        show_table("Modules", ("module", "rank A", "rank B", *_COLUMNS), rows)
    if found.pairs:
        title = "A and B, what they change"
        columns = ("block", "modules", *_COLUMNS, "largest of a module")
        whole = ("all", f"{len(found.pairs):,}", *_numbers(found.pairs))
        ordered = sorted(blocks, key=block_order)
        show_table(
            title, columns, ((one, f"{len(blocks[one]):,}", *_numbers(blocks[one])) for one in ordered), last=whole
        )
    for line in _lines(found, verbose=verbose):
        sys.stdout.write(f"{line}\n")
    if found.metadata:
        rows = ((key, *(_cut(value) for value in values)) for key, values in found.metadata.items())
        show_table("Metadata that differ", ("key", "A", "B"), rows, words=3)


def _numbers(pairs: "Sequence[Pair]") -> tuple[str, ...]:
    from library.weights.loras.comparing import total

    found = total(pairs)
    cosine = "-" if found.cosine is None else f"{found.cosine:.6f}"
    return f"{found.norms[0]:.5g}", f"{found.norms[1]:.5g}", cosine, _share(found.difference), _share(found.largest)


def _share(number: float) -> str:
    return f"{number:.4g}"


def _rank(rank: int | None) -> str:
    return "-" if rank is None else str(rank)


def _lines(found: "Comparison", *, verbose: bool) -> Iterator[str]:
    """What is in one file alone, or can't be compared."""
    listed = {
        "modules in A alone": found.only[0],
        "modules in B alone": found.only[1],
        "modules in forms that can't be compared": found.strangers,
        "other tensors that differ": found.rest,
    }
    for title, names in listed.items():
        shown = names if verbose else names[:_SHOWN]
        more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
        if names:
            yield f"{len(names)} {title}: {', '.join(shown)}{more}"


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


if __name__ == "__main__":
    sys.exit(main())
