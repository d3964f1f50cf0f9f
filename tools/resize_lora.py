"""Make a LoRA smaller: keep the greatest singular values of every module's change.

    python tools/resize_lora.py --model style.safetensors --save_to small.safetensors --new_rank 8
    python tools/resize_lora.py --model style.safetensors --save_to small.safetensors --new_rank 32 \\
        --dynamic_method sv_fro --dynamic_param 0.9 --save_precision fp16
    python tools/resize_lora.py --model style.safetensors --save_to small.safetensors --target_size_mb 20

Without a dynamic method every module gets --new_rank. With one, each gets the rank that it needs, at most --new_rank:
sv_ratio P keeps values above the greatest / P; sv_cumulative P the fewest that add up to the share P of all;
sv_fro P the fewest that keep the share P of the Frobenius norm. A rank above a module's own changes nothing there.
LoCon, LoHa and LoKr modules become plain LoRA modules, and of a DoRA the direction is resized. All new modules have
one alpha, which every program takes for what it is. A table says what each block had, has and kept. The output has the
layout of the input; it may replace it.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    from library.errors import Problem
    from library.weights.loras.ranks import Criterion, Method
    from library.weights.loras.resizing import Change, Limits

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")
RANK = 4
MEGABYTE = 1_000_000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    sys.path.insert(0, str(ROOT))
    from library.tool_script import add_precision

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", type=Path, required=True, metavar="FILE", help="the LoRA file")
    found.add_argument("--save_to", type=Path, required=True, metavar="FILE", help="the new file")
    found.add_argument(
        "--new_rank", type=int, metavar="N", help=f"default {RANK}; with --target_size_mb only a limit if it is given"
    )
    found.add_argument(
        "--new_conv_rank", type=int, metavar="N", help="of convolutions, 1x1 ones too (default: as --new_rank)"
    )
    found.add_argument("--dynamic_method", choices=METHODS, help="give each module the rank that it needs")
    found.add_argument("--dynamic_param", type=float, metavar="P", help="of sv_ratio at least 1, else above 0, up to 1")
    found.add_argument("--legacy_rank", action="store_true", help="one rank more than needed, as sd-scripts has it")
    found.add_argument(
        "--target_size_mb",
        type=float,
        metavar="MB",
        help="choose --dynamic_param of the method (default: sv_fro) so that the file has at most this many million "
        "bytes",
    )
    add_precision(found, "--save_precision", "of the new factors (default: float)")
    found.add_argument("--device", metavar="NAME", help="where the algebra runs, e.g. cuda (default: cpu)")
    found.add_argument("--verbose", action="store_true", help="a second table, with a row for each module")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line for each thing that is wrong with the input."""
    given = parser().parse_args(argv)
    from library.tool_script import run

    return run(lambda: work(given))


def work(given: argparse.Namespace) -> None:
    """Resize a file.

    Raises:
        UserError: flags that contradict each other, or an input that can't be resized.
    """
    _check(given)
    import torch

    from library.console import say, warn
    from library.tool_script import device_of, dtype_of
    from library.weights.loras.lora import read, write
    from library.weights.loras.resizing import criterion_for_size, resized

    device, dtype = device_of(given.device), dtype_of(given.save_precision) or torch.float32
    if device.type == "mps":
        say("--device mps: computed on the CPU, because mps has no float64")
        device = torch.device("cpu")
    criterion, limits = _criterion(given), _limits(given)
    lora = read(given.model)
    if given.target_size_mb is not None:
        criterion = criterion_for_size(
            lora, criterion, limits, dtype, int(given.target_size_mb * MEGABYTE), device, given.save_to.name
        )
        say(f"--target_size_mb {given.target_size_mb:g}: picked {_flags(criterion)}")
    found = resized(lora, criterion, limits, dtype, device)
    write(found.lora, given.save_to)
    _tell(found.changes, limits, verbose=given.verbose, static=criterion.method == "static")
    if found.kept:
        warn(f"{len(found.kept)} modules have no small factors and stay as they are, e.g. {found.kept[0]}")
    say(f"{given.save_to}: {given.save_to.stat().st_size / MEGABYTE:.2f} MB")


def _check(given: argparse.Namespace) -> None:
    from library.errors import Problem, UserError
    from library.models.pickles import read_weights
    from library.weights.outputs import LORA_ENDINGS, output_problems

    problems = [
        Problem(f"{flag} {rank}", "is no rank", "give 1 or more")
        for flag, rank in (("--new_rank", given.new_rank), ("--new_conv_rank", given.new_conv_rank))
        if rank is not None and rank < 1
    ]
    problems += _dynamic_problems(given)
    problems += output_problems(given.save_to, "--save_to", LORA_ENDINGS)
    try:
        read_weights(given.model, f"--model {given.model}")
    except UserError as fault:
        problems += fault.problems
    if problems:
        raise UserError(problems)


def _dynamic_problems(given: argparse.Namespace) -> "Iterable[Problem]":
    from library.errors import Problem

    target = given.target_size_mb
    if target is not None:
        if not 0 < target < MEGABYTE:
            yield Problem(f"--target_size_mb {target:g}", "is no size", "give millions of bytes")
        if given.dynamic_param is not None:
            yield Problem("--dynamic_param", "is what --target_size_mb chooses", "leave out one of the two")
        if given.save_to.suffix != ".safetensors":
            yield Problem("--target_size_mb", "counts the bytes of .safetensors files", "give such a --save_to")
    elif given.dynamic_method is None:
        if given.dynamic_param is not None:
            yield Problem("--dynamic_param", "belongs to a method", f"add --dynamic_method {'|'.join(METHODS)}")
        if given.legacy_rank:
            yield Problem("--legacy_rank", "belongs to dynamic methods", "add --dynamic_method, or leave it out")
    elif given.dynamic_param is None:
        advice = "4 for sv_ratio" if given.dynamic_method == "sv_ratio" else f"0.9 for {given.dynamic_method}"
        yield Problem("--dynamic_method", "needs a --dynamic_param", f"for example {advice}")
    elif (problem := _criterion(given).problem("--dynamic_param")) is not None:
        yield problem


def _criterion(given: argparse.Namespace) -> "Criterion":
    from library.weights.loras.ranks import Criterion

    default: Method = "static" if given.target_size_mb is None else "sv_fro"
    parameter = 1.0 if given.dynamic_param is None else given.dynamic_param
    return Criterion(given.dynamic_method or default, parameter, given.legacy_rank)


def _limits(given: argparse.Namespace) -> "Limits":
    from library.weights.loras.resizing import Limits

    linear = given.new_rank if given.new_rank or given.target_size_mb is not None else RANK
    return Limits(linear, given.new_conv_rank or linear)


def _flags(criterion: "Criterion") -> str:
    return f"--dynamic_method {criterion.method} --dynamic_param {criterion.parameter:.10g}"


def _tell(changes: "Sequence[Change]", limits: "Limits", *, verbose: bool, static: bool) -> None:
    """Tables of what changed, and lines on ranks that were limited or could not grow."""
    from library.console import say
    from library.weights.loras.resizing import module_rows, rows
    from library.weights.loras.tables import show_table

    if verbose:
        columns = ("module", "old rank", "new rank", "sum kept", "Frobenius norm kept", "greatest / least kept")
        show_table("Modules", columns, module_rows(changes))
    *blocks, whole = rows(changes)
    show_table("Ranks", ("block", "modules", "old rank", "new rank", "Frobenius norm kept"), blocks, last=whole)
    if not static and (cut := sum(change.new < change.needed for change in changes)):
        say(f"{cut} of {len(changes)} modules need more than --new_rank allows")
    if static and (small := sum((limits.of(one.shape) or 0) > one.new for one in changes)):
        say(f"{small} of {len(changes)} modules have no more than their old rank, which is below --new_rank")


if __name__ == "__main__":
    sys.exit(main())
