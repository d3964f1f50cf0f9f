"""Put the tags that lie beside pictures into one metadata file, which `--in_json` of the trainer reads.

    python tools/merge_tags_to_metadata.py pictures metadata.json

What stands in the file already stays: other pictures, and other fields of the same ones.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.captioning.flags import add_merging


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_merging(found, "tags", ".txt")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line for each thing that is wrong."""
    given = parser().parse_args(argv)
    from library.tool_script import run

    return run(lambda: work(given))


def work(given: argparse.Namespace) -> None:
    """Write the metadata file. Imports here, so that Ctrl-C while they last is told in a line, too.

    Raises:
        UserError: a flag is wrong, or captions or files can't be used.
    """
    from library.data.captioning.merging import asked, merge

    merge(asked(given, "tags"))


if __name__ == "__main__":
    sys.exit(main())
