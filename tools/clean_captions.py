"""Tidy the tags and captions of a metadata file, as taggers and captioners wrote them.

    python tools/clean_captions.py metadata.json clean.json

Of tags: spaces for underscores, ratings go, a tag that stands in a longer one goes (`shirt` beside `white shirt`), and
where there are several girls or boys, hair, eyes, sleeves and hairstyles of which there are several go. Of captions:
words of captioners become those of taggers, so that a woman, a lady or a person is a girl.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("files", type=Path, nargs="+", metavar="IN OUT", help="metadata files, .json or .jsonl")
    found.add_argument("--only_tags", action="store_true", help="leave captions as they are")
    found.add_argument("--only_captions", action="store_true", help="leave tags as they are")
    found.add_argument("--debug", action="store_true", help="show every text that changes, before and after")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line for each thing that is wrong."""
    given = parser().parse_args(argv)
    from library.tool_script import run

    return run(lambda: clean(given))


def clean(given: argparse.Namespace) -> None:
    """Write the clean file.

    Raises:
        UserError: not two files, or one that can't be read or written.
    """
    from library.console import say, warn
    from library.data.captioning.cleaning import clean_caption, clean_tags
    from library.data.captioning.metadata_files import problem_with_output, read_table, write_table
    from library.errors import UserError

    if len(given.files) == 3:
        warn(f"{given.files[0]} is left aside: the pictures' folder is not needed")
    elif len(given.files) != 2:
        raise UserError.single("IN OUT", f"{len(given.files)} files are named", "name the old one and the new one")
    source, target = given.files[-2:]
    if problem := problem_with_output(target, "OUT"):
        raise UserError([problem])
    rules: dict[str, Callable[[str], str]] = {"tags": clean_tags, "caption": clean_caption}
    for flag, left_out in (("only_tags", "caption"), ("only_captions", "tags")):
        if getattr(given, flag):
            rules.pop(left_out, None)
    if not rules:
        raise UserError.single("--only_tags", "together with --only_captions leaves nothing to do", "leave one out")
    table = read_table(source)
    _check_texts(source, table, rules)
    changed = lacking = 0
    for name, entry in table.items():
        present = [field for field in rules if entry.get(field) is not None]
        lacking += len(present) < len(rules)
        for field in present:
            text = rules[field](entry[field])
            if text != entry[field]:
                changed += 1
                if given.debug:
                    say(f"{name} {field}\n  from: {entry[field]}\n  to:   {text}")
            entry[field] = text
    write_table(target, table)
    if lacking:
        warn(f"{lacking} of {len(table)} entries have no {' or no '.join(rules)}")
    say(f"{changed} texts of {len(table)} entries changed: {target}")


def _check_texts(source: Path, table: Mapping[str, Mapping[str, object]], fields: Iterable[str]) -> None:
    from library.errors import Problem, UserError

    fields = tuple(fields)
    problems = [
        Problem(str(source), f"{field} of {name} is no text", "write tags as one text with commas between them")
        for name, entry in table.items()
        for field in fields
        if not isinstance(entry.get(field), str | None)
    ]
    if problems:
        raise UserError(problems[:10])


if __name__ == "__main__":
    sys.exit(main())
