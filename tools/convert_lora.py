"""Write a LoRA file in the layout of other programs.

    python tools/convert_lora.py from_diffusers.safetensors for_a1111.safetensors --to kohya
    python tools/convert_lora.py loha.safetensors plain.safetensors --to peft --as_lora

Layouts: `kohya` is what A1111, ComfyUI, InvokeAI and sd-scripts load (diffusers takes it, too); `kohya-diffusers` is
the same with SDXL's blocks called as diffusers calls them; `peft` is what diffusers and peft save, with alphas in the
metadata; `diffusers` is older and knows no alphas, so they are multiplied into the weights. The input may have any of
them, and its numbers stay as they are, bit for bit, unless --save_precision, --as_lora or --to diffusers change them.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.tool_script import add_precision, dtype_of, run

if TYPE_CHECKING:
    from library.weights.loras.lora import Lora, Module

_LAYOUTS = ("kohya", "kohya-diffusers", "peft", "diffusers")
_LYCORIS = "lycoris.kohya"


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
    from library.weights.loras.lora import read, refuse_layout, write

    lora = read(given.input)
    before = lora.layout
    if given.as_lora:
        lora = as_lora(lora)
    refuse_layout(lora, given.to)
    if given.to.startswith("kohya"):
        lora = complete(lora)
    if given.to == "kohya-diffusers" and any("output_blocks_2_2_conv" in name for name in lora.modules):
        warn("A1111 drops SDXL's first up-sampler from files with blocks of diffusers; --to kohya has all of it")
    if given.output.suffix != ".safetensors" and lora.metadata:
        warn(f"{given.output.suffix} files have no metadata; those of {given.input.name} are left out")
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
    if not source.is_file():
        problems.append(Problem(str(source), "there is no such weight file"))
    problems += output_problems(output, "OUT", LORA_ENDINGS)
    if problems:
        raise UserError(problems)
    return [output, output.with_name(f"{output.stem}.text_encoder{output.suffix}")] if split else [output]


def as_lora(lora: "Lora") -> "Lora":
    """The same changes with plain LoRA modules, as far as they have exact factors."""
    from library.console import track, warn
    from library.weights.loras.amended import amended
    from library.weights.loras.forms import as_leaves, factors, kind
    from library.weights.loras.lora import Module, family_of

    family = family_of(lora)
    projections_are_windows = family is not None and family.name == "sd1"
    modules: dict[str, Module] = {}
    kept: list[str] = []
    made = 0
    for name, module in track(lora.modules.items(), "factors", len(lora.modules)):
        found = None if kept_as_it_is(module) else factors(module)
        if found is None:
            modules[name] = module
            if not kept_as_it_is(module):
                kept.append(f"{name} ({kind(module)})")
            continue
        if projections_are_windows and name.endswith(("_proj_in", "_proj_out")) and len(found.shape) == 2:
            found = replace(found, shape=(*found.shape, 1, 1))
        leaves = as_leaves(found, next(iter(module.leaves.values())).dtype)
        more = {leaf: tensor for leaf, tensor in module.leaves.items() if leaf == "dora_scale"}
        modules[name] = Module(name, leaves | more, found.scale * found.rank)
        made += 1
    if kept:
        warn(f"{len(kept)} modules have no exact factors and stay as they are, e.g. {kept[0]}")
    if not made:
        return lora
    dim, alpha = summary(modules)
    metadata = amended(lora.metadata, dim=dim, alpha=alpha, comment="made a plain LoRA of LyCORIS modules")
    if metadata.get("ss_network_module") == _LYCORIS and not kept:
        metadata |= {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
    return lora.with_modules(modules, metadata)


def kept_as_it_is(module: "Module") -> bool:
    """It is a plain LoRA already, or a DoRA of one."""
    return module.leaves.keys() - {"dora_scale"} == {"lora_down.weight", "lora_up.weight"}


def complete(lora: "Lora") -> "Lora":
    """With what loaders of kohya's layout look for: an alpha in every module, and metadata that tell the base model.

    A file without an alpha counts as if it were the rank, so that is what is written.
    """
    from library.console import warn
    from library.weights.loras.amended import amended
    from library.weights.loras.lora import family_of

    modules = {
        name: replace(module, alpha=float(rank)) if module.alpha is None and (rank := rank_of(module)) else module
        for name, module in lora.modules.items()
    }
    metadata = amended(lora.metadata)
    family = family_of(lora)
    if family is None:
        warn(f"{lora.path}: nothing tells whether it is for SD1 or SD2, so its metadata don't either")
        return lora.with_modules(modules, metadata)
    dim, alpha = summary(modules)
    plain = all(map(kept_as_it_is, modules.values()))
    told = {
        "ss_v2": str(family.v2),
        "ss_base_model_version": family.versions["epsilon"],
        "ss_network_module": "networks.lora" if plain else _LYCORIS,
        "ss_network_dim": str(dim),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps({}),
    }
    return lora.with_modules(modules, told | metadata)


def rank_of(module: "Module") -> int | None:
    """The rank that alpha is divided by; None where it doesn't count, or LyCORIS has rules of its own."""
    for leaf in ("lora_down.weight", "hada_w1_b"):
        if leaf in module.leaves:
            return int(module.leaves[leaf].shape[0])
    return None


def summary(modules: "Mapping[str, Module]") -> tuple[int | str, float | str]:
    """The rank and alpha of all modules, `Dynamic` where they differ."""
    ranks = {rank_of(module) for module in modules.values()}
    alphas = {module.alpha for module in modules.values()}
    rank = ranks.pop() if len(ranks) == 1 else None
    alpha = alphas.pop() if len(alphas) == 1 else None
    return rank or "Dynamic", "Dynamic" if alpha is None else alpha


if __name__ == "__main__":
    sys.exit(main())
