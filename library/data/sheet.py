"""Contact sheets: pictures in a grid with lines of text over them. For looking at, not for training. No torch."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 256
"""The longest side of a picture on a sheet, in pixels."""
_FONT_SIZE, _LINE, _GAP = 12, 16, 8
_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "LiberationSans-Regular.ttf"),
    *("Arial Unicode.ttf", "msyh.ttc", "Arial.ttf", "arial.ttf"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture of a sheet and the lines over it."""

    image: Image.Image
    lines: tuple[str, ...] = ()


def draw_sheet(rows: Sequence[Sequence[Cell | None]]) -> Image.Image:
    """RGB picture of a grid. Columns are as wide as the widest picture; in a row, all pictures begin at one height."""
    cells = [cell for row in rows for cell in row if cell is not None]
    width = max(cell.image.width for cell in cells) + _GAP
    columns = max(len(row) for row in rows)
    texts = [max((len(cell.lines) for cell in row if cell), default=0) * _LINE for row in rows]
    heights = [max((cell.image.height for cell in row if cell), default=0) + _GAP for row in rows]
    sheet = Image.new("RGB", (columns * width, sum(texts) + sum(heights)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for row, text, height in zip(rows, texts, heights, strict=True):
        for column, cell in enumerate(row):
            if cell is None:
                continue
            for number, line in enumerate(cell.lines):
                pen.text((column * width + 2, top + number * _LINE + 1), _drawable(line), fill="black", font=_font())
            sheet.paste(cell.image, (column * width, top + text))
        top += text + height
    return sheet


def write_png(image: Image.Image, path: Path) -> None:
    """Write a picture under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        image.save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels. Broken between words, or inside a word that is wider than that."""
    lines, line = [], ""
    for word in _drawable(text).split():
        longer = f"{line} {word}" if line else word
        if _width(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while _width(word) > width:
            end = next(end for end in range(len(word) - 1, 0, -1) if end == 1 or _width(word[:end]) <= width)
            lines.append(word[:end])
            word = word[end:]
        line = word
    return [*lines, line] if line else lines or [""]


def _drawable(text: str) -> str:
    """Text that the font takes: a picture font knows Latin-1 only, and lone surrogates can't be drawn."""
    known = "utf-8" if isinstance(_font(), ImageFont.FreeTypeFont) else "latin-1"
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown.encode(known, "replace").decode(known)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of the system that has most letters, else the one that comes with Pillow, which has few."""
    for name in _FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, _FONT_SIZE)
    return ImageFont.load_default(_FONT_SIZE)


def _width(text: str) -> float:
    return _font().getlength(text)
