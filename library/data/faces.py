"""Where a picture's name says that a face is: `name_cx_cy_w_h.png`, as tools/detect_faces.py and sd-scripts write it.

Nothing is looked for in pictures here (tools/detect_faces.py does), and nothing is cut (data.augment, data.pixels).
"""

import re
from dataclasses import dataclass

_NUMBERS = re.compile(r"_(\d{1,9})_(\d{1,9})_(\d{1,9})_(\d{1,9})(?:\.[^./]*)?$")


@dataclass(frozen=True, slots=True)
class Face:
    """Centre, width and height of a face, in pixels of the upright picture at its own size."""

    cx: int
    cy: int
    w: int
    h: int


def face_of(key: str) -> Face | None:
    """The face that the file name of `key` (a posix path) tells of; None without four numbers, or for an empty face."""
    found = _NUMBERS.search(key)
    if found is None:
        return None
    face = Face(*(int(number) for number in found.groups()))
    return face if face.w > 0 and face.h > 0 else None


def name_with(stem: str, face: Face) -> str:
    """The stem of a file name with the numbers of its face, four digits each, as sd-scripts writes them."""
    return f"{stem}_{face.cx:04d}_{face.cy:04d}_{face.w:04d}_{face.h:04d}"
