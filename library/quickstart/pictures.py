"""The pictures that the quickstart trains on, and those that measure it: which scenes, which sizes.

The twelve of `TRAINING` are stored under `images/`, the twelve of `LOOK_TRAINING` under `embedding_images/`; the others
are drawn when they are needed.
"""

from dataclasses import dataclass, replace

from library.quickstart.scenes import (
    NEW_LOOK,
    NEW_THING,
    PLACES,
    Picture,
    Place,
    Scene,
    Shape,
    Size,
    caption,
    draw,
    random_scene,
)
from library.rng import rng

SEED = 11
OLD_PICTURES = 20
PROMPTS = 20
SEEN_BACKGROUNDS = ("blue", "green", "white", "pink")
UNSEEN_BACKGROUNDS = ("black", "orange")


@dataclass(frozen=True)
class Sized:
    """A scene at a size in pixels."""

    scene: Scene
    width: int = 128
    height: int = 128

    @property
    def caption(self) -> str:
        """The scene in words."""
        return caption(self.scene)

    def draw(self) -> Picture:
        """The scene as uint8 RGB."""
        return draw(self.scene, self.width, self.height)

    def in_new_look(self, shape: Shape) -> "Sized":
        """The same place, size and background with an old shape in the new look."""
        return replace(self, scene=replace(self.scene, shape=shape, colour=NEW_LOOK))

    def captioned(self, look: str) -> str:
        """The scene in words, with another word for the new look."""
        return caption(replace(self.scene, colour=look))


def _blorp(background: str, place: Place, size: Size, width: int = 128, height: int = 128, variant: int = 0) -> Sized:
    return Sized(Scene(NEW_THING, "", background, place, size, variant), width, height)


TRAINING: tuple[Sized, ...] = (
    _blorp("blue", "left", "large"),
    _blorp("green", "right", "medium"),
    _blorp("white", "middle", "large"),
    _blorp("pink", "middle", "medium"),
    _blorp("blue", "right", "large", 160, 96),
    _blorp("white", "left", "large", 160, 96),
    _blorp("green", "middle", "large", 96, 160),
    _blorp("pink", "middle", "large", 96, 160),
    _blorp("green", "left", "large", 144, 112),
    _blorp("pink", "right", "medium", 144, 112),
    _blorp("blue", "middle", "medium", 112, 144),
    _blorp("white", "right", "large", 112, 144),
)

HELD_OUT: tuple[Sized, ...] = (
    _blorp("black", "top", "small"),
    _blorp("orange", "top", "small"),
    _blorp("black", "bottom", "small"),
    _blorp("orange", "bottom", "small"),
    _blorp("black", "top", "small", 112, 144),
    _blorp("orange", "bottom", "small", 112, 144),
)

LOOK_TRAINING: tuple[Sized, ...] = tuple(sized.in_new_look("heart") for sized in TRAINING)
LOOK_HELD_OUT: tuple[Sized, ...] = tuple(sized.in_new_look("heart") for sized in HELD_OUT)
_OTHER_SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "star", "cross", "square")
LOOK_OTHER_SHAPES: tuple[Sized, ...] = tuple(
    sized.in_new_look(shape) for sized, shape in zip(HELD_OUT, _OTHER_SHAPES, strict=True)
)


def old_pictures() -> tuple[Sized, ...]:
    """Twenty scenes of the old world: what a LoRA must not forget."""
    return tuple(Sized(random_scene(rng(SEED, "validation", "old", n))) for n in range(OLD_PICTURES))


def old_pictures_in(colour: str) -> tuple[Sized, ...]:
    """Those of them that have no such background, with their shapes in one colour."""
    kept = [sized for sized in old_pictures() if sized.scene.background != colour]
    return tuple(replace(sized, scene=replace(sized.scene, colour=colour)) for sized in kept)


def prompts() -> tuple[Sized, ...]:
    """Twenty scenes of the new thing to ask for, on backgrounds and at places that training showed and did not show."""
    backgrounds = (*SEEN_BACKGROUNDS, *UNSEEN_BACKGROUNDS)
    sizes: tuple[Size, ...] = ("medium", "large")
    return tuple(_blorp(backgrounds[n % 6], PLACES[n % 5], sizes[n // 2 % 2], variant=n) for n in range(PROMPTS))


def look_prompts() -> tuple[Sized, ...]:
    """Twenty hearts in the new look to ask for, on the same backgrounds and at the same places."""
    return tuple(sized.in_new_look("heart") for sized in prompts())
