"""Teach the text encoders of a base model new words (embeddings) from a folder of pictures: textual inversion.

`python train_textual_inversion.py --help` lists the options.
"""

import argparse
import sys
from collections.abc import Sequence

from library.options import setup_parser as parser_of
from library.options.scripts import TRAIN_TEXTUAL_INVERSION
from library.training.script import run

__all__ = ["main", "setup_parser"]


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script's flags, for programs that want to know them."""
    return parser_of(TRAIN_TEXTUAL_INVERSION)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given arguments; returns the exit code: 0, 1 (the training failed), 2 (bad input), 130 or 143."""
    return run(TRAIN_TEXTUAL_INVERSION, argv)


if __name__ == "__main__":
    sys.exit(main())
