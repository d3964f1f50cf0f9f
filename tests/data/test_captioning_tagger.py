"""Taggers: the pixels that they are given, what their outputs become, and files that are none."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.captioning.pictures import Loaded, batches, loaded
from library.data.captioning.tagger import Tagger, narrowed, read_labels, squared
from library.data.captioning.tagger_files import find_files, hub_files
from library.data.captioning.tags import Label
from library.errors import UserError
from tests.captioning_models import LABELS, SIDE, write_graph, write_mapped_tagger, write_tagger

COUNT = len(LABELS)
NOTHING = np.zeros((3, COUNT))


def opened(folder: Path) -> Tagger:
    files = find_files(folder)
    assert files is not None
    return Tagger(files)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    return opened(write_tagger(tmp_path_factory.mktemp("plain"), NOTHING, np.zeros(COUNT)))


def test_pixels_of_a_wide_picture(plain: Tagger) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (10, 16, 3), dtype=np.uint8)
    square = np.full((16, 16, 3), 255.0)
    square[3:13] = picture
    means = square.reshape(8, 2, 8, 2, 3).mean((1, 3))[:, :, ::-1]
    found = plain.prepare(picture)
    assert found.shape == (SIDE, SIDE, 3)
    assert found.dtype == np.float32
    assert np.abs(found - means).max() <= 0.5


def test_a_small_tall_picture_is_enlarged(plain: Tagger) -> None:
    picture = np.full((4, 3, 3), (10, 20, 30), np.uint8)
    assert squared(picture)[:, :, 0].tolist() == [[10, 10, 10, 255]] * 4
    white = plain.prepare(picture)
    assert white[:, -1].min() > 240
    assert np.abs(white[:, 0] - (30, 20, 10)).max() < 20


@pytest.mark.parametrize("shape", [(9000, 100), (50, 4100), (20000, 1)])
def test_very_long_pictures_take_little_memory(plain: Tagger, shape: tuple[int, int]) -> None:
    picture = np.full((*shape, 3), (10, 20, 30), np.uint8)
    small = narrowed(picture, SIDE)
    assert max(small.shape) == 4096
    found, side = plain.prepare(picture), max(shape)
    dark = (255 - found[:, :, 2].astype(np.float64)).sum() / 245
    assert dark == pytest.approx(SIDE * SIDE * min(shape) / side, abs=0.1)
    assert narrowed(picture[:4096, :4096], SIDE).shape == picture[:4096, :4096].shape


def test_transparent_parts_are_white_and_pictures_upright(plain: Tagger, tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (200, 0, 0, 255)
    pixels[4:6] = (0, 200, 0, 127)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    one = loaded(tmp_path / "a.png", plain.prepare)
    assert one.values is not None
    assert one.size == (8, 8)
    assert (one.values[:2] == 255).all()
    assert np.abs(one.values[2:4] - (128, 255 * 128 / 255 + 200 * 127 / 255, 128)).max() <= 1
    assert (one.values[4:] == (0, 0, 200)).all()


def test_probabilities_by_channel(tmp_path: Path) -> None:
    weights = np.zeros((3, COUNT))
    weights[0, 2] = weights[1, 3] = weights[2, 4] = 1 / 255
    tagger = opened(write_tagger(tmp_path, weights, np.full(COUNT, 0.1)))
    given = [tagger.prepare(np.full((5, 5, 3), (255, 51, 0), np.uint8)) for _ in range(3)]
    found = tagger(given)
    assert found.shape == (3, COUNT)
    np.testing.assert_allclose(found[2], [0.1, 0.1, 0.1, 0.3, 1.1, 0.1, 0.1, 0.1], atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_network_of_one_batch_size(tmp_path: Path, count: int) -> None:
    weights = np.ones((3, COUNT)) / 765
    tagger = opened(write_tagger(tmp_path, weights, np.zeros(COUNT), batch=2))
    given = [tagger.prepare(np.full((5, 5, 3), 40 * step, np.uint8)) for step in range(count)]
    np.testing.assert_allclose(tagger(given)[:, 0], np.arange(count) * 40 / 255, atol=1e-6)


def test_the_other_kind(tmp_path: Path) -> None:
    weights = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    tags = [("1girl", "General"), ("cat", "Character"), ("safe", "Rating")]
    tagger = opened(write_mapped_tagger(tmp_path, weights, np.zeros(3), tags))
    assert tagger.labels == (Label("1girl", "general"), Label("cat", "character"), Label("safe", "rating"))
    assert tagger.sorts
    prepared = tagger.prepare(np.full((5, 5, 3), (255, 51, 0), np.uint8))
    assert prepared.shape == (3, SIDE, SIDE)
    np.testing.assert_allclose(prepared[:, 0, 0], [-1, -0.6, 1], atol=1e-6)
    expected = 1 / (1 + np.exp(-np.array([-1.0, -0.6, 1.0])))
    np.testing.assert_allclose(tagger([prepared])[0], expected, atol=1e-6)
    (tmp_path / "tag_mapping.json").write_text(
        '{"idx_to_tag": {"1": "b", "0": "a"}, "tag_to_category": {"a": "Artist", "b": "?"}}', encoding="utf-8"
    )
    assert read_labels(tmp_path / "tag_mapping.json") == (Label("a", "artist"), Label("b", "general"))


def test_batches_keep_the_order_and_name_what_is_bad(plain: Tagger, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4 + number)).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    bad: list[Loaded] = []
    found = [[one.path for one in batch] for batch in batches(paths, plain.prepare, 3, threads=2, bad=bad.append)]
    assert found == [[paths[0], paths[2], paths[3]], [paths[4]]]
    assert [(one.path, one.wrong) for one in bad] == [(paths[1], "the file is truncated: its end is missing")]


def test_files_that_are_no_tagger(tmp_path: Path) -> None:
    assert find_files(tmp_path) is None
    folder = write_tagger(tmp_path, NOTHING[:, :3], np.zeros(3))
    with pytest.raises(UserError, match=r"it has 3 outputs, but selected_tags.csv has 8 tags"):
        opened(folder)
    write_graph(folder / "model.onnx", NOTHING, np.full(COUNT, np.nan))
    with pytest.raises(UserError, match="values that are no numbers"):
        opened(folder)([np.zeros((SIDE, SIDE, 3), np.float32)])
    (folder / "model.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match="onnxruntime can't load it"):
        opened(folder)
    for text in ("", "name\na", "<html>"):
        (folder / "selected_tags.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="isn't a tagger's table"):
            opened(folder)
    for text in ("[]", '{"1": {"tag": "a", "category": "b"}}', '{"0": 3}', "{"):
        (folder / "tag_mapping.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="isn't a tagger's table"):
            read_labels(folder / "tag_mapping.json")


def test_what_is_downloaded() -> None:
    names = ["README.md", "model.onnx", "model.onnx.data", "selected_tags.csv", "in/model_optimized.onnx", "x.onnx"]
    assert hub_files(names, "") == ["selected_tags.csv", "model.onnx.data", "model.onnx"]
    assert hub_files(names, "in") == []
    more = [*names, "in/tag_mapping.json"]
    assert hub_files(more, "in") == ["in/tag_mapping.json", "in/model_optimized.onnx"]
