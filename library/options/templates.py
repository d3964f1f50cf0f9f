"""Caption templates that come with lorasmith: phrases around `{}`, one list for an object and one for a style.

They vary what a picture may show besides: viewpoint, light, surroundings, medium, quality. Which one a sample gets is
drawn in data.captions.
"""

from collections.abc import Mapping
from types import MappingProxyType

OBJECT: tuple[str, ...] = (
    "{} seen from the front",
    "{} seen from the side",
    "{} seen from behind",
    "{} looked at from above",
    "{} from a low angle",
    "{} filling the whole frame",
    "{} small in a wide view",
    "{} in the middle of the picture",
    "{} at the edge of the picture",
    "a detail of {}",
    "{} in daylight",
    "{} in warm evening light",
    "{} under a lamp at night",
    "{} with hard shadows",
    "{} in soft, even light",
    "{} against the light",
    "{} outdoors",
    "{} indoors",
    "{} on a plain background",
    "{} among other things",
    "a snapshot of {} taken with a phone",
    "a sharp studio photograph of {}",
    "a grainy film photograph of {}",
    "a black and white picture of {}",
    "a slightly blurred picture of {}",
    "an illustration showing {}",
    "a quick pencil study of {}",
)

STYLE: tuple[str, ...] = (
    "a landscape, {} style",
    "a portrait, {} style",
    "a still life, {} style",
    "a street scene, {} style",
    "an interior, {} style",
    "an animal, {} style",
    "a building, {} style",
    "a group of people, {} style",
    "a night scene, {} style",
    "a view from above, {} style",
    "a scene full of detail, {} style",
    "a simple composition, {} style",
    "a bright, sunny picture, {} style",
    "a picture with few colours, {} style",
    "a picture full of contrast, {} style",
    "a small study, {} style",
    "a large finished work, {} style",
    "a poster, {} style",
    "a book illustration, {} style",
    "an unfinished sketch, {} style",
    "something abstract, {} style",
    "a picture made with {} technique",
)

PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType({"object": OBJECT, "style": STYLE})
"""The lists by the names that `caption_preset` knows."""
