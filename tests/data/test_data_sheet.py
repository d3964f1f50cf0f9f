"""Contact sheets of what the model sees."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.plan import Plan, build_plan
from library.data.sample_sheets import write_sheets
from library.data.samples import Samples
from library.data.sheet import CELL, Cell, draw_sheet, wrapped, write_png
from library.data.sources import scan as sources
from library.errors import UserError
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def contains(sheet: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` stands somewhere in a sheet, pixel by pixel."""
    height, width = part.shape[:2]
    rows, columns = np.nonzero((sheet[: -height + 1, : -width + 1] == part[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + height, x : x + width], part) for y, x in zip(rows, columns, strict=True))


@pytest.fixture
def plan(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> Plan:
    """Five pictures, three times each, with everything on that may happen to one."""
    for i in range(5):
        make_picture(tmp_path / "cats" / f"p{i} [ü].png", (64 + 20 * (i % 3), 64), caption=f"cat, {i}, red")
    make_picture(tmp_path / "reg" / "r.png", (64, 64), caption="an animal")
    reg = SubsetSpec(tmp_path / "reg", is_reg=True, caption_extension=".txt")
    how = {"num_repeats": 3, "flip_aug": True, "color_aug": True, "random_crop": True}
    spec = make_spec(tmp_path / "cats", reg, caption=CaptionSpec(shuffle=True), **how)
    return build_plan([spec], sources.scan([spec]).records, 8, 1)


def test_sheets_show_what_is_trained(tmp_path: Path, plan: Plan) -> None:
    written = write_sheets(plan, tmp_path / "out" / "sheets", "run", seed=4, per_page=12, prior_loss_weight=0.5)
    assert written == [tmp_path / "out" / "sheets" / f"run_{page:02d}.png" for page in (1, 2, 3)]
    assert sorted(written[0].parent.iterdir()) == written
    samples = Samples(plan, seed=4)
    order = [(index, sample) for index, batch in enumerate(plan.epoch(4, 1)) for sample in batch.samples]
    assert len(order) == 30
    sheets = [pixels_of(path) for path in written]
    for number, (index, sample) in enumerate(order):
        picture = samples.picture(samples.shown(sample, 1, index)).pixels
        assert contains(sheets[number // 12], picture)


def test_pages_are_few(tmp_path: Path, plan: Plan) -> None:
    assert len(write_sheets(plan, tmp_path, "a", seed=4, per_page=4, pages=2)) == 2
    assert len(write_sheets(plan, tmp_path, "b", seed=4, threads=0)) == 2


def test_a_mask_stands_beside_its_picture(tmp_path: Path, make_spec: MakeSpec) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    spec = make_spec(tmp_path, alpha_mask=True)
    plan = build_plan([spec], sources.scan([spec]).records, 8, 1)
    (path,) = write_sheets(plan, tmp_path / "out", "x", seed=0)
    framed = np.full((64, 64, 3), 128, np.uint8)
    framed[1:-1, 1:-1] = rgba[1:-1, 1:-1, 3:]
    assert contains(pixels_of(path), np.concatenate([rgba[..., :3], framed], 1))


def test_large_pictures_are_shown_small(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.jpg", (900, 700), caption="word " * 300)
    spec = make_spec(tmp_path, resolution=(640, 640), enable_bucket=False)
    plan = build_plan([spec], sources.scan([spec]).records, 8, 1)
    (path,) = write_sheets(plan, tmp_path / "out", "x", seed=0)
    height, width = pixels_of(path).shape[:2]
    assert CELL <= width < CELL + 10
    assert CELL < height < CELL + 250


def test_a_broken_picture_is_named(tmp_path: Path, plan: Plan) -> None:
    victim = plan.records[1].path
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(UserError, match="can't be decoded"):
        write_sheets(plan, tmp_path / "out", "x", seed=4)
    assert list((tmp_path / "out").iterdir()) == []


def test_any_text_can_be_drawn() -> None:
    lines = wrapped("short words and one-that-is-very-very-very-very-long 猫 🐈 \udc80 tab\there", 80)
    assert len(lines) > 3
    assert "".join(lines).replace(" ", "").startswith("shortwordsandone-that-is-very")
    assert wrapped("", 80) == [""]
    sheet = draw_sheet([[Cell(Image.new("RGB", (40, 30), "red"), tuple(lines)), None]])
    assert sheet.size[0] >= 80
    assert (np.asarray(sheet) == (255, 0, 0)).all(-1).sum() == 40 * 30
    assert (np.asarray(sheet)[: 15 * len(lines)] < 100).all(-1).any()


def test_rows_of_different_heights_do_not_overlap() -> None:
    colours = ["red", "lime", "blue", "yellow"]
    images = [Image.new("RGB", (20 + 9 * i, 50 - 9 * i), colour) for i, colour in enumerate(colours)]
    cells = [Cell(image) for image in images]
    values = np.asarray(draw_sheet([[cells[0], cells[1]], [None, cells[2], cells[3]]]))
    for image in images:
        assert (values == np.asarray(image)[0, 0]).all(-1).sum() == image.width * image.height


def test_a_png_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_png(Image.new("RGB", (4, 4), "red"), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        write_png(Image.new("F", (4, 4)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
