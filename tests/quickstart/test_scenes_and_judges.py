"""The little world is the same every time, and the judges see what was drawn, and nothing else."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.quickstart.judge import agreement, judge
from library.quickstart.judge_blorp import blorp_score, judge_blorp
from library.quickstart.make_images import (
    EMBEDDING_IMAGES_FOLDER,
    IMAGES_FOLDER,
    make_embedding_images,
    make_images,
)
from library.quickstart.pictures import HELD_OUT, TRAINING, Sized, old_pictures, prompts
from library.quickstart.scenes import BUCKETS, SHAPES, Scene, caption, draw, random_scene
from library.rng import rng


def test_a_scene_is_drawn_the_same_every_time() -> None:
    scene = random_scene(rng(3, "order"))
    assert scene == random_scene(rng(3, "order"))
    assert np.array_equal(draw(scene, 128, 128), draw(scene, 128, 128))
    moved = dataclasses.replace(scene, variant=scene.variant + 1)
    assert not np.array_equal(draw(scene, 128, 128), draw(moved, 128, 128))


def test_captions_say_what_is_there() -> None:
    scene = Scene("star", "orange", "blue", "left", "small")
    assert caption(scene) == "a small orange star on a blue background, on the left"
    assert caption(scene, say_size=False, say_place=False) == "an orange star on a blue background"
    assert caption(Scene("blorp", "", "green")) == "a blorp on a green background, in the middle"


def test_the_judge_reads_drawn_scenes() -> None:
    right = dict.fromkeys(("colour", "background", "shape", "place", "size"), 0)
    for number in range(100):
        scene = random_scene(rng(9, "order", number))
        width, height = BUCKETS[number % len(BUCKETS)]
        for name, agrees in agreement(scene, judge(draw(scene, width, height))).items():
            right[name] += agrees
    assert set(right.values()) == {100}, right


def test_the_judge_says_no_to_what_was_not_drawn() -> None:
    for shape in SHAPES:
        wanted = Scene(shape, "red", "blue", "left", "large")
        other = SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]
        wrong = Scene(other, "green", "white", "right", "small")
        assert not any(agreement(wanted, judge(draw(wrong, 128, 128))).values())


def test_an_empty_picture_shows_nothing() -> None:
    empty = np.full((128, 128, 3), (45, 90, 215), np.uint8)
    verdict = judge(empty)
    assert verdict.background == "blue"
    assert (verdict.colour, verdict.shape, verdict.place, verdict.size) == (None, None, None, None)
    assert blorp_score(empty) == 0


@pytest.mark.parametrize("pictures", [TRAINING, HELD_OUT, prompts()], ids=["training", "held out", "prompts"])
def test_every_drawn_blorp_is_seen_whole(pictures: tuple[Sized, ...]) -> None:
    assert [blorp_score(sized.draw()) for sized in pictures] == [1.0] * len(pictures)


def test_nothing_of_the_old_world_looks_like_a_blorp() -> None:
    assert [blorp_score(sized.draw()) for sized in old_pictures()] == [0.0] * 20


def test_a_blorp_upside_down_is_none() -> None:
    turned = np.ascontiguousarray(draw(Scene("blorp", "", "blue", size="large"), 128, 128)[::-1])
    verdict = judge_blorp(turned)
    assert verdict.body
    assert not verdict.hat
    assert not verdict.feet


def test_held_out_pictures_share_neither_background_nor_place_nor_size_with_training() -> None:
    for name in ("background", "place", "size"):
        seen = {getattr(sized.scene, name) for sized in TRAINING}
        assert seen.isdisjoint(getattr(sized.scene, name) for sized in HELD_OUT)


@pytest.mark.parametrize(
    ("make", "folder"), [(make_images, IMAGES_FOLDER), (make_embedding_images, EMBEDDING_IMAGES_FOLDER)]
)
def test_stored_pictures_are_the_drawn_ones(make: Callable[[Path], list[Path]], folder: Path, tmp_path: Path) -> None:
    for fresh in make(tmp_path):
        stored = folder / fresh.relative_to(tmp_path)
        assert np.array_equal(np.asarray(Image.open(stored)), np.asarray(Image.open(fresh)))
        assert stored.with_suffix(".txt").read_text() == fresh.with_suffix(".txt").read_text()
