"""Print the command that stands in README.md after `<!-- command: NAME -->`, so that scripts and README can't drift.

Needs the standard library only: it runs before anything is installed.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def readme_command(name: str, text: str | None = None) -> str:
    """The fenced command behind the comment that names it.

    Raises:
        LookupError: README.md holds no such command, or more than one.
    """
    text = README.read_text(encoding="utf-8") if text is None else text
    found = re.findall(rf"<!-- command: {re.escape(name)} -->\s*```\w*\n(.*?)\n```", text, flags=re.DOTALL)
    if len(found) != 1:
        raise LookupError(f"README.md holds {len(found)} commands named {name!r}")
    return str(found[0]).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Print one command. Returns the exit code: 0, or 2 where README.md holds no such command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", help="what stands in the comment, such as 'main job'")
    name = parser.parse_args(argv).name
    try:
        print(readme_command(name))
    except LookupError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
