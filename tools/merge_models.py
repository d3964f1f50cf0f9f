"""Merge checkpoints into one: a weighted sum of any number of them, or A + ratio * (B - C).

    python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output merged.safetensors
    python tools/merge_models.py --models a.safetensors tuned.safetensors base.safetensors --difference --ratios 1 \\
        --output merged.safetensors

All are single files in the original layout of one family, in any mix of precisions; convert_checkpoint.py makes such
files of diffusers folders. They are read and written tensor by tensor. The new file has the tensors of the first one,
less its EMA copies: what another file lacks stays as the first has it, what only others have is left out.

--block_weights takes lists as LoRAs' block weights are written (17 or 26 numbers of SD1 and SD2, 12 or 20 of SDXL;
26 and 20 name all blocks, in the others the blocks that are not named count 1). Each belongs to a file after the
first: its ratio is multiplied by its number in each block, and the first file takes what is left of it. So `--ratios 0
1` with one list gives each block of the second file by that list alone. The first number counts for all that is no
U-Net.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from library.errors import Problem
    from library.models.bases import SingleFile
    from library.weights.checkpoints.blend import Blend, Recipe, Share

INTERPOLATIONS = ("weighted_sum", "sigmoid", "inv_sigmoid")
_THREADS = 2
_ADVICE = "convert_checkpoint.py makes a single file of a folder"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from library.tool_script import add_precision

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--models", type=Path, nargs="+", required=True, metavar="FILE", help="the checkpoints, two or more")
    add("--ratios", type=float, nargs="+", help="one for each (default: equal); with --difference one (default: 1)")
    add("--output", type=Path, required=True, metavar="FILE", help="the new checkpoint, a .safetensors file")
    add("--difference", action="store_true", help="first + ratio * (second - third)")
    add("--block_weights", nargs="+", metavar="LIST", help="a list for each file after the first; one of --difference")
    add("--interpolation", choices=INTERPOLATIONS, default="weighted_sum", help="bends the ratios of two models")
    add("--unet_only", action="store_true", help="all but the U-Net stays as in the first")
    add("--device", help="where tensors are added (default: cpu)")
    add_precision(found, "--precision", "dtype that is computed in (default: float)", "float")
    add_precision(found, "--saving_precision", "dtype of the new file (default: each tensor's in the first)")
    add("--show_skipped", action="store_true", help="list tensors that are kept from the first, or left out")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse_args(argv)
    from library.tool_script import run

    return run(lambda: work(given))


def work(given: argparse.Namespace) -> None:
    """Merge and write.

    Raises:
        UserError: flags, or files that can't be read or don't belong together.
    """
    if given.ratios is None:
        given.ratios = [1.0] if given.difference else [1 / len(given.models)] * len(given.models)
    from library.console import say
    from library.weights.outputs import tell_replaced

    _check(given)
    bases = _opened(given)
    tell_replaced(given.output, given.models)
    say("loading libraries")
    from library.weights.loras.block_weights import block_list, read_numbers

    where, family = "--block_weights", bases[0].family
    lists = [block_list(read_numbers(text, where), family, where) for text in given.block_weights or ()]
    import torch

    from library.models.tensors import Reader
    from library.tool_script import device_of, dtype_of
    from library.weights.checkpoints.blend import Work, plan_blend
    from library.weights.checkpoints.stream import write_stream

    saving = dtype_of(given.saving_precision)
    how = Work(dtype_of(given.precision) or torch.float32, saving, device_of(given.device), given.unet_only)
    with Reader() as reader:
        blend = plan_blend([base.header for base in bases], _recipe(given, lists), reader, how)
        write_stream(blend.planned, given.output, _metadata(given, bases), "merging", threads=_THREADS)
    _tell(given, blend)
    say(f"{blend.blended} of {len(blend.planned)} tensors merged: {given.output}")


def _check(given: argparse.Namespace) -> None:
    from library.errors import Problem, UserError
    from library.weights.outputs import output_problems

    count = len(given.models)
    problems = [Problem(f"--models {path}", "is a folder", _ADVICE) for path in given.models if path.is_dir()]
    absent = [path for path in given.models if not path.exists()]
    problems += [Problem(f"--models {path}", "there is no such file", "check the name") for path in absent]
    problems += output_problems(given.output, "--output", (".safetensors",))
    if count < 2 or (given.difference and count != 3):
        wanted = "three models, A + ratio * (B - C)" if given.difference else "two models or more"
        problems.append(Problem("--models", f"{count} given", f"name {wanted}"))
    else:
        problems += _number_problems(given, *((1, 1) if given.difference else (count, count - 1)))
    if problems:
        raise UserError(problems)


def _number_problems(given: argparse.Namespace, ratios: int, lists: int) -> "list[Problem]":
    from library.errors import Problem

    found = []
    if len(given.ratios) != ratios:
        found.append(Problem("--ratios", f"{len(given.ratios)} given", f"give {ratios}"))
    elif bad := [ratio for ratio in given.ratios if not abs(ratio) < float("inf")]:
        found.append(Problem("--ratios", f"{bad[0]} is no finite number"))
    if given.block_weights and len(given.block_weights) != lists:
        wrong = f"{len(given.block_weights)} lists given"
        advice = f"give {lists}; each is one argument, without spaces or quoted"
        found.append(Problem("--block_weights", wrong, advice))
    if given.interpolation != "weighted_sum":
        whole = abs(sum(given.ratios) - 1) < 1e-6 and all(0 <= ratio <= 1 for ratio in given.ratios)
        if given.difference or len(given.models) != 2 or not whole:
            wrong = f"{given.interpolation} bends the ratios of two models that add up to 1"
            found.append(Problem("--interpolation", wrong, "leave it out"))
    return found


def _opened(given: argparse.Namespace) -> "list[SingleFile]":
    """The files, by their headers.

    Raises:
        UserError: one is no base model, or they are of several families; all problems at once.
    """
    from library.errors import Problem, UserError
    from library.models.bases import SingleFile
    from library.models.places import Place

    bases: list[SingleFile] = []
    problems: list[Problem] = []
    for path in given.models:
        try:
            bases.append(SingleFile(Place(path, path.name, "--models")))
        except UserError as fault:
            problems += fault.problems
    for base in bases[1:]:
        if base.family is not bases[0].family:
            wrong = f"is an {base.family.title} model, {bases[0].place.path} an {bases[0].family.title} one"
            problems.append(Problem(f"--models {base.place.path}", wrong, "merge models of one family"))
    if problems:
        raise UserError(problems)
    _warn_of_mixture(given, bases)
    return bases


def _warn_of_mixture(given: argparse.Namespace, bases: "Sequence[SingleFile]") -> None:
    """Say so where models that predict different things, or have different noise schedules, are added up.

    Of a difference only the two that make it count: what they share stays out of it.
    """
    from library.console import warn
    from library.models.evidence import decide
    from library.models.info import Said

    told = [decide(base.family, base.evidence(), Said(), base.place.name) for base in bases]
    numbers = [1, 2] if given.difference else [n for n, ratio in enumerate(given.ratios) if ratio or n == 0]
    added = [told[number] for number in numbers]
    predictions = {one.prediction_type for one in added} - {None}
    if len(predictions) < 2 and len({one.zero_terminal_snr for one in added}) < 2:
        return
    what = "predictions" if len(predictions) > 1 else "noise schedules"
    phrases = "; ".join(f"{bases[number].place.name} {', '.join(told[number].findings)}" for number in numbers)
    first = bases[0].place.name + ("" if given.ratios[0] or given.difference else ", whose ratio is 0")
    warn(f"the models are made for different {what}, what comes out may be of no use: {phrases}")
    warn(f"programs will take the new file for what its first model is: {first}")


def _recipe(given: argparse.Namespace, lists: "Sequence[Share]") -> "Recipe":
    from library.console import warn
    from library.weights.checkpoints.blend import bent, difference, weighted_sum

    if given.difference:
        return difference(given.ratios[0], lists[0] if lists else _everywhere)
    ratios = given.ratios
    if abs(total := sum(ratios)) and abs(total - 1) > 1e-6:
        warn(f"the ratios add up to {total:g}, not to 1: all weights become larger or smaller by that")
    if given.interpolation != "weighted_sum":
        second = bent(ratios[1], given.interpolation)
        ratios = [1 - second, second]
    return weighted_sum(ratios, lists or [_everywhere] * (len(ratios) - 1))


def _everywhere(name: str) -> float:
    return 1.0


def _metadata(given: argparse.Namespace, bases: "Sequence[SingleFile]") -> dict[str, str]:
    """The first file's, with what the new one is made of; hashes of what it was go."""
    from library.weights.checkpoints.merged_metadata import merged_metadata
    from library.weights.checkpoints.opened import open_model

    titles = [base.header.metadata.get("modelspec.title") or base.place.path.stem for base in bases]
    own = merged_metadata(open_model(given.models[0], "--models"), (), given.output)
    return own | {"modelspec.merged_from": ", ".join(titles)}


def _tell(given: argparse.Namespace, blend: "Blend") -> None:
    """What isn't blended: all of it on stdout where that is wanted, else how much."""
    from collections import Counter

    from library.console import say
    from library.weights.loras.tables import show_table

    if given.show_skipped:
        show_table("not merged", ["tensor", "why"], blend.kept, words=2)
        return
    for why, count in Counter(why for _, why in blend.kept).items():
        say(f"not merged, {why}: {count} tensors (--show_skipped lists them)")


if __name__ == "__main__":
    sys.exit(main())
