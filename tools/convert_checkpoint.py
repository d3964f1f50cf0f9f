"""Convert a base model (SD1, SD2, SDXL) between one file in the original layout and a diffusers folder.

    python tools/convert_checkpoint.py model.safetensors model_folder
    python tools/convert_checkpoint.py model_folder model.safetensors --fp16

A name with an ending is a file, one without a folder. Family and prediction type are read from the model. Tensors are
read and written one by one and stay what they are, bit for bit, unless a precision is named. What has no place in a
folder is listed (SD2's last text layer, text_projection and logit_scale, EMA copies, buffers of the noise schedule),
and so is what a new file gets in its place. Pickles (.ckpt) are read without running anything in them.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    from library.models.info import ModelInfo

_SHOWN = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("src", type=Path, help="the model: .safetensors, .ckpt, or a diffusers folder")
    found.add_argument("dst", type=Path, help="the new .safetensors file, or with a name without ending the new folder")
    family = found.add_mutually_exclusive_group()
    family.add_argument(
        "--v1", action="store_true", help="the model is SD1 (it is recognised; a wrong flag is refused)"
    )
    family.add_argument("--v2", action="store_true", help="the model is SD2 (the same)")
    found.add_argument(
        "--unet_use_linear_projection",
        action="store_true",
        help="SD2 folders: matrices around the U-Net's transformers even where the file has 1x1 kernels",
    )
    for name in ("fp16", "bf16", "float"):
        found.add_argument(f"--{name}", action="store_true", help=f"store weights as {name}")
    found.add_argument("--save_precision_as", choices=("fp16", "bf16", "float"), help="the same (default: as they are)")
    found.add_argument("--epoch", type=int, default=0, help="for a file: written into its metadata")
    found.add_argument("--global_step", type=int, default=0, help="for a file: written into its metadata")
    found.add_argument("--metadata", help='for a file: more metadata, as JSON: \'{"modelspec.author": "me"}\'')
    found.add_argument("--variant", help="which weights of a folder are read, and how a new folder's are called: fp16")
    found.add_argument("--use_safetensors", action="store_true", help="nothing to do: folders always get .safetensors")
    found.add_argument(
        "--reference_model",
        help="for a folder: a diffusers folder, or hub id, whose tokenizers and "
        "scheduler are taken; for a file: a file whose unused tensors are taken over",
    )
    found.add_argument("--vae", help="a file, folder or hub id whose VAE is taken")
    found.add_argument("--text_encoder", help="a model of the same family whose text encoders are taken")
    found.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="for models that don't tell (default: SD2 is probed, others are epsilon)",
    )
    found.add_argument("--ignore_model_hash", action="store_true", help="don't check the hash in a file's metadata")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after a line for each thing that is wrong with the input, 130 after Ctrl-C."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.tool_script import run

    return run(lambda: work(given))


def work(given: argparse.Namespace) -> None:
    """Check, look at the model, convert, tell.

    Raises:
        UserError: flags that contradict each other or the model, a model that can't be read, no room.
    """
    from library.console import say

    precision, metadata = _check(given)
    say("loading libraries")
    from library.models.tensors import WatchfulReader
    from library.tool_script import dtype_of
    from library.weights.checkpoints.folders import write_model
    from library.weights.checkpoints.layouts import file_shaped, groups, held, is_ema, unused
    from library.weights.checkpoints.opened import BaseModel
    from library.weights.checkpoints.single_files import taken_over, write_file
    from library.weights.outputs import tell_replaced

    tell_replaced(given.dst, [given.src])
    looked, reference = _look(given)
    model = BaseModel(file_shaped(looked, linear=given.unet_use_linear_projection and looked.family.v2))
    tensors = held(model)
    left, dtype = unused(model, tensors), dtype_of(precision)
    with WatchfulReader() as reader:
        if _is_folder(given.dst):
            write_model(model, tensors, given.dst, reader, dtype=dtype, variant=given.variant, reference=reference)
            _list("left out, as it has no place in a folder", groups(model, left))
        else:
            spare = left if looked.layout == "single_file" else []
            copies = [one for one in spare if is_ema(one)] if dtype is not None else []
            spare = [one for one in spare if one not in copies]
            if reference:
                other = BaseModel(_inspected(str(reference), "--reference_model"))
                spare = [*spare, *taken_over(other, model, tensors, f"--reference_model {reference}")]
            added = write_file(
                model,
                tensors,
                given.dst,
                reader,
                dtype=dtype,
                spare=spare,
                metadata=metadata,
                predicts=given.prediction_type,
            )
            found: dict[str, list[str]] = {}
            for one in added:
                found.setdefault(one.why, []).append(one.planned.name)
            _list("put into the file beside the model", found)
            _list("left out, as another precision is asked for", groups(model, copies))
            _list("left out, as it has no place in a file", groups(model, left) if looked.layout == "folder" else {})
    _tell_broken(reader.broken)
    say(f"written: {given.dst}")


def _list(title: str, found: Mapping[str, Sequence[str]]) -> None:
    """A line for each kind of tensors: what they are, how many, their names as far as they are few."""
    from library.console import say

    if found:
        say(f"{title}:")
    for what, names in found.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        say(f"  {what}: {', '.join(names[:_SHOWN])}{more}")


def _tell_broken(names: Iterable[str]) -> None:
    """Warn of weights that are no finite numbers; buffers of a noise schedule may be infinite."""
    from library.console import warn
    from library.weights.checkpoints.layouts import of_schedule

    found = sorted(name for name in names if not of_schedule(name))
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        what = "they are written as they are; the model is damaged, or its training diverged"
        warn(f"values that are no finite numbers are in {', '.join(found[:_SHOWN])}{more}: {what}")


def _is_folder(path: Path) -> bool:
    """Whether a name means one: it has no ending, but may have a version, such as `sd1.5`."""
    return path.is_dir() or not path.suffix or path.suffix[1:].isdigit()


def _check(given: argparse.Namespace) -> tuple[str | None, dict[str, str]]:
    """What flags alone tell: the precision and the metadata.

    Raises:
        UserError: all that is wrong with them.
    """
    from library.console import say
    from library.errors import Problem, UserError
    from library.weights.outputs import MODEL_ENDINGS, folder_problems, inside_problems, output_problems

    problems: list[Problem] = []
    chosen = {name for name in ("fp16", "bf16", "float") if getattr(given, name)} | {given.save_precision_as} - {None}
    if len(chosen) > 1:
        problems.append(Problem(", ".join(f"--{name}" for name in sorted(chosen)), "contradict each other", "name one"))
    metadata: dict[str, str] = {}
    try:
        metadata = _metadata(given.metadata)
    except UserError as fault:
        problems += fault.problems
    if _is_folder(given.dst):
        for flag in ("metadata", "epoch", "global_step"):
            if getattr(given, flag):
                problems.append(Problem(f"--{flag}", "has no place in a folder", "leave it out, or write a file"))
        problems += [*folder_problems(given.dst, "dst"), *inside_problems(given.src, given.dst, "dst")]
    else:
        problems += output_problems(given.dst, "dst", MODEL_ENDINGS)
    if given.variant is not None and not given.variant.isalnum():
        problems.append(Problem(f"--variant {given.variant}", "is no name of a variant", "such as fp16"))
    if problems:
        raise UserError(problems)
    for flag, epoch in (("ss_epoch", given.epoch), ("ss_steps", given.global_step)):
        if epoch:
            metadata.setdefault(flag, str(epoch))
    if given.use_safetensors:
        say("--use_safetensors: nothing to do, all weights are written as .safetensors")
    return next(iter(chosen), None), metadata


def _metadata(text: str | None) -> dict[str, str]:
    """`--metadata`: a JSON object, or a Python dict of plain values as older commands have it. Nothing in it runs."""
    import ast
    import json

    from library.errors import UserError

    if text is None:
        return {}
    try:
        values = json.loads(text)
    except ValueError:
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values = None
    if not isinstance(values, dict):
        raise UserError.single("--metadata", "is no JSON object", """such as '{"modelspec.author": "me"}\'""")
    return {
        str(key): value if isinstance(value, str) else json.dumps(value, default=str) for key, value in values.items()
    }


def _look(given: argparse.Namespace) -> "tuple[ModelInfo, Path | None]":
    """The model at `src` with what it predicts, and the place of --reference_model.

    Raises:
        UserError: none of a known family, incomplete, or not what flags say.
    """
    from dataclasses import replace

    from library.console import say
    from library.errors import UserError
    from library.models.info import Said

    velocity = None if given.prediction_type is None else given.prediction_type == "v_prediction"
    places = {"v_parameterization": "--prediction_type"}
    info = _inspected(
        str(given.src),
        "src",
        said=Said(v2=True if given.v2 else None, v_parameterization=velocity, places=places),
        vae=given.vae,
        text_encoder=given.text_encoder,
        variant=None if given.src.is_file() else given.variant,
        check_hash=not given.ignore_model_hash,
    )
    if given.v1 and (info.family.v2 or info.family.takes_sizes):
        wrong = f"{info.name} is an {info.family.title} model, by the tensors and configs that it has"
        raise UserError.single("--v1", wrong, "leave it out")
    reference = _reference(given, info)
    say(info.line)
    if info.prediction_type is not None:
        return info, reference
    from library.models.load import load

    return replace(info, prediction_type=load(info, with_vae=False).prediction_type), reference


def _reference(given: argparse.Namespace, info: "ModelInfo") -> Path | None:
    """The file or folder of --reference_model; None without, or if it is a hub model that can't be had."""
    from library.console import warn
    from library.errors import UserError
    from library.models import hub
    from library.models.places import is_hub_id
    from library.weights.checkpoints.folders import check_reference, reference_files

    name, flag = given.reference_model, "--reference_model"
    if not name:
        return None
    place = Path(name).expanduser()
    if not place.exists() and is_hub_id(name):
        if not _is_folder(given.dst):
            wrong = f"{name} is not here; a new file takes its other tensors from a file"
            raise UserError.single(flag, wrong, "give such a file, or leave it out")
        try:
            place = hub.fetch(name, reference_files(info), flag)
        except UserError as fault:
            warn(f"{fault.problems[0].wrong}: the usual tokenizers and scheduler are taken, which are packaged")
            return None
    if _is_folder(given.dst):
        check_reference(place, info)
    return place


def _inspected(path: str, flag: str, **more: Any) -> "ModelInfo":
    """`models.inspect.inspect`, whose messages name `flag`."""
    from library.errors import Problem, UserError
    from library.models.inspect import FLAG, inspect

    try:
        return inspect(path, **more)
    except UserError as fault:
        named = (Problem(one.where.replace(FLAG, flag), one.wrong, one.advice) for one in fault.problems)
        raise UserError(named, fault.notices) from fault


if __name__ == "__main__":
    sys.exit(main())
