"""Batches: the same whatever the number of threads or processes, cached or not."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.data import sources
from library.data.cache import LatentCache
from library.data.loader import Batch, Loader
from library.data.plan import Plan, build_plan
from library.errors import UserError
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


def encode(pixels: torch.Tensor) -> torch.Tensor:
    four = torch.cat([pixels, pixels.mean(1, keepdim=True)], 1)
    return torch.nn.functional.avg_pool2d(four * torch.linspace(0.5, 1.5, pixels.shape[-1]), 8)


@pytest.fixture
def plan(tmp_path: Path, make_picture: Callable[..., Path], make_spec: Callable) -> Callable[..., Plan]:
    """A plan over nine training and two regularization pictures."""
    for i in range(9):
        make_picture(tmp_path / "cats" / f"p{i}.png", (64 + 20 * (i % 3), 64), caption=f"cat, {i}, red, blue, green")
    for i in range(2):
        make_picture(tmp_path / "reg" / f"r{i}.png", (64, 64), caption="an animal")

    def make(processes: int = 1, **how: Any) -> Plan:
        caption = CaptionSpec(shuffle=True, keep_tokens=1, dropout_rate=0.1)
        reg = SubsetSpec(image_dir=tmp_path / "reg", is_reg=True, caption_extension=".txt")
        spec = make_spec(tmp_path / "cats", reg, num_repeats=2, **{"caption": caption, "flip_aug": True, **how})
        return build_plan([spec], sources.scan([spec]).records, 8, processes)

    return make


def pixels_of(batch: Batch) -> torch.Tensor:
    assert batch.pixels is not None
    return batch.pixels


def same(left: Batch, right: Batch) -> bool:
    plain = ("epoch", "index", "bucket", "positions", "global_size", "names", "captions")
    tensors = ("loss_weights", "sizes", "latents", "pixels")
    for name in tensors:
        one, other = getattr(left, name), getattr(right, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    return all(getattr(left, name) == getattr(right, name) for name in plain)


@pytest.mark.parametrize("random_crop", [False, True])
def test_any_number_of_workers_gives_the_same(plan: Callable[..., Plan], random_crop: bool) -> None:
    made = plan(random_crop=random_crop)
    epochs = [
        [batch for epoch in (1, 2) for batch in Loader(made, seed=5, workers=workers).epoch(epoch)]
        for workers in (0, 1, 4, 16)
    ]
    assert len(epochs[0]) == 2 * made.batches_per_epoch
    for other in epochs[1:]:
        assert all(same(left, right) for left, right in zip(epochs[0], other, strict=True))


def test_starting_in_the_middle(plan: Callable[..., Plan]) -> None:
    loader = Loader(plan(), seed=5, workers=2)
    whole = list(loader.epoch(3))
    for start in (0, 4, len(whole) - 1, len(whole)):
        rest = list(loader.epoch(3, start))
        assert [batch.index for batch in rest] == list(range(start, len(whole)))
        assert all(same(left, right) for left, right in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_latents_are_those_of_the_pixels(plan: Callable[..., Plan], to_disk: bool) -> None:
    made = plan()
    store = LatentCache.build(made, encode, vae_id="v", to_disk=to_disk, vae_batch_size=4)
    for workers in (0, 3):
        cached = Loader(made, seed=5, latents=store, workers=workers).epoch(1)
        for left, right in zip(cached, Loader(made, seed=5).epoch(1), strict=True):
            assert left.pixels is None
            assert right.latents is None
            assert (left.captions, left.names) == (right.captions, right.names)
            assert torch.allclose(left.latents, encode(right.pixels), atol=1e-6)


def test_contents_of_a_batch(plan: Callable[..., Plan]) -> None:
    made = plan(batch_size=4)
    seen: list[str] = []
    for number, batch in enumerate(Loader(made, seed=5, prior_loss_weight=0.25).epoch(1)):
        assert batch.index == number
        width, height = batch.bucket
        assert pixels_of(batch).shape == (len(batch.names), 3, height, width)
        assert pixels_of(batch).dtype == torch.float32
        assert -1 <= pixels_of(batch).min() < pixels_of(batch).max() <= 1
        assert batch.loss_weights.tolist() == [0.25 if "/reg/" in name else 1.0 for name in batch.names]
        assert all(caption == "" or caption.startswith(("cat", "an animal")) for caption in batch.captions)
        seen += batch.names
    assert sorted(Path(name).name for name in seen) == sorted(
        2 * [f"p{i}.png" for i in range(9)] + 9 * ["r0.png", "r1.png"]
    )


def test_pixels_span_the_unit_range(tmp_path: Path, make_spec: MakeSpec) -> None:
    from PIL import Image

    Image.frombytes("RGB", (64, 64), bytes([0] * 6144 + [255] * 6144)).save(tmp_path / "a.png")
    spec = make_spec(tmp_path)
    made = build_plan([spec], sources.scan([spec]).records, 8, 1)
    (batch,) = Loader(made, seed=0).epoch(1)
    assert pixels_of(batch).unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_take_turns_in_the_same_global_batch(plan: Callable[..., Plan], processes: int) -> None:
    shared = plan(processes=processes, batch_size=2)
    alone = plan(batch_size=2 * processes)
    whole = list(Loader(alone, seed=5).epoch(1))
    store = LatentCache.build(shared, encode, vae_id="v", to_disk=False)
    for rank in range(processes):
        for latents in (None, store):
            loader = Loader(shared, seed=5, rank=rank, world_size=processes, workers=2, latents=latents)
            for mine, all_of_it in zip(loader.epoch(1), whole, strict=True):
                assert mine.positions == tuple(range(rank, mine.global_size, processes))
                assert mine.names == tuple(all_of_it.names[i] for i in mine.positions)
                assert mine.captions == tuple(all_of_it.captions[i] for i in mine.positions)
                if latents is None:
                    assert torch.equal(pixels_of(mine), pixels_of(all_of_it)[list(mine.positions)])
                else:
                    assert mine.latents is not None
                    assert mine.latents.shape[1:] == (4, mine.bucket[1] // 8, mine.bucket[0] // 8)
                    assert len(mine.latents) == len(mine.positions)


def test_a_process_may_have_nothing_to_do(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png")
    spec = make_spec(tmp_path)
    made = build_plan([spec], sources.scan([spec]).records, 8, 2)
    (batch,) = Loader(made, seed=0, rank=1, world_size=2).epoch(1)
    assert (batch.positions, batch.names, batch.captions, batch.global_size) == ((), (), (), 1)
    assert pixels_of(batch).shape == (0, 3, batch.bucket[1], batch.bucket[0])
    assert batch.loss_weights.shape == (0,)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_broken_picture_is_named_in_its_turn(plan: Callable[..., Plan], workers: int) -> None:
    made = plan()
    order = [name for batch in Loader(made, seed=5).epoch(1) for name in batch.names]
    victim = Path(order[9])
    victim.write_bytes(victim.read_bytes()[:200])
    good: list[str] = []
    with pytest.raises(UserError, match=f"{victim.name}: can't be decoded"):
        for batch in Loader(made, seed=5, workers=workers).epoch(1):
            good += batch.names
    assert good == order[: len(good)]
    assert order.index(str(victim)) - len(good) in (0, 1)


def test_an_epoch_closed_early_leaves_no_threads(plan: Callable[..., Plan]) -> None:
    def working() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("data")]

    for _ in range(3):
        batches = Loader(plan(), seed=5, workers=4).epoch(1)
        next(batches)
        assert working()
        batches.close()
        assert not working()


def test_a_plan_for_other_processes_is_refused(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ValueError, match="plan for 2 processes"):
        Loader(plan(processes=2), seed=0)
