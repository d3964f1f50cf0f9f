"""Several pictures of each prompt: which files there are, which pictures are in them, and how the sheet shows them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.conditioning import Conditioning
from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model
from library.training.painter import ModelPainter
from library.training.previews import Painter, PreviewWriter
from library.training.prompts import Prompt

PROMPTS = [
    Prompt("a cat", seed=7, sample_steps=2, width=64, height=64),
    Prompt("a dog", negative_prompt="bad", sample_steps=2, width=64, height=64, sample_sampler="euler_a"),
]


@pytest.fixture(scope="module")
def model(tiny_sd1: Path) -> Model:
    return load(inspect(str(tiny_sd1)))


def writer(painter: Painter, folder: Path, count: int, stop: Callable[[], bool] = lambda: False) -> PreviewWriter:
    return PreviewWriter(painter, PROMPTS, folder, "x", "ddim", 3, 0.0, stop, count)


def pictures(folder: Path) -> dict[tuple[int, int], np.ndarray]:
    """By number of the prompt and seed."""
    found = {}
    for path in folder.glob("x_0*.png"):
        _, _, index, _, seed = path.stem.split("_")
        found[int(index), int(seed)] = np.asarray(Image.open(path))
    return found


def test_seeds_count_up_and_a_seed_is_the_same_picture(model: Model, tmp_path: Path) -> None:
    encoded: list[Sequence[str]] = []

    def encode(captions: Sequence[str]) -> Conditioning:
        encoded.append(captions)
        return model.encode_prompts(captions)

    writer(ModelPainter(model, encode), tmp_path / "one", 1).draw(5, None)
    encoded.clear()
    writer(ModelPainter(model, encode, offload=True), tmp_path / "three", 3).draw(5, None)
    one, three = pictures(tmp_path / "one"), pictures(tmp_path / "three")
    drawn = next(seed for index, seed in one if index == 1)
    assert sorted(one) == [(0, 7), (1, drawn)]
    assert sorted(three) == [(0, 7), (0, 8), (0, 9), (1, drawn), (1, drawn + 1), (1, drawn + 2)]
    assert all(np.array_equal(one[key], three[key]) for key in one)
    assert len({picture.tobytes() for picture in three.values()}) == 6
    assert encoded == [["a cat", ""], ["a dog", "bad"]]
    narrow, wide = (Image.open(tmp_path / name / "x_sheet.png").size for name in ("one", "three"))
    assert wide[1] == narrow[1] and 2.5 < wide[0] / narrow[0] < 3.5


class Grey:
    """Grey pictures."""

    default_size = 64

    def paint(self, prompt: Prompt, seeds: Sequence[int]) -> "Iterator[Image.Image]":
        for seed in seeds:
            yield Image.new("RGB", (8, 8), (seed % 200,) * 3)


def test_the_sheet_has_a_row_for_each_step_and_the_newest_of_each_seed(tmp_path: Path) -> None:
    two = writer(Grey(), tmp_path, 2)
    two.draw(1, None)
    (old,) = tmp_path.glob("x_000001_00_*_8.png")
    old.rename(tmp_path / "x_000001_00_20200101000000_8.png")
    (tmp_path / "x_000001_00_20200101000000_6.png").write_bytes(b"of another run with another seed")
    two.draw(1, None)
    two.draw(2, None)
    rows = two._pictures()
    assert list(rows) == ["000001", "000002"]
    assert all(sorted(row) == [0, 1, 2, 3] for row in rows.values())
    seeds = [int(rows["000001"][column].stem.split("_")[-1]) for column in range(4)]
    assert seeds[:2] == [7, 8] and seeds[3] == seeds[2] + 1
    assert "20200101" not in rows["000001"][1].name


def test_told_to_stop_it_stops_behind_the_picture(tmp_path: Path) -> None:
    answers = iter([False, False, True])
    writer(Grey(), tmp_path, 3, lambda: next(answers, True)).draw(1, None)
    assert len(list(tmp_path.glob("*.png"))) == 2
