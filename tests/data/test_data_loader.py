"""Batches: the same whatever the number of threads or processes, cached or not."""

import gc
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.caches.latents import LatentCache
from library.data.loader import Batch, Loader, block_means
from library.data.plan import Plan, build_plan
from library.data.sources import scan as sources
from library.errors import UserError
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec
from library.rng import rng

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
    tensors = ("loss_weights", "sizes", "latents", "pixels", "masks", "logvar", "posterior")
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


def working() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data")]


def test_threads_live_as_long_as_their_loader(plan: Callable[..., Plan]) -> None:
    for _ in range(2):
        loader = Loader(plan(), seed=5, workers=4)
        batches = loader.epoch(1)
        next(batches)
        before = set(threading.enumerate())
        batches.close()
        assert len(list(loader.epoch(1))) == len(list(loader.epoch(2))) == loader.plan.batches_per_epoch
        assert set(threading.enumerate()) <= before
        assert working()
        loader.close()
        assert not working()
        assert len(list(loader.epoch(3))) == loader.plan.batches_per_epoch
        loader.close()
        assert not working()


def test_a_loader_that_nobody_holds_leaves_no_threads(plan: Callable[..., Plan]) -> None:
    before = set(threading.enumerate())
    loader = Loader(plan(), seed=5, workers=4, total_steps=1000)
    list(loader.epoch(1))
    mine = set(threading.enumerate()) - before
    assert mine
    del loader
    for _ in range(200):
        gc.collect()
        if not any(thread.is_alive() for thread in mine):
            return
        time.sleep(0.05)
    pytest.fail("threads go on")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_epoch_is_begun_before_its_turn(
    plan: Callable[..., Plan], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan()
    loader = Loader(made, seed=5, workers=workers, total_steps=3 * made.batches_per_epoch)
    ordered: list[tuple[int, str]] = []
    order = Plan.epoch

    def noted(self: Plan, seed: int, epoch: int) -> Any:
        ordered.append((epoch, threading.current_thread().name))
        return order(self, seed, epoch)

    monkeypatch.setattr(Plan, "epoch", noted)
    plain = [list(Loader(plan(), seed=5).epoch(epoch)) for epoch in (1, 2, 3)]
    ordered.clear()
    for epoch in (1, 2, 3):
        assert all(same(left, right) for left, right in zip(loader.epoch(epoch), plain[epoch - 1], strict=True))
    assert [number for number, _ in ordered] == [1, 2, 3]
    assert all(name.startswith("data") for number, name in ordered if number > 1)
    assert loader._begun is None
    for epoch, start in ((1, 0), (2, 3), (1, 5), (2, 0), (3, 2)):
        batches = list(loader.epoch(epoch, start))
        assert all(same(left, right) for left, right in zip(batches, plain[epoch - 1][start:], strict=True))
    loader.close()


def test_two_epochs_side_by_side(plan: Callable[..., Plan]) -> None:
    loader = Loader(plan(), seed=5, workers=2, total_steps=100)
    plain = [list(Loader(plan(), seed=5).epoch(epoch)) for epoch in (1, 2)]
    for one, other, *expected in zip(loader.epoch(1), loader.epoch(2), *plain, strict=True):
        assert same(one, expected[0])
        assert same(other, expected[1])
    loader.close()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_the_epoch_contract(plan: Callable[..., Plan], batch_size: int, cached: bool) -> None:
    """Over three epochs, any number of workers, two processes: every sample exactly as often as it must come."""
    made = plan(processes=2, batch_size=batch_size)
    store = LatentCache.build(made, encode, vae_id="v", to_disk=False) if cached else None
    wanted = Counter({str(record.path): record.repeats for record in made.records})
    seen: dict[int, list[list[Batch]]] = {}
    for workers in (0, 1, 4):
        loaders = [
            Loader(
                made,
                seed=7,
                workers=workers,
                rank=rank,
                world_size=2,
                latents=store,
                total_steps=3 * made.batches_per_epoch,
            )
            for rank in (0, 1)
        ]
        seen[workers] = [list(loader.epoch(epoch)) for epoch in (1, 2, 3) for loader in loaders]
        for loader in loaders:
            loader.close()
        for epoch in range(3):
            mine, others = seen[workers][2 * epoch : 2 * epoch + 2]
            assert Counter(name for batch in (*mine, *others) for name in batch.names) == wanted
            assert len(mine) == len(others) == made.batches_per_epoch
            for one, other in zip(mine, others, strict=True):
                assert (one.index, one.bucket, one.global_size) == (other.index, other.bucket, other.global_size)
                assert sorted(one.positions + other.positions) == list(range(one.global_size))
                assert one.global_size <= 2 * batch_size
    for workers in (1, 4):
        for left, right in zip(seen[0], seen[workers], strict=True):
            assert all(same(one, other) for one, other in zip(left, right, strict=True))
    orders = [[name for batch in seen[0][2 * epoch] for name in batch.names] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


@pytest.fixture
def masked(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> Callable[..., Plan]:
    """A plan over one picture with a mask of its own, one with alpha, and one with neither, of different subsets."""
    draws = np.random.default_rng(0)
    make_picture(tmp_path / "one" / "a.png", (64, 64))
    Image.fromarray(draws.integers(0, 256, (64, 64), np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "two").mkdir()
    Image.fromarray(draws.integers(0, 256, (64, 64, 4), np.uint8)).save(tmp_path / "two" / "b.png")
    make_picture(tmp_path / "three" / "c.png", (64, 64))

    def make(**how: Any) -> Plan:
        alpha = SubsetSpec(tmp_path / "two", alpha_mask=True, custom_attributes={"kind": "alpha"}, **how)
        spec = make_spec(tmp_path / "one", alpha, tmp_path / "three", batch_size=3, network_multiplier=0.5, **how)
        records = sources.scan([spec]).records
        named = [replace(r, mask=str(tmp_path / "mask.png")) if r.subset == 0 else r for r in records]
        return build_plan([spec], named, 8, 1)

    return make


def test_masks_are_exact_means_and_ones_elsewhere(tmp_path: Path, masked: Callable[..., Plan]) -> None:
    made = masked()
    (batch,) = Loader(made, seed=0).epoch(1)
    assert batch.masks is not None
    assert (batch.masks.dtype, batch.masks.shape) == (torch.float32, (3, 1, 8, 8))
    by_name = {Path(name).name: mask[0] for name, mask in zip(batch.names, batch.masks, strict=True)}
    with Image.open(tmp_path / "mask.png") as mask, Image.open(tmp_path / "two" / "b.png") as rgba:
        levels = {"a.png": np.asarray(mask), "b.png": np.asarray(rgba)[..., 3]}
    for name, level in levels.items():
        means = level.reshape(8, 8, 8, 8).astype(np.float64).mean((1, 3)) / 255
        assert torch.equal(by_name[name], torch.from_numpy(means.astype(np.float32)))
    assert (by_name["c.png"] == 1).all()
    assert batch.multiplier == 0.5
    kinds = dict(zip((Path(name).name for name in batch.names), batch.custom_attributes, strict=True))
    assert kinds == {"a.png": {}, "b.png": {"kind": "alpha"}, "c.png": {}}


def test_masks_turn_with_their_pictures(masked: Callable[..., Plan]) -> None:
    made = masked(flip_aug=True, num_repeats=8)
    plain = {
        Path(name).name: mask
        for batch in Loader(masked(), seed=0).epoch(1)
        for name, mask in zip(batch.names, batch.masks if batch.masks is not None else (), strict=True)
    }
    turned = 0
    for batch in Loader(made, seed=0).epoch(1):
        assert batch.masks is None or len(batch.masks) == len(batch.names)
        for name, mask in zip(batch.names, batch.masks if batch.masks is not None else (), strict=False):
            expected = plain[Path(name).name]
            assert torch.equal(mask, expected) or torch.equal(mask, expected.flip(-1))
            turned += not torch.equal(mask, expected)
    assert 2 < turned < 16


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_masks_are_those_of_the_pictures(masked: Callable[..., Plan], to_disk: bool) -> None:
    made = masked(flip_aug=True, num_repeats=4)
    store = LatentCache.build(made, encode, vae_id="v", to_disk=to_disk)
    found = 0
    for left, right in zip(Loader(made, seed=5, latents=store).epoch(1), Loader(made, seed=5).epoch(1), strict=True):
        assert (left.masks is None) == (right.masks is None)
        if left.masks is not None and right.masks is not None:
            assert torch.equal(left.masks, right.masks)
            found += 1
    assert found


@pytest.mark.parametrize("to_disk", [False, True])
def test_cached_variances_come_with_their_draws(plan: Callable[..., Plan], to_disk: bool) -> None:
    made = plan()

    def with_variance(pixels: torch.Tensor) -> torch.Tensor:
        means = encode(pixels)
        return torch.cat([means, 3 * means - 40 * (means > 0.5) + 90 * (means < -0.8)], 1)

    store = LatentCache.build(made, with_variance, vae_id="v", to_disk=to_disk, sampling="sample")
    mean_only = LatentCache.build(made, encode, vae_id="v", to_disk=False)
    for epoch in (1, 2):
        cached = Loader(made, seed=5, latents=store, sample_posterior=True, workers=3).epoch(epoch)
        fresh = Loader(made, seed=5, sample_posterior=True).epoch(epoch)
        means = Loader(made, seed=5, latents=mean_only).epoch(epoch)
        for left, right, mean in zip(cached, fresh, means, strict=True):
            assert left.logvar is not None and left.posterior is not None and right.posterior is not None
            assert right.logvar is None
            assert torch.equal(left.posterior, right.posterior)
            moments = with_variance(pixels_of(right))
            assert torch.allclose(left.latents, moments[:, :4], atol=1e-6)
            assert torch.allclose(left.logvar, moments[:, 4:], rtol=1e-5, atol=1e-4)
            assert torch.equal(mean.latents, left.latents)
            assert mean.logvar is None and mean.posterior is None
    with pytest.raises(ValueError, match="cached without their variance"):
        next(Loader(made, seed=5, latents=mean_only, sample_posterior=True).epoch(1))


def test_no_masks_where_nothing_has_one(plan: Callable[..., Plan]) -> None:
    assert all(batch.masks is None and batch.posterior is None for batch in Loader(plan(), seed=5).epoch(1))


@given(
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)), factor=st.sampled_from([4, 8, 16]), seed=st.integers(0, 9)
)
def test_block_means(cells: tuple[int, int], factor: int, seed: int) -> None:
    mask = np.random.default_rng(seed).integers(0, 256, (cells[0] * factor, cells[1] * factor), np.uint8)
    means = block_means(mask, factor)
    assert means.shape == cells
    for row in range(cells[0]):
        for column in range(cells[1]):
            block = mask[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            assert means[row, column] == np.float32(int(block.sum(dtype=np.int64)) / (255 * factor * factor))
    assert np.array_equal(block_means(mask.astype(np.float32) / np.float32(255), factor), means)
    assert np.array_equal(block_means(np.full((factor, factor), 255, np.uint8), factor), [[1.0]])


def test_posterior_draws_belong_to_their_sample(plan: Callable[..., Plan]) -> None:
    made = plan()
    seen: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    for epoch in (1, 2):
        for batch in Loader(made, seed=5, sample_posterior=True, channels=16, workers=2).epoch(epoch):
            assert batch.posterior is not None
            assert batch.posterior.dtype == torch.float32
            width, height = batch.bucket
            assert batch.posterior.shape == (len(batch.names), 16, height // 8, width // 8)
            for name, draw in zip(batch.names, batch.posterior, strict=True):
                seen[name, epoch].append(draw)
    draws = [draw for one in seen.values() for draw in one]
    assert len({draw.numpy().tobytes() for draw in draws}) == len(draws) == 2 * made.samples_per_epoch
    values = torch.cat([draw.flatten() for draw in draws])
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02
    record = made.records[0]
    expected = {
        rng(5, "posterior", 2, record.key, repeat)
        .standard_normal(seen[str(record.path), 2][0].shape, np.float32)
        .tobytes()
        for repeat in range(record.repeats)
    }
    assert {draw.numpy().tobytes() for draw in seen[str(record.path), 2]} == expected


def test_captions_know_how_far_the_run_is(plan: Callable[..., Plan]) -> None:
    caption = CaptionSpec(keep_tokens=1, warmup_step=0.5, warmup_min=0)
    made = plan(caption=caption, batch_size=2)
    updates = -(-made.batches_per_epoch // 3)
    loader = Loader(made, seed=5, accumulation=3, total_steps=4 * updates, workers=2)
    lengths = []
    for epoch in (1, 2, 3):
        for batch in loader.epoch(epoch):
            step = (epoch - 1) * updates + batch.index // 3
            for name, text in zip(batch.names, batch.captions, strict=True):
                if "/reg/" not in name:
                    assert len(text.split(",")) - 1 == min(4, step * 4 // (2 * updates))
                    lengths.append(len(text.split(",")))
    assert lengths == sorted(lengths)
    assert set(lengths) == {1, 2, 3, 4, 5}
    for batch in Loader(made, seed=5).epoch(1):
        assert all(len(text.split(",")) in (1, 5) for text in batch.captions)
    loader.close()


@pytest.mark.parametrize("workers", [0, 4])
def test_pictures_kept_in_memory_are_read_once(plan: Callable[..., Plan], workers: int) -> None:
    how = {"random_crop": True, "color_aug": True, "face_crop_aug_range": (1.0, 2.0)}
    plain = [batch for epoch in (1, 2) for batch in Loader(plan(**how), seed=5).epoch(epoch)]
    made = plan(**how, keep_in_memory=True)
    loader = Loader(made, seed=5, workers=workers)
    first = list(loader.epoch(1))
    for record in made.records:
        if not record.is_reg:
            record.path.unlink()
    for left, right in zip([*first, *loader.epoch(2)], plain, strict=True):
        assert same(left, right)
    loader.close()


def test_a_plan_for_other_processes_is_refused(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ValueError, match="plan for 2 processes"):
        Loader(plan(processes=2), seed=0)
