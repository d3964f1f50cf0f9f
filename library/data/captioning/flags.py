"""The flags that taggers and captioners have in common, and the tools that merge. Imports nothing but argparse."""

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


def add_merging(parser: argparse.ArgumentParser, field: str, extension: str) -> None:
    """The flags of the tools that merge: `field` is what sidecar files with `extension` hold."""
    parser.add_argument("train_data_dir", type=Path, metavar="FOLDER", help="pictures with such files beside them")
    parser.add_argument("out_json", type=Path, metavar="OUT", help="metadata file, .json or .jsonl")
    parser.add_argument("--in_json", type=Path, metavar="FILE", help="metadata to amend (default: OUT if it is there)")
    ending = f"of the {field} files, also as --caption_extention (default: {extension})"
    names = ("--caption_extension", "--caption_extention")
    parser.add_argument(*names, dest="caption_extension", default=extension, metavar=".EXT", help=ending)
    parser.add_argument("--full_path", action="store_true", help="entries are named by paths, not by names alone")
    parser.add_argument("--recursive", action="store_true", help="folders inside FOLDER too; needs --full_path")
    parser.add_argument("--debug", action="store_true", help="show every entry")
