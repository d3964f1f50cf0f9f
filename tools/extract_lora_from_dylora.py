"""Cut a file of a DyLoRA to lower ranks: one file for each multiple of the unit below its own rank.

    python tools/extract_lora_from_dylora.py --model trained.safetensors --save_to cut.safetensors --unit 4

writes `cut-0004.safetensors`, `cut-0008.safetensors` and so on. Each is a plain LoRA that computes what the training
computed with so many ranks: as that divides by the square root of the ranks in use (networks.dylora), alpha becomes
alpha * sqrt(new rank / rank). LyCORIS' training divides by the ranks themselves, so its alphas stay.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    from library.weights.loras.lora import Module

OURS, LYCORIS = "networks.dylora", "lycoris.kohya"
_DEFAULT_UNITS = {OURS: 1, LYCORIS: 4}
_ADVICE = "give a file that networks.dylora trained"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", type=Path, required=True, metavar="FILE", help="the DyLoRA's file")
    found.add_argument(
        "--save_to", type=Path, required=True, metavar="FILE", help="name of the new files, without their rank"
    )
    found.add_argument(
        "--unit",
        type=int,
        metavar="RANKS",
        help="step between ranks, a multiple of the unit it was trained with (default: that unit, or 1)",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line that says what is wrong with the input."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.tool_script import run

    return run(lambda: extract(given.model, given.save_to, given.unit))


def extract(model: Path, save_to: Path, unit: int | None) -> list[Path]:
    """Write the files, each whole or not at all, and return them.

    Raises:
        UserError: `model` is no plain LoRA, its metadata say that it is no DyLoRA or one of another unit, or there is
            no multiple of `unit` below its rank.
    """
    _check(model, save_to)
    from library.console import say, warn
    from library.errors import UserError
    from library.weights.loras.lora import read, refuse_not_finite, write

    lora = read(model)
    refuse_not_finite(lora)
    metadata = lora.metadata
    if any("dora_scale" in module.leaves for module in lora.modules.values()):
        raise UserError.single(str(model), "is a DoRA", _ADVICE)
    if other := other_training(metadata):
        raise UserError.single(str(model), f"was trained by {other}, so its ranks have no order to cut by", _ADVICE)
    if lora.layout in ("peft", "diffusers") and trained_unit(metadata) is None:
        raise UserError.single(str(model), f"is a file of {lora.layout}, which trains no DyLoRA", _ADVICE)
    rank = max(module.leaves["lora_down.weight"].shape[0] for module in lora.modules.values())
    known = trained_unit(metadata)
    step = (known or 1) if unit is None else unit
    if not 0 < step < rank:
        raise UserError.single("--unit", f"{step} is not from 1 to below the file's rank {rank}", "use a smaller unit")
    if known is None:
        warn(
            f"{model}: its metadata don't say how it was trained; only of a DyLoRA cut to steps of {step} is this right"
        )
    elif step % known:
        wrong = f"{step}, but the file was trained in units of {known}: other ranks were never used"
        raise UserError.single("--unit", wrong, f"leave it out, or use a multiple of {known}")
    scaled = metadata.get("ss_network_module") != LYCORIS
    written = []
    for kept in range(step, rank, step):
        path = save_to.with_name(f"{save_to.stem}-{kept:04d}{save_to.suffix}")
        modules = {name: cut(module, kept, scaled=scaled) for name, module in lora.modules.items()}
        write(lora.with_modules(modules, cut_metadata(metadata, rank, kept, scaled=scaled)), path)
        say(f"rank {kept} of {rank}: {path}")
        written.append(path)
    return written


def _check(model: Path, save_to: Path) -> None:
    """Raises UserError with what names and headers alone tell."""
    from library.errors import Problem, UserError
    from library.models.pickles import read_weights
    from library.weights.loras.modules import lycoris_kind
    from library.weights.outputs import LORA_ENDINGS, output_problems

    problems = list(output_problems(save_to, "--save_to", LORA_ENDINGS))
    if not model.exists():
        problems.append(Problem(str(model), "there is no such weight file"))
    elif kind := lycoris_kind(read_weights(model, str(model)).entries):
        problems.append(Problem(str(model), f"is {kind}", _ADVICE))
    if problems:
        raise UserError(problems)


def cut(module: "Module", kept: int, *, scaled: bool) -> "Module":
    """A module with the first `kept` of its ranks; one that has fewer stays whole.

    `scaled`: alpha follows the square root of the share of ranks that stay.
    """
    from dataclasses import replace

    down, up = (module.leaves[f"lora_{way}.weight"] for way in ("down", "up"))
    rank = int(down.shape[0])
    left = min(kept, rank)
    alpha = rank if module.alpha is None else module.alpha
    leaves = {"lora_down.weight": down[:left].clone(), "lora_up.weight": up[:, :left].contiguous()}
    return replace(module, leaves=leaves, alpha=alpha * share(left, rank, scaled=scaled))


def share(kept: int, rank: int, *, scaled: bool) -> float:
    """What alpha is multiplied by."""
    return (kept / rank) ** 0.5 if scaled else 1.0


def cut_metadata(metadata: Mapping[str, str], rank: int, kept: int, *, scaled: bool) -> dict[str, str]:
    """The file's metadata with the new rank and alpha; hashes of the old file are left out."""
    from library.weights.loras.amended import amended

    factor = share(kept, rank, scaled=scaled)
    found = amended(metadata, dim=kept, comment=f"split from DyLoRA, rank {rank} to {kept}")
    if (alpha := _number(found.get("ss_network_alpha"))) is not None:
        found["ss_network_alpha"] = str((alpha or rank) * factor)
    arguments = network_args(found)
    if arguments:
        if _number(arguments.get("conv_dim")):
            arguments["conv_dim"] = str(kept)
            arguments["conv_alpha"] = str((_number(arguments.get("conv_alpha", 1)) or rank) * factor)
        found["ss_network_args"] = json.dumps(arguments)
    return found


def other_training(metadata: Mapping[str, str]) -> str | None:
    """What trained the file where the metadata say that it was no DyLoRA; else None."""
    module = metadata.get("ss_network_module")
    if module == LYCORIS:
        algorithm = str(network_args(metadata).get("algo", "lora")).lower()
        return None if algorithm == "dylora" else f"{LYCORIS} algo={algorithm}"
    return None if module in (OURS, None, "None") else module


def trained_unit(metadata: Mapping[str, str]) -> int | None:
    """How many ranks the training took at a time: as the metadata say, or the module's default; None if no module is
    named there."""
    default = _DEFAULT_UNITS.get(metadata.get("ss_network_module", ""))
    if default is None:
        return None
    arguments = network_args(metadata)
    unit = _number(arguments.get("unit", arguments.get("block_size")))
    return int(unit) if unit and unit >= 1 else default


def network_args(metadata: Mapping[str, str]) -> dict[str, object]:
    """`ss_network_args` as a dictionary; empty where the file has none that can be read."""
    try:
        found = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main())
