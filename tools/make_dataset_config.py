"""Look at a folder of pictures and write two files to train from: a dataset TOML and a training TOML.

    python tools/make_dataset_config.py pictures --pretrained_model_name_or_path sd15.safetensors --trigger mycat

writes `mycat-dataset.toml` and `mycat.toml` beside each other, with resolution, repeats, epochs and steps computed from
the pictures, the captions and the base model. Every computed line says why. Train with

    accelerate launch train_network.py --config_file mycat.toml

Pictures may lie in the folder itself and in folders inside it, at any depth; names like `10_mycat cat` tell repeats and
class tokens.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    from library.data.survey import FolderFacts
    from library.options.proposal import Wish

_GOALS = ("character", "style")
_SHOWN = 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("folder", type=Path, metavar="FOLDER", help="pictures, with captions beside them or without")
    found.add_argument(
        "--pretrained_model_name_or_path", required=True, metavar="MODEL", help="base model: a file, folder or hub id"
    )
    found.add_argument("--goal", choices=_GOALS, default="character", help="default: character, also for objects")
    found.add_argument("--preset", metavar="NAME", help="settings of library/presets to start from, whatever the goal")
    found.add_argument("--trigger", default="", metavar="WORD", help="the word that is to mean it")
    found.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: the preset's)")
    found.add_argument(
        "--output_dir", default="output", metavar="FOLDER", help="of the trained files (default: output)"
    )
    found.add_argument(
        "--output_name", metavar="NAME", help="of the trained files (default: the trigger or the folder)"
    )
    found.add_argument(
        "--write_to", type=Path, default=Path(), metavar="FOLDER", help="of both TOML files (default: .)"
    )
    found.add_argument("--overwrite", action="store_true", help="replace TOML files that are there already")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line for each thing that is wrong."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.tool_script import run

    return run(lambda: write(given))


def write(given: argparse.Namespace) -> tuple[Path, Path]:
    """Write both files; their paths.

    Raises:
        UserError: no such folder, no pictures in it, no such model or preset, or a file is there already.
    """
    from library.console import say, warn
    from library.data.copies import write_copy
    from library.data.survey import Captions, look_at
    from library.errors import Problem, UserError
    from library.options.proposal import Subset, propose

    name = re.sub(r"[^\w.-]+", "-", given.output_name or given.trigger or given.folder.resolve().name)
    files = given.write_to / f"{name}-dataset.toml", given.write_to / f"{name}.toml"
    problems = []
    if not given.folder.is_dir():
        problems.append(Problem("FOLDER", f"there is no folder {given.folder}"))
    if given.steps is not None and given.steps < 1:
        problems.append(Problem("--steps", f"{given.steps} isn't 1 or more"))
    problems += [
        Problem(str(file), "is there already", "--overwrite replaces it, --output_name or --write_to names another")
        for file in files
        if file.exists() and not given.overwrite
    ]
    if problems:
        raise UserError(problems)
    facts, passed_over = look_at(given.folder.resolve())
    for line in passed_over:
        warn(line)
    bad = [f"{path}: {wrong}" for one in facts for path, wrong in one.bad]
    _warn_of(bad, "left out of the training (skip_bad_images)")
    for one in facts:
        if one.repeats == 0:
            warn(f"{one.folder} is left out: its name says 0 repeats")
    facts = [one for one in facts if one.count and one.repeats != 0]
    if not facts:
        raise UserError.single(str(given.folder), "no pictures there that can be read")
    wish = _wish(given, name, facts, len(bad))
    subsets = []
    for one in facts:
        ending = one.extension(wish.extension)
        captions = one.captions[ending] if ending else Captions()
        subsets.append(Subset(one.folder, one.count, captions.count, ending, one.repeats, one.words))
        _warn_of([str(problem) for problem in captions.bad], "training stops there")
        _warn_of(
            [f"{path}: the caption is empty" for path in captions.empty],
            "its picture is learned without words of its own",
        )
    found = propose(wish, subsets, files[0].resolve())
    worded = wish.extension or wish.trigger or all(one.words for one in facts)
    if not worded:
        warn("there are no captions and no --trigger, so the pictures would be learned without words")
    for file, text in zip(files, (found.dataset, found.training), strict=True):
        write_copy(text.encode, file, overwrite=True)
        say(f"written: {file}")
    if given.preset and found.preset != given.preset:
        say(f"--preset {given.preset} has no network, so that it was put on top of the goal's: {found.preset}")
    pictures = sum(one.count for one in facts)
    say(
        f"{pictures} pictures in {len(facts)} folder{'s' if len(facts) > 1 else ''}, "
        f"{found.samples} samples an epoch at {found.resolution} pixels, "
        f"{found.epochs} epochs, about {found.steps} steps"
    )
    say(f"see what it amounts to: python {found.script} --dry_run --config_file {files[1]}")
    return files


def _warn_of(lines: Sequence[str], why: str) -> None:
    """Tell the first of these, and how many more there are."""
    from library.console import warn

    for line in lines[:_SHOWN]:
        warn(f"{line}; {why}")
    if len(lines) > _SHOWN:
        warn(f"{len(lines) - _SHOWN} more like that")


def _wish(given: argparse.Namespace, name: str, facts: "Sequence[FolderFacts]", bad: int) -> "Wish":
    from library.data.survey import are_tags, usual_extension, usual_side
    from library.models.inspect import inspect
    from library.options.proposal import Wish, stands_in

    info = inspect(given.pretrained_model_name_or_path)
    extension = usual_extension(facts)
    endings = [(one, one.extension(extension)) for one in facts]
    captions = [text for one, ending in endings if ending for text in one.captions[ending].texts]
    holding = sum(stands_in(given.trigger, text) for text in captions) if given.trigger else 0
    local = Path(given.pretrained_model_name_or_path)
    return Wish(
        goal=given.goal,
        preset=given.preset or "",
        model=str(local.resolve()) if local.exists() else given.pretrained_model_name_or_path,
        side=info.family.sides[info.prediction_type or "epsilon"],
        usual_side=usual_side(facts),
        trigger=given.trigger,
        named=2 * holding > len(captions),
        extension=extension,
        tags=are_tags(captions),
        output_dir=given.output_dir,
        output_name=name,
        steps=given.steps,
        bad=bad,
    )


if __name__ == "__main__":
    sys.exit(main())
