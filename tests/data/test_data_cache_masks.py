"""Masks in the latent cache: made with the latents, kept by what they were made from, used only where wanted."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.buckets import legacy_crop
from library.data.caches import npz
from library.data.caches.latents import LatentCache, LatentStore
from library.data.pixels import read_picture
from library.data.plan import Plan
from library.options.specs import DatasetSpec
from tests.data.test_data_cache import Counting, plan_for

MakeSpec = Callable[..., DatasetSpec]
NAMES = ("p0_0070x0090_sd.npz", "p1_0064x0064_sd.npz", "p2_0100x0050_sd.npz")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, the first two with an alpha channel, and a mask picture for each."""
    draws = np.random.default_rng(0)
    for i, (width, height) in enumerate([(70, 90), (64, 64), (100, 50)]):
        pixels = draws.integers(0, 256, (height, width, 4 if i < 2 else 3), dtype=np.uint8)
        for name, values in (("cats", pixels), ("masks", pixels[..., 0])):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / name / f"p{i}.png")
    return tmp_path / "cats"


def with_masks(plan: Plan, folder: Path) -> Plan:
    """The plan with the pictures of `masks` as masks."""
    (dataset,) = plan.datasets
    records = tuple(replace(record, mask=str(folder.parent / "masks" / record.path.name)) for record in dataset.records)
    return replace(plan, datasets=(replace(dataset, records=records),))


def build(plan: Plan, *, to_disk: bool = True, **how: Any) -> tuple[LatentStore, int]:
    counting = Counting()
    store = LatentCache.build(plan, counting, to_disk=to_disk, vae_id="v", vae_batch_size=2, **how)
    return store, sum(counting.calls)


def expected(plan: Plan, index: int) -> np.ndarray | None:
    record = plan.records[index]
    subset = plan.datasets[record.dataset].spec.subsets[record.subset]
    mask = read_picture(record, plan.fits[index], subset).mask
    return None if mask is None else mask.astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("kind", ["alpha", "pictures"])
@pytest.mark.parametrize("to_disk", [False, True])
def test_masks_are_those_of_the_pictures(folder: Path, make_spec: MakeSpec, kind: str, to_disk: bool) -> None:
    plan = plan_for(make_spec(folder, alpha_mask=kind == "alpha", flip_aug=True))
    if kind == "pictures":
        plan = with_masks(plan, folder)
    store, count = build(plan, to_disk=to_disk)
    assert count == 6
    for i in range(3):
        mask, turned, wanted = store.mask(i, False), store.mask(i, True), expected(plan, i)
        if wanted is None:
            assert (kind, i) == ("alpha", 2)
            assert mask is None or (mask == 1).all()
            continue
        assert mask is not None
        assert turned is not None
        assert mask.dtype == np.float32
        assert mask.shape == plan.fits[i].bucket[::-1]
        assert np.array_equal(mask, wanted)
        assert np.array_equal(turned, wanted[:, ::-1])
        assert torch.from_numpy(turned).shape == mask.shape
    if to_disk:
        held = npz.read(folder / NAMES[0])
        said = json.loads(str(held["lorasmith"]))
        assert held["alpha_mask"].dtype == np.float32
        assert (said["mask"] == "alpha") == (kind == "alpha")
        assert build(plan)[1] == 0


def test_switching_a_mask_on_adds_it_without_the_vae(folder: Path, make_spec: MakeSpec) -> None:
    plain = plan_for(make_spec(folder))
    build(plain)
    before = [npz.read(folder / name)["latents"] for name in NAMES]
    masked = with_masks(plain, folder)
    cache = LatentCache(masked, vae_id="v", to_disk=True)
    assert cache.missing == 0
    store = cache.fill(Counting())
    for i in range(3):
        assert np.array_equal(store.array(i, False), before[i])
        assert np.array_equal(np.asarray(store.mask(i, False)), np.asarray(expected(masked, i)))
    assert LatentCache(masked, vae_id="v", to_disk=True)._maskless == []


def test_a_changed_mask_picture_is_read_again(folder: Path, make_spec: MakeSpec) -> None:
    plan = with_masks(plan_for(make_spec(folder)), folder)
    build(plan)
    path = folder.parent / "masks" / "p1.png"
    Image.new("L", (64, 64), 51).save(path)
    cache = LatentCache(plan, vae_id="v", to_disk=True)
    assert cache._maskless == [1]
    store = cache.fill(Counting())
    assert np.allclose(np.asarray(store.mask(1, False)), 0.2)
    assert build(plan)[1] == 0


def test_from_alpha_to_pictures_and_back(folder: Path, make_spec: MakeSpec) -> None:
    alpha, pictures = plan_for(make_spec(folder, alpha_mask=True)), with_masks(plan_for(make_spec(folder)), folder)
    for plan, encoded in ((alpha, 3), (pictures, 0), (alpha, 0)):
        store, count = build(plan)
        assert count == encoded
        assert np.array_equal(np.asarray(store.mask(0, False)), np.asarray(expected(plan, 0)))


def test_a_mask_that_nobody_wants_is_ignored_and_kept(folder: Path, make_spec: MakeSpec) -> None:
    build(plan_for(make_spec(folder, alpha_mask=True)))
    store, count = build(plan_for(make_spec(folder)))
    assert count == 0
    assert [store.mask(i, False) for i in range(3)] == [None] * 3
    assert build(plan_for(make_spec(folder, alpha_mask=True)))[1] == 0


def test_a_damaged_mask_is_made_anew(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder, alpha_mask=True))
    build(plan)
    held = npz.read(folder / NAMES[0])
    npz.write(folder / NAMES[0], {**held, "alpha_mask": held["alpha_mask"] * 0})
    store, count = build(plan)
    assert count == 0
    assert np.array_equal(np.asarray(store.mask(0, False)), np.asarray(expected(plan, 0)))


def test_subsets_of_one_picture_with_and_without_masks_share_its_latents(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder), make_spec(folder, alpha_mask=True))
    for to_disk in (False, True):
        store, count = build(plan, to_disk=to_disk)
        assert count == 3
        assert store.mask(0, False) is None
        assert store.mask(3, False) is not None


def test_alpha_and_mask_pictures_of_one_picture_have_files_of_their_own(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder), make_spec(folder, alpha_mask=True))
    first, second = plan.datasets
    pictures = with_masks(replace(plan, datasets=(first,)), folder).datasets[0]
    store, count = build(replace(plan, datasets=(pictures, second)))
    assert count == 6
    assert not np.array_equal(np.asarray(store.mask(0, False)), np.asarray(store.mask(3, False)))
    assert build(replace(plan, datasets=(pictures, second)))[1] == 0


@pytest.mark.parametrize(
    ("change", "fits"),
    [("none", True), ("no mask", False), ("shape", False), ("nan", False), ("range", False), ("picture", False)],
)
def test_masks_of_another_program(folder: Path, make_spec: MakeSpec, change: str, fits: bool) -> None:
    plan = plan_for(make_spec(folder, alpha_mask=True))
    if change == "picture":
        plan = with_masks(plan, folder)
    record, fit = plan.records[0], plan.fits[0]
    mask = np.full(fit.bucket[::-1], 0.5, np.float32)
    mask = {"shape": mask[:-1], "nan": mask * np.nan, "range": mask * 3}.get(change, mask)
    entries = {
        "latents": np.full((4, fit.bucket[1] // 8, fit.bucket[0] // 8), 0.25, np.float32),
        "original_size": np.array(record.size),
        "crop_ltrb": np.array(legacy_crop(record.size, fit.bucket)),
    }
    np.savez(folder / NAMES[0], **(entries if change == "no mask" else {**entries, "alpha_mask": mask}))
    later = record.path.stat().st_mtime + 10
    os.utime(folder / NAMES[0], (later, later))
    store, count = build(plan)
    assert count == (2 if fits else 3)
    assert bool((np.asarray(store.mask(0, False)) == 0.5).all()) == fits
