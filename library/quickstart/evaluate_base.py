"""Does the base model obey? `python -m library.quickstart.evaluate_base` prints the table.

docs/quickstart.md keeps it: 200 prompts, fixed seeds, ordinary starting noise; judged by OpenCV alone.
"""

import argparse
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from library.quickstart.architecture import MODEL_FOLDER, Parts, load_folder
from library.quickstart.judge import agreement, judge
from library.quickstart.sampling import sample
from library.quickstart.scenes import Picture, Scene, caption, random_scene
from library.rng import rng

SEED = 7
PROMPTS = 200
NAMED = ("colour", "background", "shape", "place", "size")


def evaluation_scenes(count: int = PROMPTS) -> list[Scene]:
    """The scenes whose captions are the prompts."""
    return [random_scene(rng(SEED, "validation", "prompt", n)) for n in range(count)]


def evaluate(parts: Parts, scenes: list[Scene]) -> tuple[Counter[str], list[Picture]]:
    """How many pictures show each named thing; "all three" is colour, background and shape in one picture."""
    pictures = sample(parts, [caption(scene) for scene in scenes], [1000 + n for n in range(len(scenes))])
    right: Counter[str] = Counter()
    for scene, picture in zip(scenes, pictures, strict=True):
        found = agreement(scene, judge(picture))
        right.update(name for name in NAMED if found[name])
        right["all three"] += found["colour"] and found["background"] and found["shape"]
    return right, pictures


def table(right: Counter[str], count: int) -> str:
    """A Markdown table."""
    rows = [f"| {name} | {right[name]} of {count} | {right[name] / count:.1%} |" for name in (*NAMED, "all three")]
    return "\n".join(["| named in the prompt | came out | share |", "| --- | --- | --- |", *rows])


def grid(pictures: list[Picture], columns: int) -> Picture:
    """Pictures of one size side by side with a thin white gap."""
    framed = [cv2.copyMakeBorder(p, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for p in pictures]
    framed += [np.full_like(framed[0], 255)] * (-len(framed) % columns)
    rows = [np.hstack(framed[start : start + columns]) for start in range(0, len(framed), columns)]
    return np.vstack(rows).astype(np.uint8)


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --grid also show the first pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--grid", type=Path, help="where a picture of the first 40 samples goes")
    arguments = parser.parse_args(argv)
    right, pictures = evaluate(load_folder(arguments.model), evaluation_scenes(arguments.prompts))
    print(table(right, arguments.prompts))
    if arguments.grid:
        cv2.imwrite(str(arguments.grid), cv2.cvtColor(grid(pictures[:40], 10), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
