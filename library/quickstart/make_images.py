"""Draw the twelve training pictures of the new thing: `python -m library.quickstart.make_images`."""

import argparse
from pathlib import Path

from PIL import Image

from library.quickstart.pictures import TRAINING
from library.quickstart.scenes import NEW_THING

IMAGES_FOLDER = Path(__file__).parent / "images"


def make_images(folder: Path) -> list[Path]:
    """Write `10_blorp/NN.png` with its caption in `NN.txt`; the paths of the pictures."""
    inside = folder / f"10_{NEW_THING}"
    inside.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, sized in enumerate(TRAINING, 1):
        path = inside / f"{number:02}.png"
        Image.fromarray(sized.draw()).save(path, optimize=True)
        path.with_suffix(".txt").write_text(sized.caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def main(argv: list[str] | None = None) -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES_FOLDER)
    for path in make_images(parser.parse_args(argv).out):
        print(path)


if __name__ == "__main__":
    main()
