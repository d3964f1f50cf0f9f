"""Show the text that stands in a .safetensors file beside its tensors, or change it.

    python tools/show_metadata.py lora.safetensors
    python tools/show_metadata.py lora.safetensors --trigger_words 30
    python tools/show_metadata.py lora.safetensors --strip private --save_to public.safetensors
    python tools/show_metadata.py lora.safetensors --set modelspec.author=Kim --in_place

On a terminal it is a table, elsewhere sorted JSON as sd-scripts prints it. LoRAs, embeddings and base models will do.
A change copies the tensors byte for byte, so that their hashes stay right; sshs_legacy_hash is made anew.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PARSED = ("{", "[")
_LONGEST = 300
_TAGS = 20


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("file", type=Path, nargs="?", metavar="FILE", help="the file to look at")
    found.add_argument("--model", type=Path, metavar="FILE", help="the same, as sd-scripts' tool takes it")
    shown = found.add_argument_group("what is shown")
    form = shown.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="sorted JSON on a terminal, too")
    form.add_argument("--table", action="store_true", help="a table even where no terminal is")
    shown.add_argument("--parsed", action="store_true", help="values that are JSON as such, not as text; means --json")
    shown.add_argument(
        "--trigger_words",
        type=int,
        nargs="?",
        const=_TAGS,
        metavar="N",
        help=f"the trigger phrase, classes and the N most frequent tags instead ({_TAGS} unless told)",
    )
    change = found.add_argument_group("what is changed, in this order")
    change.add_argument(
        "--strip",
        nargs="?",
        const="private",
        choices=("private", "all"),
        help="private: take away folder names, tags, comments and facts of the session, and cut paths to file names; "
        "all: take away everything but what tensors can't be read without",
    )
    change.add_argument(
        "--remove", action="append", default=[], metavar="KEY", help="take away a key, or with KEY* all that begin so"
    )
    change.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key")
    target = change.add_mutually_exclusive_group()
    target.add_argument("--save_to", type=Path, metavar="FILE", help="the changed file")
    target.add_argument("--in_place", action="store_true", help="change the file itself")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 2 after one line for each thing that is wrong with the input; 130 after Ctrl-C."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.tool_script import run

    return run(lambda: work(given))


def work(given: argparse.Namespace) -> None:
    """Show or change a file.

    Raises:
        UserError: flags contradict each other, or the file has no metadata that could be shown.
    """
    from library.models.headers import read_header

    settings = _check(given)
    path: Path = given.file or given.model
    metadata = read_header(path).metadata
    if given.strip or given.remove or settings:
        _change(given, path, metadata, settings)
    elif given.trigger_words is not None:
        _show_words(given, path, metadata)
    elif _as_json(given):
        _print_json({key: _parsed(text) for key, text in metadata.items()} if given.parsed else metadata)
    else:
        _show_table(path, metadata)


def _check(given: argparse.Namespace) -> dict[str, str]:
    """The values that are to be set, by key.

    Raises:
        UserError: with everything that is wrong with the flags.
    """
    from library.errors import Problem, UserError
    from library.models.pickles import SUFFIXES
    from library.weights.edit_metadata import HASHES
    from library.weights.outputs import MODEL_ENDINGS, output_problems

    wrong: list[Problem] = []
    path = given.file or given.model
    if path is None:
        wrong.append(Problem("FILE", "is missing", "name the file to look at"))
    elif given.file and given.model:
        wrong.append(Problem("--model", "names a second file", "name one"))
    elif path.is_dir():
        wrong.append(Problem(str(path), "is a folder", "name a .safetensors file in it"))
    elif not path.is_file():
        wrong.append(Problem(str(path), "there is no such file"))
    elif path.suffix.lower() in SUFFIXES:
        wrong.append(Problem(str(path), "is a pickle, and pickles have no metadata", "give a .safetensors file"))
    settings: dict[str, str] = {}
    for text in given.set:
        key, equals, value = text.partition("=")
        if not key or not equals:
            wrong.append(Problem("--set", f"{text!r} is not KEY=VALUE", "such as modelspec.title=Cat"))
        elif key in HASHES:
            wrong.append(Problem("--set", f"{key} is worked out from the tensors", "leave it out"))
        elif key in settings:
            wrong.append(Problem("--set", f"{key} stands twice", "set it once"))
        settings[key] = value
    changes = bool(given.strip or given.remove or given.set)
    writes = given.save_to is not None or given.in_place
    if changes and not writes:
        wrong.append(Problem("--save_to", "is missing", "name the changed file, or use --in_place"))
    if writes and not changes:
        flag = "--in_place" if given.in_place else "--save_to"
        wrong.append(Problem(flag, "nothing is to be changed", "use it with --set, --remove or --strip"))
    if given.save_to is not None:
        wrong += output_problems(given.save_to, "--save_to", MODEL_ENDINGS)
    if given.trigger_words is not None and (changes or given.parsed):
        wrong.append(Problem("--trigger_words", "shows words only", "use it without other work"))
    if given.trigger_words is not None and given.trigger_words < 0:
        wrong.append(Problem("--trigger_words", f"{given.trigger_words} is below 0", "give a number of tags"))
    if given.parsed and given.table:
        wrong.append(Problem("--parsed", "has no meaning with --table", "use one of them"))
    if wrong:
        raise UserError(wrong)
    return settings


def _change(given: argparse.Namespace, path: Path, metadata: Mapping[str, str], settings: Mapping[str, str]) -> None:
    from library.console import say, warn
    from library.weights.edit_metadata import edited, matching, write_edited

    for pattern in given.remove:
        if not matching(metadata, pattern):
            warn(f"--remove {pattern}: {path} has no such key")
    found = edited(metadata, strip=given.strip, remove=given.remove, settings=settings)
    target = path if given.in_place else given.save_to
    write_edited(path, found, target)
    gone = len(metadata.keys() - found.keys())
    changed = sum(metadata.get(key) != text for key, text in found.items())
    say(f"{target}: {len(found)} keys ({gone} taken away, {changed} set or changed)")


def _as_json(given: argparse.Namespace) -> bool:
    return given.json or given.parsed or not (given.table or sys.stdout.isatty())


def _parsed(text: str) -> object:
    """A value as JSON where it is an object or a list, else its text."""
    try:
        return json.loads(text) if text.startswith(_PARSED) else text
    except ValueError:
        return text


def _print_json(found: object) -> None:
    sys.stdout.write(f"{json.dumps(found, indent=4, sort_keys=True)}\n")


def _show_table(path: Path, metadata: Mapping[str, str]) -> None:
    from library.console import say
    from library.weights.loras.tables import show_table

    if not metadata:
        say(f"{path} has no metadata")
        return
    rows = [(key, _shortened(text)) for key, text in sorted(metadata.items())]
    show_table(str(path), ("key", "value"), rows, words=2)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters, --json shows all)"


def _show_words(given: argparse.Namespace, path: Path, metadata: Mapping[str, str]) -> None:
    from dataclasses import asdict

    from library.console import say
    from library.weights.loras.tables import show_table
    from library.weights.loras.trigger_words import trigger_words

    words = trigger_words(metadata, given.trigger_words, str(path))
    if not words:
        say(f"{path} names no trigger words: it has neither a trigger phrase nor tags")
    if _as_json(given):
        _print_json([asdict(word) for word in words])
        return
    rows = [(one.text, one.origin, f"{one.pictures:,}" if one.pictures else "-", _percent(one.share)) for one in words]
    show_table(str(path), ("word", "from", "pictures", "share"), rows, words=2)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


if __name__ == "__main__":
    sys.exit(main())
