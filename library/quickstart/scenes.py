"""The little world that the embedded base model knows, and two new things in it that the model has never seen.

A scene is one flat shape on a flat background. The blorp is a new shape, a creature of four coloured parts; "florp" is
a new look of the old shapes: turquoise, with stripes. `draw` and `caption` turn a scene into a picture and its words.
Judging pictures is judge's job.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from library.rng import rng

Shape = Literal["circle", "square", "triangle", "star", "cross", "heart", "blorp"]
Place = Literal["left", "right", "top", "bottom", "middle"]
Size = Literal["small", "medium", "large"]
Picture = NDArray[np.uint8]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 220, 45),
    "green": (40, 160, 70),
    "blue": (45, 90, 215),
    "purple": (130, 45, 165),
    "pink": (250, 150, 195),
    "white": (245, 245, 245),
    "black": (22, 22, 26),
}
NEW_THING: Shape = "blorp"
NEW_LOOK = "florp"
STRIPES: tuple[tuple[int, int, int], tuple[int, int, int]] = ((20, 165, 160), (120, 225, 210))
STRIPE = 0.4
SHAPES: tuple[Shape, ...] = tuple(shape for shape in get_args(Shape) if shape != NEW_THING)
PLACES: tuple[Place, ...] = get_args(Place)
SIZES: tuple[Size, ...] = get_args(Size)
EXTENT: dict[Size, float] = {"small": 0.36, "medium": 0.50, "large": 0.66}
BUCKETS: tuple[tuple[int, int], ...] = ((128, 128), (160, 96), (96, 160), (144, 112), (112, 144))

_PLACE_WORDS: dict[Place, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
_PLACE_AT: dict[Place, tuple[float, float]] = {
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "middle": (0.5, 0.5),
}
JITTER = 0.1
_SUPERSAMPLING = 4
_MARGIN = 3


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `colour` is empty for the blorp, whose parts have their own, and may be the new look;
    `variant` picks the jitter."""

    shape: Shape
    colour: str
    background: str
    place: Place = "middle"
    size: Size = "medium"
    variant: int = 0


@dataclass(frozen=True)
class Part:
    """One filled polygon in the unit box (x right, y down, both -1 ... 1); `inside` another, if it is cut to that."""

    points: NDArray[np.float64]
    colour: tuple[int, int, int]
    inside: NDArray[np.float64] | None = None


def _disc(x: float, y: float, radius: float) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> NDArray[np.float64]:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _heart() -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(angle) ** 3
    y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle))
    return np.stack([x / 16, (y - (y.max() + y.min()) / 2) / 15.5], axis=1)


@lru_cache(maxsize=1)
def outlines() -> dict[Shape, NDArray[np.float64]]:
    """The base shapes' outlines in the unit box."""
    spikes = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    arm = 0.34
    cross = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    cross += [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
    return {
        "circle": _disc(0, 0, 0.95),
        "square": _box(-0.85, -0.85, 0.85, 0.85),
        "triangle": np.array([(0, -0.95), (1, 0.85), (-1, 0.85)]),
        "star": np.stack([np.sin(spikes) * radius * 1.05, -np.cos(spikes) * radius * 1.05 + 0.1], axis=1),
        "cross": np.array(cross),
        "heart": _heart(),
    }


@lru_cache(maxsize=1)
def blorp_parts() -> tuple[Part, ...]:
    """The blorp, back to front: red feet, a purple body with one white eye, a yellow pointed hat."""
    return (
        Part(_box(-0.62, 0.45, -0.14, 1.0), COLOURS["red"]),
        Part(_box(0.14, 0.45, 0.62, 1.0), COLOURS["red"]),
        Part(_disc(0, 0.14, 0.68), COLOURS["purple"]),
        Part(_disc(0, 0.26, 0.28), COLOURS["white"]),
        Part(np.array([(0, -1.0), (0.80, -0.16), (-0.80, -0.16)]), COLOURS["yellow"]),
    )


def striped(points: NDArray[np.float64]) -> tuple[Part, ...]:
    """An outline in the new look: all of it dark turquoise, every other stripe of it light."""
    dark, light = STRIPES
    tops = np.arange(-1.2 + STRIPE, 1.2, 2 * STRIPE)
    bands = [_box(-1.2, top, 1.2, top + STRIPE) for top in tops]
    return (Part(points, dark), *(Part(band, light, inside=points) for band in bands))


def parts_of(scene: Scene) -> tuple[Part, ...]:
    """What stands on the background, back to front."""
    if scene.shape == NEW_THING:
        return blorp_parts()
    points = outlines()[scene.shape]
    return striped(points) if scene.colour == NEW_LOOK else (Part(points, COLOURS[scene.colour]),)


def fill(canvas: Picture, points: NDArray[np.float64], colour: tuple[int, int, int]) -> None:
    """Fill a polygon given in pixels of the canvas."""
    cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], colour, lineType=cv2.LINE_8, shift=4)


def shrink(canvas: Picture, width: int, height: int) -> Picture:
    """Average a supersampled canvas down to the picture."""
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)


def blank(width: int, height: int, colour: tuple[int, int, int]) -> Picture:
    """A supersampled canvas of one colour."""
    canvas = np.empty((height * _SUPERSAMPLING, width * _SUPERSAMPLING, 3), np.uint8)
    canvas[:] = colour
    return canvas


def draw(scene: Scene, width: int, height: int, jitter: float = JITTER) -> Picture:
    """The scene as uint8 RGB, antialiased. The variant tints it a little, and moves and scales it by `jitter`."""
    names = (scene.shape, scene.colour, scene.background, scene.place, scene.size)
    generator = rng(scene.variant, "augment", *names, width, height)
    scale, shift_x, shift_y = jitter * generator.uniform(-1, 1, 3)

    def tint(colour: tuple[int, int, int]) -> tuple[int, int, int]:
        red, green, blue = np.clip(np.array(colour) + generator.integers(-4, 5, 3), 0, 255).tolist()
        return red, green, blue

    half = EXTENT[scene.size] * (1 + 0.05 * scale) * min(width, height) / 2
    at_x, at_y = _PLACE_AT[scene.place]
    at_x = np.clip(at_x + 0.12 * shift_x, 0, 1)
    at_y = np.clip(at_y + 0.12 * shift_y, 0, 1)
    edge = half + _MARGIN
    centre = np.array([edge + at_x * (width - 2 * edge), edge + at_y * (height - 2 * edge)])
    canvas = blank(width, height, tint(COLOURS[scene.background]))
    for part in parts_of(scene):
        painted = canvas.copy()
        fill(painted, (centre + part.points * half) * _SUPERSAMPLING, tint(part.colour))
        if part.inside is not None:
            within = np.zeros_like(canvas)
            fill(within, (centre + part.inside * half) * _SUPERSAMPLING, (1, 1, 1))
            painted = np.where(within > 0, painted, canvas)
        canvas = painted
    return shrink(canvas, width, height)


def draw_clutter(generator: np.random.Generator, width: int, height: int) -> Picture:
    """One to five turned shapes of any colour over each other: what the VAE learns from, beside the scenes."""
    palette = list(COLOURS.values())

    def any_colour() -> tuple[int, int, int]:
        if generator.random() < 0.5:
            return palette[int(generator.integers(len(palette)))]
        red, green, blue = generator.integers(0, 256, 3).tolist()
        return red, green, blue

    canvas = blank(width, height, any_colour())
    for _ in range(int(generator.integers(1, 6))):
        points = outlines()[SHAPES[int(generator.integers(len(SHAPES)))]]
        angle = generator.uniform(0, 2 * np.pi) if generator.random() < 0.5 else 0.0
        turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
        half = generator.uniform(0.08, 0.4) * min(width, height)
        stretch = generator.uniform(0.7, 1.3, 2)
        centre = generator.uniform(0.1, 0.9, 2) * (width, height)
        fill(canvas, ((points * stretch) @ turn * half + centre) * _SUPERSAMPLING, any_colour())
    return shrink(canvas, width, height)


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def caption(scene: Scene, *, say_size: bool = True, say_place: bool = True) -> str:
    """The scene in words, e.g. "a small red circle on a blue background, on the left". Medium goes without saying."""
    size = scene.size if say_size and scene.size != "medium" else ""
    thing = " ".join(word for word in (size, scene.colour, scene.shape) if word)
    place = f", {_PLACE_WORDS[scene.place]}" if say_place else ""
    return f"{_article(thing)} on {_article(scene.background)} background{place}"


def random_scene(generator: np.random.Generator) -> Scene:
    """A scene of the old world, with a background that is not the shape's colour."""
    colour, background = generator.choice(list(COLOURS), 2, replace=False)
    return Scene(
        shape=SHAPES[int(generator.integers(len(SHAPES)))],
        colour=str(colour),
        background=str(background),
        place=PLACES[int(generator.integers(len(PLACES)))],
        size=SIZES[int(generator.integers(len(SIZES)))],
        variant=int(generator.integers(2**31)),
    )
