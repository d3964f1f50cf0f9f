"""Extract a LoRA from a fine-tuned checkpoint: the best approximation of low rank to what it changed of its base.

    python tools/extract_lora.py --model_org base.safetensors --model_tuned tuned.safetensors --save_to lora.safetensors
    python tools/extract_lora.py --model_org base --model_tuned tuned --save_to lora.safetensors --dim 64 --conv_dim 32

Either model may be a file or a diffusers folder; their family is read from them. Ranks are found by a randomized SVD of
each weight's difference, and tables tell how much of it was left out. As in sd-scripts, 1 % of the values of both
factors is cut off (--clamp_quantile 1 leaves them, and is closer), and factors are float32 unless told. Text encoders
are taken only if one of their weights differs by more than --min_diff.
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
    from library.models.families import Family, PredictionType
    from library.weights.checkpoints.extraction import Extracted

FAMILY_FLAGS = {"--v2": "sd2", "--sdxl": "sdxl"}
METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")
_WORST = 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from library.tool_script import add_precision

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--model_org", required=True, metavar="MODEL", help="the base: a file or a diffusers folder")
    add("--model_tuned", required=True, metavar="MODEL", help="the model that was trained from it")
    add("--save_to", type=Path, required=True, metavar="FILE", help="the LoRA")
    add("--dim", type=int, default=4, help="rank of Linear and 1x1 modules (default: 4)")
    add("--conv_dim", type=int, help="rank of 3x3 convolutions, which are left out unless told (LoRA-C3Lier)")
    add("--dynamic_method", choices=METHODS, help="choose each module's rank; --dim and --conv_dim are the highest")
    add("--dynamic_param", type=float, help="what the method goes by, as in resize_lora.py")
    add("--exact", action="store_true", help="decompose whole matrices: slower by far, hardly closer")
    add("--seed", type=int, default=0, help="of the randomized SVD (default: 0)")
    add("--clamp_quantile", type=float, default=0.99, help="quantile beyond which values are cut off (default: 0.99)")
    add("--min_diff", type=float, default=0.01, help="what text encoders must differ by (default: 0.01)")
    add_precision(found, "--load_precision", "round the weights of both models to this before they are subtracted")
    add_precision(found, "--save_precision", "dtype of the LoRA (default: float)")
    add("--device", help="where matrices are decomposed, such as cuda (default: cpu)")
    add("--no_metadata", action="store_true", help="leave out modelspec.*; the few ss_ keys that loaders need stay")
    add("--verbose", action="store_true", help="a table of all modules too")
    kind = found.add_mutually_exclusive_group()
    for flag, name in FAMILY_FLAGS.items():
        kind.add_argument(flag, dest="family", action="store_const", const=name, help="checked: families are read")
    add("--v_parameterization", action="store_true", help="they predict v, where the files don't tell (SD2's default)")
    for which in ("original", "tuned"):
        add(f"--load_{which}_model_to", metavar="DEVICE", help="accepted: no model is loaded as a whole")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse_args(argv)
    from library.tool_script import run

    return run(lambda: work(given))


def work(given: argparse.Namespace) -> None:
    """Extract and write the LoRA, then print what it leaves out.

    Raises:
        UserError: flags, or models that can't be read or don't belong together.
    """
    _check(given)
    from library.console import say, track, warn

    family, prediction = _families(given)
    say("loading libraries")
    import torch

    from library.errors import UserError
    from library.tool_script import device_of, dtype_of
    from library.weights.checkpoints.difference import Difference
    from library.weights.checkpoints.extraction import Extraction, extracted, text_differs, wanted
    from library.weights.checkpoints.opened import open_model
    from library.weights.loras.alphas import otherwise_in_diffusers, with_one_alpha
    from library.weights.loras.lora import Lora, write
    from library.weights.loras.ranks import Criterion

    if given.load_original_model_to or given.load_tuned_model_to:
        say("--load_original_model_to, --load_tuned_model_to: nothing to do, no model is loaded as a whole")
    device, dtype = device_of(given.device), dtype_of(given.save_precision) or torch.float32
    criterion = Criterion(given.dynamic_method, given.dynamic_param) if given.dynamic_method else Criterion()
    plan = Extraction(given.dim, given.conv_dim, criterion, given.clamp_quantile, dtype, given.exact, given.seed)
    org, tuned = open_model(given.model_org, "--model_org"), open_model(given.model_tuned, "--model_tuned")
    difference = Difference(org, tuned, dtype_of(given.load_precision))
    modules = list(wanted(difference.targets, plan))
    difference.check_shapes([target for target, _ in modules])
    if difference.missing:
        named = ", ".join(difference.missing[:3])
        warn(f"{len(difference.missing)} modules are in one of the models only and left out, first {named}")
    if not text_differs(difference, given.min_diff, device):
        say(f"no weight of a text encoder differs by more than {given.min_diff:g}: the LoRA is of the U-Net only")
        modules = [(target, rank) for target, rank in modules if target.part == "unet"]
    found = list(track(extracted(difference, modules, plan, device), "extracting", len(modules)))
    kept = {one.module.name: one.module for one in found if one.module is not None}
    if not kept:
        wrong = "has the same weights as --model_org, as far as a LoRA could tell"
        raise UserError.single("--model_tuned", wrong, "give the model that was trained from it")
    if len(kept) < len(found):
        say(f"{len(found) - len(kept)} of {len(found)} modules don't differ at all and are left out")
    metadata = _metadata(given, family, prediction)
    lora = Lora(given.save_to, "kohya", kept, metadata)
    alike = with_one_alpha(lora) if given.dynamic_method or otherwise_in_diffusers(kept) else lora
    write(alike, given.save_to, dtype=dtype)
    _show(given, found)
    say(f"LoRA of {len(kept)} modules: {given.save_to}")


def _check(given: argparse.Namespace) -> None:
    from library.errors import Problem, UserError
    from library.weights.outputs import LORA_ENDINGS, output_problems

    problems = list(output_problems(given.save_to, "--save_to", LORA_ENDINGS))
    if any(given.save_to.resolve() == Path(model).resolve() for model in (given.model_org, given.model_tuned)):
        problems.append(Problem(f"--save_to {given.save_to}", "is one of the models", "name a new file"))
    if Path(given.model_org).resolve() == Path(given.model_tuned).resolve():
        problems.append(Problem("--model_tuned", "is the same as --model_org", "give the one that was trained from it"))
    ranks = (("--dim", given.dim), ("--conv_dim", given.conv_dim))
    low = [(flag, rank) for flag, rank in ranks if rank is not None and rank < 1]
    problems += [Problem(flag, f"{rank} is below 1", "ranks are 1 or more") for flag, rank in low]
    if not 0.5 < given.clamp_quantile <= 1:
        wrong = f"{given.clamp_quantile:g} is not above 0.5 and up to 1"
        problems.append(Problem("--clamp_quantile", wrong, "0.99 is usual, 1 cuts nothing off"))
    if not 0 <= given.min_diff < float("inf"):
        problems.append(Problem("--min_diff", f"{given.min_diff:g} is below 0", "0 takes any difference"))
    problems += _dynamic_problems(given.dynamic_method, given.dynamic_param)
    if problems:
        raise UserError(problems)


def _dynamic_problems(method: str | None, parameter: float | None) -> "list[Problem]":
    from library.errors import Problem

    if method is None:
        return [] if parameter is None else [Problem("--dynamic_param", "has no meaning alone", "add --dynamic_method")]
    if parameter is None:
        return [Problem("--dynamic_method", f"{method} needs --dynamic_param", "such as 0.9 of sv_fro")]
    if method == "sv_ratio":
        right, advice = 1 <= parameter < float("inf"), "sv_ratio keeps values above the greatest / this, from 1 on"
    else:
        right, advice = 0 < parameter <= 1, f"{method} takes numbers above 0 and up to 1"
    return [] if right else [Problem("--dynamic_param", f"{parameter:g} can't be used", advice)]


def _families(given: argparse.Namespace) -> "tuple[Family, PredictionType]":
    """Family and prediction type, from headers and configs alone: what the tuned model tells, then the flag, then the
    base. Where nothing does, SD2 counts as predicting v, as in sd-scripts."""
    from library.errors import Problem, UserError
    from library.models import hub
    from library.models.bases import open_base
    from library.models.evidence import decide
    from library.models.info import Said
    from library.models.places import locate

    flags = (("--model_org", given.model_org), ("--model_tuned", given.model_tuned))
    org, tuned = (open_base(locate(path, flag, hub.base_files(None, set())), None) for flag, path in flags)
    problems = []
    if org.family is not tuned.family:
        wrong = f"is an {tuned.family.title} model, --model_org an {org.family.title} one"
        problems.append(Problem("--model_tuned", wrong, "give two models of one family"))
    if given.family and given.family != org.family.name:
        flag = next(flag for flag, name in FAMILY_FLAGS.items() if name == given.family)
        problems.append(Problem(flag, f"--model_org is an {org.family.title} model", "leave the flag out"))
    if problems:
        raise UserError(problems)
    silent = tuned.evidence().prediction is None and not given.v_parameterization
    telling = org if silent else tuned
    said = Said(v_parameterization=given.v_parameterization or None)
    prediction = decide(telling.family, telling.evidence(), said, telling.place.name).prediction_type
    return org.family, prediction or "v_prediction"


def _metadata(given: argparse.Namespace, family: "Family", prediction: "PredictionType") -> dict[str, str]:
    """What loaders need to know, and `modelspec.*`."""
    import json
    from datetime import datetime

    import library
    from library.weights.metadata import ModelSpec, modelspec

    version, dynamic = family.versions[prediction], given.dynamic_method is not None
    conv = {} if given.conv_dim is None else {"conv_dim": str(given.conv_dim), "conv_alpha": str(float(given.conv_dim))}
    found = {
        "ss_v2": str(family.v2),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic" if dynamic else str(given.dim),
        "ss_network_alpha": "Dynamic" if dynamic else str(float(given.dim)),
        "ss_network_args": json.dumps(conv),
    }
    if given.no_metadata:
        return found
    now, program = datetime.now().astimezone(), f"lorasmith/{library.__version__}"
    spec = ModelSpec(version, now, program, given.save_to.stem, v_prediction=prediction == "v_prediction")
    return found | modelspec(spec)


def _show(given: argparse.Namespace, found: "Sequence[Extracted]") -> None:
    """Per block, and the modules that lose most or all of them: ranks, the size of the difference, what is left out."""
    from library.weights.loras.tables import block_of, block_order, show_table

    blocks: dict[str, list[Extracted]] = {}
    for one in found:
        blocks.setdefault(block_of(one.target.name), []).append(one)
    columns = ["block", "modules", "rank", "norm", "left out %"] + ["without clamping %"] * (given.clamp_quantile < 1)
    ordered = sorted(blocks, key=block_order)
    rows = [[block, str(len(blocks[block])), *_figures(blocks[block], given)] for block in ordered]
    show_table("extracted", columns, rows, last=["all", str(len(found)), *_figures(found, given)])
    listed = list(found) if given.verbose else sorted(found, key=lambda one: -one.error)[:_WORST]
    title = "all modules" if given.verbose else "modules that leave out most"
    show_table(title, ["module", *columns[2:]], [[one.target.name, *_figures([one], given)] for one in listed])


def _figures(some: "Sequence[Extracted]", given: argparse.Namespace) -> list[str]:
    """Ranks from least to greatest, and Frobenius norms of all together, errors as shares of the difference's."""
    ranks = sorted({one.rank for one in some})
    norm, *errors = (sum(value**2 for value in values) ** 0.5 for values in zip(*map(_squares, some), strict=True))
    shares = [f"{100 * error / norm:.2f}" if norm else "-" for error in errors]
    ranged = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    return [ranged, f"{norm:.4g}", *(shares if given.clamp_quantile < 1 else shares[:1])]


def _squares(one: "Extracted") -> tuple[float, float, float]:
    return one.norm, one.error, one.unclamped


if __name__ == "__main__":
    sys.exit(main())
