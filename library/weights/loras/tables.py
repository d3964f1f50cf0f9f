"""What tools print about LoRA files: the block that a module stands in, and tables on stdout. Imports no torch."""

import re
import sys
from collections.abc import Iterable, Sequence

_PARTS = {"lora_te_": "text encoder", "lora_te1_": "text encoder 1", "lora_te2_": "text encoder 2"}
_LEVEL = re.compile(r"_(down_blocks|up_blocks|input_blocks|output_blocks)_(\d+)_")
_MIDDLE = re.compile(r"_(mid_block|middle_block)_")
_ORDER = ("text", "input", "down", "middle", "mid", "output", "up")
_WIDTH = 120


def block_of(name: str) -> str:
    """The block of a module, as tables call it: `text encoder 1`, `down 0`, `mid`, `output 3`, ..., else `other`."""
    part = next((title for prefix, title in _PARTS.items() if name.startswith(prefix)), None)
    if part is not None:
        return part
    if found := _LEVEL.search(f"{name}_"):
        return f"{found[1].removesuffix('_blocks')} {found[2]}"
    middle = _MIDDLE.search(f"{name}_")
    return middle[1].removesuffix("_block") if middle else "other"


def block_order(block: str) -> tuple[int, int, str]:
    """Sorts blocks as data flows: text encoders, down, middle, up; what is none of these at the end."""
    word, _, number = block.partition(" ")
    place = _ORDER.index(word) if word in _ORDER else len(_ORDER)
    return place, int(number) if number.isdecimal() else 0, block


def show_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1, last: Sequence[str] = ()
) -> None:
    """Print a table to stdout; its rows are never cut where that is no terminal.

    Args:
        words: how many of the first columns hold words; the others hold numbers.
        last: a row below a line, such as of totals.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    if last:
        table.add_section()
        table.add_row(*map(escape, last))
    width = None if sys.stdout.isatty() else max(_WIDTH, Console(width=10_000).measure(table).maximum)
    Console(file=sys.stdout, highlight=False, width=width).print(table)
