"""Write a LoRA file in the layout of other programs.

    python tools/convert_lora.py from_diffusers.safetensors for_a1111.safetensors --to kohya
    python tools/convert_lora.py loha.safetensors plain.safetensors --to peft --as_lora

Layouts: `kohya` is what A1111, ComfyUI, InvokeAI and sd-scripts load (diffusers takes it, too); `kohya-diffusers` is
the same with SDXL's blocks called as diffusers calls them; `peft` is what diffusers and peft save, with alphas in the
metadata; `diffusers` is older and knows no alphas, so they are multiplied into the weights. The input may have any of
them, and its numbers stay as they are, bit for bit, unless --save_precision, --as_lora, --one_alpha or --to diffusers
change them.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.tool_script import add_precision, dtype_of, run

if TYPE_CHECKING:
    from library.weights.loras.lora import Lora

_LAYOUTS = ("kohya", "kohya-diffusers", "peft", "diffusers")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("input", type=Path, metavar="IN", help="a LoRA file of any program")
    found.add_argument("output", type=Path, metavar="OUT", help="the new file")
    found.add_argument("--to", required=True, choices=_LAYOUTS, help="layout of the new file")
    add_precision(found, "--save_precision", "dtype of the new file (default: as the input has it)")
    found.add_argument(
        "--split_text_encoder",
        action="store_true",
        help="write the text encoders' modules into a file of their own, OUT with .text_encoder before its ending",
    )
    found.add_argument(
        "--as_lora",
        action="store_true",
        help="make plain LoRA modules of LoHa, LoKr and Tucker's LoCon, which is exact but can be large; other kinds "
        "stay as they are",
    )
    found.add_argument(
        "--one_alpha",
        action="store_true",
        help="give all modules the commonest alpha and multiply the rest into the weights, so that diffusers, too, "
        "takes each at its strength",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line for each thing that is wrong with the input."""
    given = parser().parse_args(argv)
    return run(lambda: convert(given))


def convert(given: argparse.Namespace) -> list[Path]:
    """Write the file, or both, and return their paths.

    Raises:
        UserError: the input is no LoRA, the layout can't hold it, or there is no place for the output.
    """
    files = outputs(given.input, given.output, split=given.split_text_encoder)
    from library.console import say, warn
    from library.errors import UserError
    from library.weights.loras.alphas import otherwise_in_diffusers, with_one_alpha
    from library.weights.loras.amended import NAME
    from library.weights.loras.lora import family_of, read, refuse_layout, refuse_not_finite, write

    lora = read(given.input)
    refuse_not_finite(lora)
    before, name = lora.layout, {NAME: lora.metadata[NAME]} if NAME in lora.metadata else {}
    if given.as_lora:
        from library.weights.loras.plain import as_lora

        lora = as_lora(lora)
    refuse_layout(lora, given.to)
    lora = lora.with_modules(lora.modules, {**lora.metadata, **name})
    if given.to.startswith("kohya"):
        lora = with_alphas(lora)
    if given.one_alpha:
        lora = with_one_alpha(lora)
    elif given.to.startswith("kohya") and (odd := otherwise_in_diffusers(lora.modules)):
        warn(f"alphas differ, and diffusers would give {len(odd)} modules another's; --one_alpha makes them alike")
    if family_of(lora) is None:
        warn(f"{lora.path}: nothing tells which family it is for, so its metadata don't either")
    if given.to == "kohya-diffusers" and any("output_blocks_2_2_conv" in name for name in lora.modules):
        warn("A1111 drops SDXL's first up-sampler from files with blocks of diffusers; --to kohya has all of it")
    chosen = [lora]
    if given.split_text_encoder:
        halves = [{n: m for n, m in lora.modules.items() if n.startswith("lora_te") is text} for text in (False, True)]
        if not all(halves):
            wrong = f"holds only modules of {'text encoders' if halves[1] else 'the U-Net'}"
            raise UserError.single(str(given.input), wrong, "leave out --split_text_encoder")
        chosen = [replace(lora, modules=halves[0]), replace(lora, modules=halves[1], rest={})]
    for one, path in zip(chosen, files, strict=True):
        write(one, path, layout=given.to, dtype=dtype_of(given.save_precision))
        say(f"{len(one.modules)} modules, {before} to {given.to}: {path}")
    return files


def outputs(source: Path, output: Path, *, split: bool) -> list[Path]:
    """The files that will be written.

    Raises:
        UserError: there is no input, or the output's name or folder won't do.
    """
    from library.errors import Problem, UserError
    from library.weights.outputs import LORA_ENDINGS, output_problems

    problems = []
    if source.is_dir():
        problems.append(Problem(str(source), "is a folder", "name a LoRA file in it"))
    elif not source.is_file():
        problems.append(Problem(str(source), "there is no such weight file"))
    problems += output_problems(output, "OUT", LORA_ENDINGS)
    if problems:
        raise UserError(problems)
    return [output, output.with_name(f"{output.stem}.text_encoder{output.suffix}")] if split else [output]


def with_alphas(lora: "Lora") -> "Lora":
    """With an alpha in every module, as loaders of kohya's layout look for it: a file without one counts as if it were
    the rank, so that is what is written."""
    from library.weights.loras.lora import rank_of

    modules = {
        name: replace(module, alpha=float(rank)) if module.alpha is None and (rank := rank_of(module)) else module
        for name, module in lora.modules.items()
    }
    return lora.with_modules(modules, lora.metadata)


if __name__ == "__main__":
    sys.exit(main())
