"""Merge LoRAs into a base model, or several LoRAs into one.

    python tools/merge_lora.py --sd_model base.safetensors --models cat.safetensors --save_to base-cat.safetensors
    python tools/merge_lora.py --models cat.safetensors style.safetensors --ratios 1 0.5 --save_to both.safetensors
    python tools/merge_lora.py --models both.safetensors --new_rank 16 --save_to smaller.safetensors
    python tools/merge_lora.py --unmerge --models both.safetensors style.safetensors --ratios 1 0.5 --save_to back.pt

LoRAs become one by putting their factors side by side, which is exact: ranks add up. --svd, or --new_rank, cuts the sum
to a rank. A ratio counts once: where sd-scripts' merge_lora.py, which squares it, was given 0.7071, give 0.5 here.
--unmerge takes LoRAs out of a model, or the later files out of the first. Files of any layout and rank can be mixed;
the new one has the first's layout. What has no two factors (DoRA, IA3, OFT ...) can be merged into a base model only.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch

    from library.errors import Problem
    from library.models.families import Family
    from library.weights.loras.block_weights import BlockList
    from library.weights.loras.lora import Lora
    from library.weights.loras.merging import Joined, Merged, Weighted

T = TypeVar("T")
LAYOUTS = ("kohya", "kohya-diffusers", "peft", "diffusers")
DEFAULT_RANK = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from library.tool_script import add_precision

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--models", type=Path, nargs="+", required=True, metavar="FILE", help="LoRA files")
    add("--ratios", type=float, nargs="+", metavar="X", help="strength of each file (default: 1)")
    add(
        "--lbws",
        nargs="+",
        metavar="LIST",
        help="weights by block for each file, as JSON lists: 17 numbers (blocks with attention) or 26 (all) for SD1 "
        "and SD2, 12 or 20 for SDXL; the first is the text encoders'. Blocks that a list doesn't name have weight 1",
    )
    add("--sd_model", type=Path, metavar="PATH", help="base model to merge into: a file, or a diffusers folder")
    add(
        "--save_to", type=Path, required=True, metavar="PATH", help="the new file; a folder where the base model is one"
    )
    add("--unmerge", action="store_true", help="take the LoRAs out of the base model, or later files out of the first")
    add("--concat", action="store_true", help="put ranks side by side: what is done unless told otherwise")
    add("--shuffle", action="store_true", help="nothing to do: the order of ranks has no effect here")
    add("--svd", action="store_true", help="cut the sum of LoRAs to --new_rank")
    add("--new_rank", type=int, metavar="RANK", help=f"implies --svd (default with it: {DEFAULT_RANK})")
    add("--new_conv_rank", type=int, metavar="RANK", help="of 3x3 convolutions; implies --svd (default: --new_rank)")
    add("--layout", choices=LAYOUTS, help="of the new LoRA (default: the first file's)")
    meaning = "dtype of the new tensors (default: float32 for a LoRA; in a base model each keeps its own)"
    add_precision(found, "--save_precision", meaning)
    add_precision(found, "--precision", "dtype of the sums in a base model; LoRAs are added in float64", "float")
    add("--device", metavar="DEVICE", help="where it is computed (default: cpu)")
    add("--no_metadata", action="store_true", help="write what loaders need and no titles, tags or dates")
    add("--v2", action="store_true", help="nothing to do: the family is read from the files, and must be SD2 with this")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after a line for each thing that is wrong with the input, 130 after Ctrl-C."""
    from library.tool_script import run

    given = parser().parse_args(argv)
    return run(lambda: work(given))


def work(given: argparse.Namespace) -> None:
    """Check the flags and files, merge, and tell what became of it."""
    from library.console import say
    from library.models.families import SD1
    from library.weights.loras.block_weights import block_list

    numbers = _check(given)
    _check_headers(given.models)
    base = _base_family(given)
    if given.shuffle:
        say("--shuffle: nothing to do, the order of ranks has no effect here")
    say("loading libraries")
    from library.errors import UserError
    from library.tool_script import device_of
    from library.weights.loras.lora import read
    from library.weights.loras.merging import Weighted, check_families

    device = device_of(given.device)
    files = _all(read, given.models)
    ratios = given.ratios or [1.0] * len(files)
    weighted = [Weighted(file, ratio) for file, ratio in zip(files, ratios, strict=True)]
    family = check_families(weighted)
    if given.v2 and family is not None and not family.v2:
        raise UserError.single("--v2", f"{files[0].path} is made for {family.title}", "leave --v2 out")
    if base is not None and family not in (None, base):
        wrong = f"is an {base.title} model, {files[0].path} is made for {family.title if family else 'another'}"
        raise UserError.single(f"--sd_model {given.sd_model}", wrong, "use a model and LoRAs of one family")
    for number, one in enumerate(numbers):
        blocks = block_list(one, family or SD1, f"--lbws, list {number + 1}")
        _tell_unnamed(files[number], blocks)
        weighted[number] = Weighted(files[number], ratios[number], blocks)
    if given.sd_model is not None:
        _into_model(given, weighted, device)
    else:
        _into_lora(given, weighted, device)


def _base_family(given: argparse.Namespace) -> "Family | None":
    """The family of --sd_model, by its headers or configs, after what they tell of --save_to; None without the flag.

    Raises:
        UserError: it is no base model.
    """
    from library.models.bases import open_base
    from library.models.places import Place
    from library.weights.outputs import tell_replaced

    if given.sd_model is None:
        return None
    found = open_base(Place(given.sd_model, given.sd_model.name, "--sd_model"), None).family
    tell_replaced(given.save_to, [given.sd_model])
    return found


def _check(given: argparse.Namespace) -> list[tuple[float, ...]]:
    """What flags alone tell. Returns the lists of --lbws.

    Raises:
        UserError: with all that is wrong.
    """
    from math import isfinite

    from library.errors import Problem, UserError
    from library.weights.checkpoints.replaced_folder import new_folder_problems
    from library.weights.loras.block_weights import read_numbers
    from library.weights.outputs import LORA_ENDINGS, MODEL_ENDINGS, output_problems

    found: list[Problem] = []
    count, into_model = len(given.models), given.sd_model is not None
    for flag, values in (("--ratios", given.ratios), ("--lbws", given.lbws)):
        if values is not None and len(values) != count:
            found.append(Problem(flag, f"{len(values)} for {count} files", "give one for each of --models"))
    found += [Problem("--ratios", f"{x} is no finite number") for x in given.ratios or () if not isfinite(x)]
    found += [
        Problem(flag, f"{rank} is no rank", "give a number from 1 on")
        for flag, rank in (("--new_rank", given.new_rank), ("--new_conv_rank", given.new_conv_rank))
        if rank is not None and rank < 1
    ]
    if given.concat and _cuts(given):
        found.append(Problem("--concat", "contradicts --svd and --new_rank", "leave one of them out"))
    only_loras = {"--layout": given.layout, "--svd, --new_rank or --new_conv_rank": _cuts(given) or None}
    if into_model:
        found += [
            Problem(flag, "has no meaning with --sd_model, which is left a whole model", "leave one of them out")
            for flag, value in only_loras.items()
            if value is not None
        ]
        if not given.sd_model.exists():
            found.append(Problem(f"--sd_model {given.sd_model}", "there is no such file or folder"))
    if into_model and given.sd_model.is_dir():
        found += new_folder_problems(given.sd_model, given.save_to)
    if not into_model or given.sd_model.is_file():
        found += output_problems(given.save_to, "--save_to", MODEL_ENDINGS if into_model else LORA_ENDINGS)
    if not into_model and given.unmerge and count < 2:
        found.append(Problem("--unmerge", "there is nothing to take away", "give --sd_model, or two files or more"))
    numbers = []
    for place, text in enumerate(given.lbws or (), 1):
        try:
            numbers.append(read_numbers(text, f"--lbws, list {place}"))
        except UserError as fault:
            found += fault.problems
    if found:
        raise UserError(found)
    return numbers


def _cuts(given: argparse.Namespace) -> bool:
    return bool(given.svd or given.new_rank is not None or given.new_conv_rank is not None)


def _check_headers(paths: Sequence[Path]) -> None:
    """Raises UserError naming every file that is missing or damaged, before any is read whole."""
    from library.models.pickles import read_weights

    _all(lambda path: read_weights(path, str(path)), paths)


def _all(read: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """What is read from each file. Raises UserError with what is wrong with all of them."""
    from library.errors import UserError

    found: list[T] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            found.append(read(path))
        except UserError as fault:
            problems += fault.problems
    if problems:
        raise UserError(problems)
    return found


def _tell_unnamed(file: "Lora", blocks: "BlockList") -> None:
    """Say how much of a file a short list doesn't speak of."""
    from library.console import say
    from library.weights.loras.block_weights import lengths

    count = sum(not blocks.names(name) for name in file.modules)
    if count:
        length, every = len(blocks.named), lengths(blocks.family)[1]
        say(f"{file.path}: {_count(count, 'module')} in blocks that a list of {length} doesn't name: weight 1")
        say(f"a list of {every} numbers names them all")


def _into_model(given: argparse.Namespace, weighted: "Sequence[Weighted]", device: "torch.device") -> None:
    import torch

    from library.console import say, warn
    from library.tool_script import dtype_of
    from library.weights.checkpoints.merge import merge_into

    for one in weighted:
        if one.lora.rest:
            warn(f"{one.lora.path}: its embeddings stay out of the model; keep them beside it (convert_embedding.py)")
    report = merge_into(
        given.sd_model,
        weighted,
        given.save_to,
        compute=dtype_of(given.precision) or torch.float32,
        dtype=dtype_of(given.save_precision),
        device=device,
        with_metadata=not given.no_metadata,
        unmerge=given.unmerge,
    )
    for path, names in report.unknown.items():
        warn(f"{path}: {len(names)} of its modules are not in the model and left out, e.g. {names[0]}")
    done = "taken out of" if given.unmerge else "merged into"
    say(f"{report.modules} modules {done} {report.tensors} tensors ({report.size / 2**20:.1f} MiB): {given.save_to}")


def _into_lora(given: argparse.Namespace, weighted: "Sequence[Weighted]", device: "torch.device") -> None:
    from datetime import datetime

    import torch

    from library.console import say
    from library.tool_script import dtype_of
    from library.weights.loras.lora import write
    from library.weights.loras.merged_metadata import merged_metadata
    from library.weights.loras.merging import check_families, merged, refuse_in_layout

    refuse_in_layout(weighted, given.layout or weighted[0].lora.layout)
    rank = (given.new_rank or DEFAULT_RANK) if _cuts(given) else None
    dtype = dtype_of(given.save_precision) or torch.float32
    found = merged(
        weighted,
        rank=rank,
        conv_rank=given.new_conv_rank,
        unmerge=given.unmerge,
        dtype=dtype,
        device=device,
    )
    metadata = merged_metadata(
        [one.lora for one in weighted],
        found.lora.modules,
        check_families(weighted),
        title=given.save_to.stem,
        date=datetime.now(),
        minimum=given.no_metadata,
    )
    write(found.lora.with_modules(found.lora.modules, metadata), given.save_to, layout=given.layout)
    _show(found)
    if found.lost:
        say(f"{len(found.lost)} modules came to nothing and are left out, e.g. {found.lost[0]}")
    say(f"{given.save_to}: {_count(len(found.lora.modules), 'module')}, made of {_count(len(weighted), 'file')}")


def _show(found: "Merged") -> None:
    """A table on stdout: for each block, ranks before and after, and how much of the change is kept."""
    from library.models.families import SD1
    from library.weights.loras.block_weights import SLOTS, slot_of
    from library.weights.loras.lora import family_of
    from library.weights.loras.tables import show_table

    family = family_of(found.lora) or SD1
    blocks: dict[int, list[Joined]] = {}
    for one in found.modules:
        blocks.setdefault(slot_of(one.name, family), []).append(one)
    rows = []
    for block, here in sorted(blocks.items()):
        whole = sum(one.norm**2 for one in here) ** 0.5
        kept = sum((one.norm * one.retained) ** 2 for one in here) ** 0.5
        before, after = _span([one.before for one in here]), _span([one.after for one in here])
        share = f"{100 * kept / whole:.2f} %" if whole else "-"
        rows.append((SLOTS[block], str(len(here)), before, after, f"{whole:.4g}", share))
    show_table("Merged", ("block", "modules", "ranks before", "rank", "norm", "kept"), rows)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("s" if number > 1 else "")


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


if __name__ == "__main__":
    sys.exit(main())
