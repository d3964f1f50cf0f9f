"""Draw the training pictures of the new thing and of the new look: `python -m library.quickstart.make_images`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from library.quickstart.pictures import LOOK_TRAINING, TRAINING, Sized
from library.quickstart.scenes import NEW_LOOK, NEW_THING

IMAGES_FOLDER = Path(__file__).parent / "images"
EMBEDDING_IMAGES_FOLDER = Path(__file__).parent / "embedding_images"


def make_images(folder: Path, name: str = NEW_THING, pictures: Sequence[Sized] = TRAINING) -> list[Path]:
    """Write `10_<name>/NN.png` with its caption in `NN.txt`; the paths of the pictures."""
    inside = folder / f"10_{name}"
    inside.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, sized in enumerate(pictures, 1):
        path = inside / f"{number:02}.png"
        Image.fromarray(sized.draw()).save(path, optimize=True)
        path.with_suffix(".txt").write_text(sized.caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def make_embedding_images(folder: Path) -> list[Path]:
    """`make_images` of the new look."""
    return make_images(folder, NEW_LOOK, LOOK_TRAINING)


def main(argv: list[str] | None = None) -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES_FOLDER, help="where those of the new thing go")
    parser.add_argument("--embedding_out", type=Path, default=EMBEDDING_IMAGES_FOLDER, help="and those of the new look")
    arguments = parser.parse_args(argv)
    for path in (*make_images(arguments.out), *make_embedding_images(arguments.embedding_out)):
        print(path)


if __name__ == "__main__":
    main()
