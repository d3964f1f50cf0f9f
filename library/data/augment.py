"""Flip and crop of one sample, drawn from its coordinates: the same whether latents are cached or not."""

from dataclasses import dataclass

from library.data.buckets import Fit
from library.options.specs import SubsetSpec
from library.rng import rng


@dataclass(frozen=True, slots=True)
class Augmentation:
    """`crop` is the (left, top) of the cut from the resized picture, in pixels."""

    flip: bool
    crop: tuple[int, int]


def draw(subset: SubsetSpec, fit: Fit, *, seed: int, epoch: int, key: str, repeat: int) -> Augmentation:
    """The augmentation of one showing of the picture `key`. All draws are made whatever the subset asks for."""
    draws = rng(seed, "augment", epoch, key, repeat)
    flip = bool(draws.random() < 0.5)
    excess = [resized - side for resized, side in zip(fit.resized, fit.bucket, strict=True)]
    left, top = (int(draws.integers(room + 1)) for room in excess)
    return Augmentation(flip and subset.flip_aug, (left, top) if subset.random_crop else fit.crop)
