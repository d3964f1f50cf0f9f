"""Twelve real photographs (scikit-image's, public domain or CC0) of varied size and shape, as a captioned folder."""

from pathlib import Path

PHOTOS = {
    "astronaut.png": "photo of an astronaut, a woman in an orange suit, flag",
    "chelsea.png": "photo of a cat, close-up, looking at the camera",
    "coffee.png": "photo of a cup of coffee, spoon, wooden table",
    "rocket.jpg": "photo of a rocket on a launch pad, night, lights",
    "hubble_deep_field.jpg": "photo of galaxies, deep space, stars",
    "motorcycle_left.png": "photo of a motorcycle in a garage, from the left",
    "motorcycle_right.png": "photo of a motorcycle in a garage, from the right",
    "retina.jpg": "photo of a retina, blood vessels, medical",
    "ihc.png": "photo of a tissue under a microscope, brown and blue",
    "camera.png": "black and white photo of a man with a camera on a tripod",
    "coins.png": "black and white photo of old coins in rows",
    "clock_motion.png": "black and white photo of a clock, motion blur",
}


def write_photos(parent: Path, repeats: int = 10) -> Path:
    """`parent/<repeats>_photo` with the twelve pictures as they are in the wheel, and their captions."""
    import skimage

    source = Path(skimage.__file__).parent / "data"
    folder = parent / f"{repeats}_photo"
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in PHOTOS.items():
        (folder / name).write_bytes((source / name).read_bytes())
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return parent
