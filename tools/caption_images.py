"""Describe the pictures of a folder in words, by a BLIP or GIT model.

    python tools/caption_images.py pictures --beam_search --num_beams 3
    python tools/caption_images.py pictures --git --remove_words --output_path pictures.jsonl

--model_id is a folder as transformers saves models, or a name on the Hugging Face hub. BLIP draws its captions unless
--beam_search is given; with one --seed a picture gets the same caption in any batch. GIT takes the likeliest words
unless --top_p is given. Captions go into a text file beside each picture, or all into one .json or .jsonl file.
Pictures that have theirs are passed over, so that a stopped run goes on where it was; --overwrite makes them anew.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.captioning.flags import add_outputs, add_reading

if TYPE_CHECKING:
    import torch

    from library.data.captioning.captioner import Kind, Manner

BLIP, GIT = "Salesforce/blip-image-captioning-large", "microsoft/git-large-textcaps"
ORIGINAL_ENDINGS = (".pth", ".pt", ".ckpt")
ORIGINAL = "model_large_caption.pth"
"""What BLIP's authors call the weights of `BLIP`; sd-scripts' tool takes them by default, and GUIs name their URL."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("train_data_dir", type=Path, metavar="DIR", help="folder of pictures")
    model = found.add_argument_group("captioner")
    model.add_argument("--model_id", metavar="MODEL", help=f"folder or hub name (default: {BLIP}; with --git: {GIT})")
    model.add_argument(
        "--caption_weights", metavar="MODEL", help=f"another name of --model_id; no .pth files but {ORIGINAL}"
    )
    model.add_argument("--git", action="store_true", help="use a GIT model")
    model.add_argument("--device", metavar="NAME", help="(default: cuda where there is one, else cpu)")
    add_reading(model)
    words = found.add_argument_group("words")
    words.add_argument("--beam_search", action="store_true", help="search for the likeliest caption, draw nothing")
    words.add_argument("--num_beams", type=int, default=1, metavar="N", help="of --beam_search (default: 1)")
    words.add_argument(
        "--top_p", type=float, metavar="P", help="draw from the words that make up this probability (BLIP: 0.9)"
    )
    words.add_argument("--max_length", type=int, metavar="N", help="tokens of a caption (default: 75; GIT: 50)")
    words.add_argument("--min_length", type=int, metavar="N", help="tokens of a caption (default: 5; GIT: 0)")
    words.add_argument(
        "--prompt", metavar="TEXT", help='how captions begin, left out of the text (BLIP: "a picture of")'
    )
    words.add_argument("--remove_words", action="store_true", help='leave out phrases like "with the words xyz"')
    words.add_argument("--seed", type=int, default=42, metavar="N", help="of what is drawn (default: 42)")
    add_outputs(found, "captions", ".caption")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse_args(argv)
    from library.tool_script import run

    return run(lambda: caption(given))


def caption(given: argparse.Namespace) -> None:
    """Caption what has no caption yet.

    Raises:
        UserError: flags, model or folder can't be used.
    """
    from library.console import say
    from library.data.captioning import loop
    from library.data.captioning.captioner import Captioner, find_model, kind_of, without_writing
    from library.data.captioning.pictures import Loaded, find_work
    from library.data.captioning.store import open_store
    from library.errors import UserError

    _check(given)
    for line in _notices(given):
        say(line)
    folder: Path = given.train_data_dir
    store = open_store(folder, given.caption_extension, given.output_path, "caption", relative=given.relative_paths)
    work = find_work(folder, store, recursive=given.recursive, again=given.overwrite)
    for line in work.notices:
        say(line)
    if not work.todo:
        say(f"all {work.done} pictures have captions; --overwrite makes them anew")
        return
    if given.output_path is None and (closed := loop.problems_with_places(work.todo)):
        raise UserError(closed)
    weights = BLIP if _is_usual(given) else given.caption_weights
    place = find_model(given.model_id or weights or (GIT if given.git else BLIP), "--model_id")
    kind = kind_of(place, "--model_id")
    if given.git and kind != "git":
        raise UserError.single("--git", f"{place} is a {kind.upper()} model", "leave --git out")
    manner = _manner(given, kind)
    model = Captioner(place, kind, manner, _device(given.device))
    say(f"{loop.counted(len(work.todo))}, {kind.upper()} model {place}")

    def describe(batch: Sequence[Loaded]) -> list[str]:
        names = [one.path.relative_to(folder).as_posix() for one in batch]
        texts = model([one.values for one in batch if one.values is not None], names)
        return [without_writing(text) for text in texts] if given.remove_words else texts

    workers = given.max_data_loader_n_workers
    threads = min(16, os.cpu_count() or 1) if workers is None else workers
    outcome = loop.describe_all(
        work,
        store,
        model.prepare,
        describe,
        what="captions",
        batch_size=given.batch_size,
        threads=threads,
        aloud=given.debug,
    )
    loop.report(work, outcome, "captions")


def _check(given: argparse.Namespace) -> None:
    """Raises UserError with all that is wrong with the flags."""
    from library.data.captioning.metadata_files import problem_with_output
    from library.data.captioning.store import problem_with_extension
    from library.errors import Problem, UserError

    problems = []
    for flag, least in (
        *(("batch_size", 1), ("max_data_loader_n_workers", 0), ("num_beams", 1)),
        *(("max_length", 1), ("min_length", 0), ("seed", 0)),
    ):
        value = getattr(given, flag)
        if value is not None and value < least:
            problems.append(Problem(f"--{flag}", f"{value} isn't {least} or more"))
    if given.top_p is not None and not 0 < given.top_p <= 1:
        problems.append(Problem("--top_p", f"{given.top_p} isn't above 0 and at most 1"))
    if given.caption_weights is not None and given.model_id is not None:
        problems.append(Problem("--caption_weights", "is another name of --model_id", "give one of them"))
    if given.caption_weights and given.caption_weights.endswith(ORIGINAL_ENDINGS) and not _is_usual(given):
        wrong = f"{given.caption_weights} is in the layout of BLIP's authors"
        problems.append(
            Problem("--caption_weights", wrong, f"use --model_id {BLIP}, the same weights for transformers")
        )
    if given.output_path is not None:
        problems += filter(None, [problem_with_output(given.output_path, "--output_path")])
    else:
        problems += filter(None, [problem_with_extension(given.caption_extension, "--caption_extension")])
        if given.relative_paths:
            problems.append(Problem("--relative_paths", "has no meaning without --output_path"))
    if not given.train_data_dir.is_dir():
        problems.append(Problem(str(given.train_data_dir), "there is no such folder"))
    if problems:
        raise UserError(problems)


def _is_usual(given: argparse.Namespace) -> bool:
    """Whether --caption_weights names the file whose weights the usual BLIP model holds, by URL or path."""
    return bool(given.caption_weights) and given.caption_weights.replace("\\", "/").rpartition("/")[2] == ORIGINAL


def _notices(given: argparse.Namespace) -> Iterator[str]:
    """What the flags say in vain, or otherwise than it is done, as GUIs send all of them."""
    if given.top_p is not None and given.beam_search:
        yield "--top_p: has no effect with --beam_search"
    if given.num_beams > 1 and not given.beam_search:
        yield "--num_beams: has no effect without --beam_search"
    if _is_usual(given):
        yield f"--caption_weights: {BLIP} is taken, the same weights for transformers"


def _manner(given: argparse.Namespace, kind: "Kind") -> "Manner":
    """How captions are written: as the flags say, else as is usual for the kind of model.

    Raises:
        UserError: the flags don't go together for this kind.
    """
    from library.data.captioning.captioner import Manner
    from library.errors import UserError

    blip = kind == "blip"
    if given.prompt and not blip:
        raise UserError.single("--prompt", "GIT models take none", "leave it out")
    longest = given.max_length or (75 if blip else 50)
    shortest = given.min_length if given.min_length is not None else (min(5, longest) if blip else 0)
    if shortest > longest:
        raise UserError.single("--min_length", f"{shortest} is more than --max_length, {longest}", "lower it")
    prompt = ("a picture of" if given.prompt is None else given.prompt) if blip else ""
    drawn = None if given.beam_search else given.top_p or (0.9 if blip else None)
    return Manner(longest, shortest, given.num_beams if given.beam_search else 1, drawn, prompt, given.seed)


def _device(name: str | None) -> "torch.device":
    """The device that --device names, or the best one that is here."""
    import torch

    from library.tool_script import device_of

    return device_of(name or ("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
