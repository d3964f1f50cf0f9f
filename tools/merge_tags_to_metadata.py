"""Put the tags that lie beside pictures into one metadata file, which `--in_json` of the trainer reads.

    python tools/merge_tags_to_metadata.py pictures metadata.json

What stands in the file already stays: other pictures, and other fields of the same ones.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.captioning.merging import add_flags, asked, merge
from library.tool_script import run


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(found, "tags", ".txt")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line for each thing that is wrong."""
    given = parser().parse_args(argv)
    return run(lambda: merge(asked(given, "tags")))


if __name__ == "__main__":
    sys.exit(main())
