"""Train a LoRA, or another network, on a folder of pictures; with `--token_string`, new words for it, too.

`python train_network.py --help` lists the options.
"""

import argparse
import sys
from collections.abc import Sequence

from library.options import setup_parser as parser_of
from library.options.scripts import TRAIN_NETWORK
from library.training.script import run

__all__ = ["main", "setup_parser"]


def setup_parser() -> argparse.ArgumentParser:
    """The parser of this script's flags, for programs that want to know them."""
    return parser_of(TRAIN_NETWORK)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given arguments; returns the exit code: 0, 1 (the training failed), 2 (bad input), 130 or 143."""
    return run(TRAIN_NETWORK, argv)


if __name__ == "__main__":
    sys.exit(main())
