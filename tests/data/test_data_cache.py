"""Cached latents: used when they fit, made anew when they don't, never silently wrong."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.buckets import legacy_crop
from library.data.caches import latent_files
from library.data.caches.latents import LatentCache, LatentStore
from library.data.pixels import unit_range
from library.data.plan import Plan, build_plan
from library.data.sources import scan as sources
from library.errors import UserError
from library.options.specs import DatasetSpec
from tests.pixels import read_pixels

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """A stand-in for a VAE of factor 8 and 4 channels, in which every pixel counts."""
    assert pixels.dtype == torch.float32
    assert pixels.abs().max() <= 1
    weights = torch.linspace(0.5, 1.5, pixels.shape[-1])
    four = torch.cat([pixels, pixels.mean(1, keepdim=True)], 1)
    return torch.nn.functional.avg_pool2d(four * weights, 8)


class Counting:
    """`encode`, with the number of pictures in each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(pixels))
        return encode(pixels)


def plan_for(*specs: DatasetSpec, processes: int = 1) -> Plan:
    return build_plan(specs, sources.scan(specs).records, 8, processes)


def build(plan: Plan, *, to_disk: bool = True, **how: Any) -> tuple[LatentStore, list[int]]:
    counting = Counting()
    how = {"vae_id": "vae one", "vae_batch_size": 2, **how}
    return LatentCache.build(plan, counting, to_disk=to_disk, **how), counting.calls


def expected(plan: Plan, record: int, flip: bool) -> torch.Tensor:
    subset = plan.datasets[plan.records[record].dataset].spec.subsets[plan.records[record].subset]
    pixels = read_pixels(plan.records[record], plan.fits[record], flip=flip, interpolation=subset.resize_interpolation)
    return encode(torch.from_numpy(unit_range([pixels])))[0]


@pytest.fixture
def folder(tmp_path: Path, make_picture: Callable[..., Path]) -> Path:
    """Five pictures in four buckets, one of them to be turned."""
    for i, size in enumerate([(120, 32), (64, 64), (70, 70), (32, 110), (90, 30)]):
        make_picture(tmp_path / "cats" / f"p{i}.png", size, orientation=6 if i == 4 else 1)
    return tmp_path / "cats"


def npz(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npz"))


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("threads", [0, 3])
def test_latents_are_those_of_the_pixels(folder: Path, make_spec: MakeSpec, to_disk: bool, threads: int) -> None:
    plan = plan_for(make_spec(folder, flip_aug=True))
    store, calls = build(plan, to_disk=to_disk, threads=threads)
    assert sum(calls) == 10
    assert max(calls) == 2
    assert store.channels == 4
    for record in range(5):
        for flip in (False, True):
            assert torch.allclose(store.get(record, flip), expected(plan, record, flip), atol=1e-6)
    assert bool(npz(folder)) == to_disk


def test_names_and_entries(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder, flip_aug=True))
    build(plan, dtype="bfloat16")
    assert npz(folder) == [
        "p0_0120x0032_sd.npz",
        "p1_0064x0064_sd.npz",
        "p2_0070x0070_sd.npz",
        "p3_0032x0110_sd.npz",
        "p4_0030x0090_sd.npz",
    ]
    with np.load(folder / "p0_0120x0032_sd.npz", allow_pickle=False) as file:
        assert set(file.files) == {"latents", "latents_flipped", "original_size", "crop_ltrb", "lorasmith"}
        assert file["latents"].dtype == np.float32
        assert file["original_size"].tolist() == [120, 32]
        assert file["crop_ltrb"].tolist() == list(legacy_crop((120, 32), plan.fits[0].bucket))
        said = json.loads(str(file["lorasmith"]))
    assert {
        "format",
        "picture",
        "orientation",
        "bucket",
        "resized",
        "crop",
        "interpolation",
        "vae",
        "dtype",
        "arrays",
    } <= set(said)
    assert (said["vae"], said["dtype"], said["bucket"]) == ("vae one", "bfloat16", list(plan.fits[0].bucket))
    assert not list(folder.glob("*.tmp"))


def test_second_run_encodes_nothing(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder))
    first, _ = build(plan)
    cache = LatentCache(plan, vae_id="vae one", to_disk=True)
    assert cache.missing == 0
    second, calls = build(plan)
    assert calls == []
    assert all(torch.equal(first.get(i, False), second.get(i, False)) for i in range(5))
    for path in folder.glob("*.png"):
        os.utime(path, (2e9, 2e9))
    assert build(plan)[1] == []


@pytest.mark.parametrize(
    "change", ["picture", "vae", "dtype", "bucket", "interpolation", "flip", "orientation", "format"]
)
def test_what_does_not_fit_is_made_anew(
    folder: Path, make_spec: MakeSpec, make_picture: MakePicture, change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    build(plan_for(make_spec(folder)))
    spec, count = make_spec(folder), 5
    how: dict[str, Any] = {}
    if change == "picture":
        path = folder / "p0.png"
        before = path.stat()
        Image.new("RGB", (120, 32), "red").save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        count = 1
    elif change == "vae":
        how = {"vae_id": "vae two"}
    elif change == "dtype":
        how = {"dtype": "float16"}
    elif change == "bucket":
        spec = make_spec(folder, resolution=(96, 96))
        count = sum(a != b for a, b in zip(plan_for(spec).fits, plan_for(make_spec(folder)).fits, strict=True))
        assert count >= 3
    elif change == "interpolation":
        spec = make_spec(folder, resize_interpolation="cubic")
    elif change == "flip":
        spec, count = make_spec(folder, flip_aug=True), 10
    elif change == "orientation":
        make_picture(folder / "p1.png", (64, 64), orientation=3)
        count = 1
    elif change == "format":
        path = folder / "p1_0064x0064_sd.npz"
        with np.load(path) as file:
            entries = {name: file[name] for name in file.files}
        said = json.loads(str(entries["lorasmith"]))
        entries["lorasmith"] = np.array(json.dumps({**said, "format": 0}))
        np.savez(path, **entries)
        count = 1
    plan = plan_for(spec)
    store, calls = build(plan, **how)
    assert sum(calls) == count
    assert all(torch.allclose(store.get(i, False), expected(plan, i, False), atol=1e-6) for i in range(5))
    assert ("made anew" in capfd.readouterr().err) == (change != "bucket")
    assert build(plan, **how)[1] == []
    assert len(npz(folder)) == 5 + (count if change == "bucket" else 0)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "values", "entry"])
def test_damaged_files_are_made_anew_and_named(
    folder: Path, make_spec: MakeSpec, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_for(make_spec(folder))
    build(plan)
    path = folder / "p0_0120x0032_sd.npz"
    data = path.read_bytes()
    if damage in ("values", "entry"):
        with np.load(path) as file:
            entries = {name: file[name] for name in file.files}
        if damage == "values":
            entries["latents"] = entries["latents"] + 1
        else:
            entries["lorasmith"] = np.array("not json")
        np.savez(path, **entries)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}[damage])
    capfd.readouterr()
    store, calls = build(plan)
    assert sum(calls) == 1
    assert "p0_0120x0032_sd.npz: damaged" in capfd.readouterr().err.replace("\n", "")
    assert torch.allclose(store.get(0, False), expected(plan, 0, False), atol=1e-6)


def write_foreign(plan: Plan, record: int, path: Path, **change: Any) -> np.ndarray:
    """A file as sd-scripts writes it."""
    one, fit = plan.records[record], plan.fits[record]
    latents = np.full((4, fit.bucket[1] // 8, fit.bucket[0] // 8), 0.25, np.float32)
    entries = {
        "latents": latents,
        "original_size": np.array(one.size),
        "crop_ltrb": np.array(legacy_crop(one.size, fit.bucket)),
        **change,
    }
    np.savez(path, **entries)
    later = one.path.stat().st_mtime + 10
    os.utime(path, (later, later))
    return latents


def test_foreign_files_that_fit_are_used(folder: Path, make_spec: MakeSpec, capfd: pytest.CaptureFixture[str]) -> None:
    plan = plan_for(make_spec(folder))
    write_foreign(plan, 0, folder / "p0_0120x0032_sd.npz")
    write_foreign(plan, 1, folder / "p1.npz")
    store, calls = build(plan)
    assert sum(calls) == 3
    assert (store.get(0, False) == 0.25).all()
    assert (store.get(1, False) == 0.25).all()
    said = capfd.readouterr().err.replace("\n", " ")
    assert "2 cached latents of another program are used" in said
    assert "--trust_foreign_caches no" in said
    store, calls = build(plan, trust_foreign=False)
    assert sum(calls) == 2
    assert torch.allclose(store.get(0, False), expected(plan, 0, False), atol=1e-6)


@pytest.mark.parametrize("reason", ["shape", "size", "crop", "newer picture", "no flipped", "nan", "keys"])
def test_foreign_files_that_do_not_fit(folder: Path, make_spec: MakeSpec, reason: str) -> None:
    plan = plan_for(make_spec(folder, flip_aug=reason == "no flipped"))
    path = folder / "p0_0120x0032_sd.npz"
    change: dict[str, np.ndarray] = {}
    if reason == "shape":
        change = {"latents": np.zeros((4, 4, 4), np.float32)}
    elif reason == "size":
        change = {"original_size": np.array([120, 33])}
    elif reason == "crop":
        change = {"crop_ltrb": np.array([0, 1, 128, 32])}
    elif reason == "nan":
        change = {"latents": np.full((4, 4, 16), np.nan, np.float32)}
    write_foreign(plan, 0, path, **change)
    if reason == "newer picture":
        os.utime(folder / "p0.png")
        os.utime(path, (1e9, 1e9))
    elif reason == "keys":
        np.savez(path, latents=np.full((4, 4, 16), 0.25, np.float32))
    store, calls = build(plan)
    assert sum(calls) == (10 if reason == "no flipped" else 5)
    assert torch.allclose(store.get(0, False), expected(plan, 0, False), atol=1e-6)


def test_foreign_files_of_turned_or_ambiguous_pictures_are_refused(
    folder: Path, make_spec: MakeSpec, make_picture: MakePicture
) -> None:
    make_picture(folder / "p1.jpg", (64, 64))
    plan = plan_for(make_spec(folder))
    write_foreign(plan, 5, folder / "p4_0030x0090_sd.npz")
    write_foreign(plan, 1, folder / "p1_0064x0064_sd.npz")
    assert [record.key for record in plan.records[1:3]] == ["p1.jpg", "p1.png"]
    assert sum(build(plan)[1]) == 6


def test_pictures_of_one_stem_have_files_of_their_own(
    folder: Path, make_spec: MakeSpec, make_picture: MakePicture
) -> None:
    make_picture(folder / "p1.jpg", (64, 64))
    plan = plan_for(make_spec(folder))
    store, _ = build(plan)
    assert len(npz(folder)) == 6
    assert all(torch.allclose(store.get(i, False), expected(plan, i, False), atol=1e-6) for i in range(6))
    assert build(plan)[1] == []


def test_second_bucket_of_a_picture(folder: Path, make_spec: MakeSpec) -> None:
    small, large = make_spec(folder), make_spec(folder, resolution=(96, 96))
    plan = plan_for(small, large)
    store, calls = build(plan)
    changed = sum(a != b for a, b in zip(plan.fits[:5], plan.fits[5:], strict=True))
    assert changed >= 3
    assert sum(calls) == 5 + changed
    assert "p2_0070x0070_sd.npz" in npz(folder)
    assert "p2_70x70_96x96_sd.npz" in npz(folder)
    assert all(torch.allclose(store.get(i, False), expected(plan, i, False), atol=1e-6) for i in range(10))
    for spec in (small, large):
        alone = plan_for(spec)
        store, calls = build(alone)
        assert calls == []
        assert all(torch.allclose(store.get(i, False), expected(alone, i, False), atol=1e-6) for i in range(5))


def test_the_same_fit_is_made_once(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder), make_spec(folder, batch_size=1, flip_aug=True))
    store, calls = build(plan)
    assert sum(calls) == 10
    assert len(npz(folder)) == 5
    assert torch.equal(store.get(0, False), store.get(5, False))
    assert torch.allclose(store.get(7, True), expected(plan, 2, True), atol=1e-6)


@pytest.mark.parametrize("to_disk", [False, True])
def test_nan_names_the_picture(folder: Path, make_spec: MakeSpec, to_disk: bool) -> None:
    def broken(pixels: torch.Tensor) -> torch.Tensor:
        latents = encode(pixels)
        if pixels.shape[-2:] == (64, 64):
            latents[-1, 0, 0, 0] = float("nan")
        return latents

    with pytest.raises(UserError, match=r"p2\.png: the VAE gives NaN") as error:
        LatentCache.build(plan_for(make_spec(folder)), broken, vae_id="x", to_disk=to_disk, vae_batch_size=2)
    assert len(error.value.problems) == 1


def test_random_crop_is_refused(folder: Path, make_spec: MakeSpec) -> None:
    with pytest.raises(UserError, match="random_crop"):
        build(plan_for(make_spec(folder, random_crop=True)))


def test_processes_share_the_work_on_disk(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder), processes=2)
    old = replace(plan.records[1])
    write_foreign(plan, plan.records.index(old), folder / "p1.npz")
    zero, one = Counting(), Counting()
    stores: list[LatentStore] = []

    def other() -> None:
        stores.append(LatentCache.build(plan, one, vae_id="v", to_disk=True, rank=1, world_size=2))

    stores.append(LatentCache.build(plan, zero, vae_id="v", to_disk=True, rank=0, world_size=2, wait=other))
    assert (sum(zero.calls), sum(one.calls)) == (3, 1)
    fresh = [LatentCache.build(plan, zero, vae_id="v", to_disk=True, rank=rank, world_size=2) for rank in (0, 1)]
    assert (sum(zero.calls), sum(one.calls)) == (3, 1)
    for store in (stores[1], *fresh):
        assert (store.get(1, False) == 0.25).all()
        assert all(torch.allclose(store.get(i, False), expected(plan, i, False), atol=1e-6) for i in (0, 2, 3, 4))


def test_every_process_keeps_all_in_memory(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder), processes=2)
    for rank in (0, 1):
        store, calls = build(plan, to_disk=False, rank=rank, world_size=2)
        assert sum(calls) == 5
        assert store.get(4, False).shape == (4, *[side // 8 for side in reversed(plan.fits[4].bucket)])


def test_skipping_the_check_reads_no_picture(
    folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(make_spec(folder))
    build(plan)

    def refuse(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr(latent_files, "hash_file", refuse)
    assert build(plan, skip_check=True)[1] == []
    with pytest.raises(AssertionError):
        build(plan)


def test_a_folder_that_cannot_be_written(folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_how: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"can't be written \(No space left on device\); .*--cache_latents"):
        build(plan_for(make_spec(folder)))
    assert not list(folder.glob("*.npz")) + list(folder.glob(".*"))


def test_a_file_that_goes_away_while_training(folder: Path, make_spec: MakeSpec) -> None:
    store, _ = build(plan_for(make_spec(folder)))
    (folder / "p0_0120x0032_sd.npz").unlink()
    with pytest.raises(UserError, match=r"p0_0120x0032_sd\.npz: cached latents can't be read"):
        store.get(0, False)


def test_files_are_read_by_many_threads_at_a_time(folder: Path, make_spec: MakeSpec) -> None:
    store, _ = build(plan_for(make_spec(folder)))
    expected = [store.array(i, False) for i in range(5)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: store.array(i % 5, False), range(2000)))
    assert all(np.array_equal(array, expected[i % 5]) for i, array in enumerate(found))


def test_a_real_vae(folder: Path, make_spec: MakeSpec) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
    ).eval()

    @torch.no_grad()
    def real(pixels: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels).latent_dist.mean

    plan = plan_for(make_spec(folder, flip_aug=True))
    store = LatentCache.build(plan, real, vae_id="real", to_disk=True, vae_batch_size=3)
    again = LatentCache.build(plan, encode, vae_id="real", to_disk=True)
    for record in range(5):
        pixels = torch.from_numpy(unit_range([read_pixels(plan.records[record], plan.fits[record], flip=True)]))
        assert torch.allclose(store.get(record, True), real(pixels)[0], atol=1e-4)
        assert torch.equal(store.get(record, True), again.get(record, True))
