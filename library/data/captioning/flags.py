"""The flags that taggers and captioners have in common. Imports nothing but argparse."""

import argparse
from pathlib import Path


def add_reading(group: argparse._ArgumentGroup) -> None:
    """How many pictures go into the model at once, and how many threads read them."""
    group.add_argument("--batch_size", type=int, default=1, metavar="N", help="pictures at once (default: 1)")
    group.add_argument(
        "--max_data_loader_n_workers", type=int, metavar="N", help="threads that read pictures (default: one a core)"
    )


def add_outputs(found: argparse.ArgumentParser, what: str, extension: str) -> argparse._ArgumentGroup:
    """Where the texts go; `what` is what they are, `extension` that of files beside the pictures."""
    group = found.add_argument_group("output")
    group.add_argument("--output_path", type=Path, metavar="FILE", help=f".json or .jsonl for all {what}")
    group.add_argument(
        "--relative_paths", action="store_true", help="with --output_path: name pictures within the folder"
    )
    ending = f"of the files beside the pictures (default: {extension})"
    group.add_argument("--caption_extension", "--caption_extention", default=extension, metavar="EXT", help=ending)
    group.add_argument("--recursive", action="store_true", help="pictures of inner folders too")
    group.add_argument("--overwrite", action="store_true", help=f"replace the {what} that are there")
    group.add_argument("--debug", action="store_true", help=f"say each picture's {what}")
    return group
