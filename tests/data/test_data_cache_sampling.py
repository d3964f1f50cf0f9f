"""Log-variances beside the means, stores of a part of the records, and processes that share what they made."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from library.data.caches import latents as cache
from library.data.caches import npz
from library.data.caches.latents import LatentCache, LatentStore
from library.data.pixels import unit_range
from library.data.plan import Plan
from library.errors import UserError
from library.options.specs import DatasetSpec
from tests.data.test_data_cache import Counting, encode, plan_for, write_foreign
from tests.pixels import read_pixels

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


class Posterior(Counting):
    """The stand-in for a VAE with a variance that depends on the pixels."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        means = super().__call__(pixels)
        return torch.cat([means, means * 2 - 5], 1)


def sampled(plan: Plan, *, to_disk: bool = True, **how: Any) -> tuple[LatentStore, int]:
    counting = Posterior()
    how = {"vae_id": "v", "vae_batch_size": 2, "sampling": "sample", **how}
    return LatentCache.build(plan, counting, to_disk=to_disk, **how), sum(counting.calls)


def mean(plan: Plan) -> tuple[LatentStore, int]:
    counting = Counting()
    return LatentCache.build(plan, counting, vae_id="v", to_disk=True), sum(counting.calls)


@pytest.fixture
def folder(tmp_path: Path, make_picture: MakePicture) -> Path:
    """Five pictures in three buckets."""
    for i, size in enumerate([(64, 64), (120, 32), (64, 64), (32, 110), (70, 70)]):
        make_picture(tmp_path / "cats" / f"p{i}.png", size)
    return tmp_path / "cats"


@pytest.mark.parametrize("to_disk", [False, True])
def test_means_and_logvars(folder: Path, make_spec: MakeSpec, to_disk: bool) -> None:
    plan = plan_for(make_spec(folder, flip_aug=True))
    store, count = sampled(plan, to_disk=to_disk)
    assert count == 10
    assert store.channels == 4
    for i in range(5):
        for flip in (False, True):
            expected = encode(torch.from_numpy(unit_range([read_pixels(plan.records[i], plan.fits[i], flip=flip)])))[0]
            logvar = store.logvar(i, flip)
            assert logvar is not None
            assert logvar.dtype == np.float32
            assert torch.allclose(store.get(i, flip), expected, atol=1e-6)
            assert torch.allclose(torch.from_numpy(logvar), expected * 2 - 5, atol=1e-5)
    if to_disk:
        held = npz.read(folder / "p0_0064x0064_sd.npz")
        assert {"latents", "latents_flipped", "latents_logvar", "latents_flipped_logvar"} <= held.keys()
        assert json.loads(str(held["lorasmith"]))["value"] == "mean+logvar"


def test_files_with_both_serve_a_run_that_wants_the_mean(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder))
    assert mean(plan)[1] == 5
    assert sampled(plan)[1] == 5
    store, count = mean(plan)
    assert count == 0
    assert store.logvar(0, False) is None
    assert sampled(plan)[1] == 0


def test_files_of_other_programs_hold_no_variance(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder))
    write_foreign(plan, 0, folder / "p0_0064x0064_sd.npz")
    assert sampled(plan)[1] == 5


def test_a_vae_that_gives_too_few_channels(folder: Path, make_spec: MakeSpec) -> None:
    with pytest.raises(ValueError, match="not \\(8, "):
        LatentCache.build(plan_for(make_spec(folder)), encode, vae_id="v", to_disk=False, sampling="sample")


def test_variances_that_are_no_numbers_name_the_picture(folder: Path, make_spec: MakeSpec) -> None:
    def broken(pixels: torch.Tensor) -> torch.Tensor:
        made = Posterior()(pixels)
        made[:, 7] = float("nan") if pixels.shape[-1] == 128 else 0.0
        return made

    with pytest.raises(UserError, match=r"p1\.png: the VAE gives NaN"):
        LatentCache.build(plan_for(make_spec(folder)), broken, vae_id="v", to_disk=False, sampling="sample")


def test_a_real_posterior(folder: Path, make_spec: MakeSpec) -> None:
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()

    @torch.no_grad()
    def moments(pixels: torch.Tensor) -> torch.Tensor:
        found = vae.encode(pixels[..., ::8, ::8]).latent_dist
        return torch.cat([found.mean, found.logvar], 1)

    plan = plan_for(make_spec(folder))
    store = LatentCache.build(plan, moments, vae_id="v", to_disk=True, sampling="sample")
    with torch.no_grad():
        pixels = torch.from_numpy(unit_range([read_pixels(plan.records[0], plan.fits[0])]))
        expected = vae.encode(pixels[..., ::8, ::8]).latent_dist
    assert torch.allclose(torch.from_numpy(np.asarray(store.logvar(0, False))), expected.logvar[0], atol=1e-5)


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_part_counts_from_its_first_record(folder: Path, make_spec: MakeSpec, to_disk: bool) -> None:
    plan = plan_for(make_spec(folder), make_spec(folder, resolution=(96, 96), alpha_mask=True))
    store, _ = sampled(plan, to_disk=to_disk)
    part = store.part(5)
    assert part.channels == 4
    for i in range(5):
        assert torch.equal(part.get(i, False), store.get(5 + i, False))
        assert np.array_equal(np.asarray(part.logvar(i, False)), np.asarray(store.logvar(5 + i, False)))
        assert (part.mask(i, False) is None) == (store.mask(5 + i, False) is None)


class Together:
    """What processes use to tell each other something, for threads."""

    def __init__(self, count: int) -> None:
        self.shares: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)
        self.rounds = 0

    def exchange(self, rank: int) -> Callable[[Any], list[Any]]:
        def give(share: Any) -> list[Any]:
            self.shares[rank] = share
            self.barrier.wait()
            found = list(self.shares)
            self.rounds += rank == 0
            self.barrier.wait()
            return found

        return give


def in_processes(count: int, work: Callable[[int, Together], Any]) -> tuple[list[Any], Together]:
    together = Together(count)
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, rank, together) for rank in range(count)]
        return [future.exception() or future.result() for future in futures], together


@pytest.mark.parametrize("share_bytes", [1, 2**20])
def test_processes_share_what_is_kept_in_memory(
    folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, share_bytes: int
) -> None:
    monkeypatch.setattr(cache, "_SHARE_BYTES", share_bytes)
    plan = plan_for(make_spec(folder, flip_aug=True), processes=2)
    alone, _ = sampled(plan, to_disk=False)
    found, together = in_processes(
        2,
        lambda rank, together: sampled(
            plan, to_disk=False, rank=rank, world_size=2, exchange=together.exchange(rank), threads=1
        ),
    )
    assert [count for _, count in found] == [6, 4]
    assert (together.rounds > 1) == (share_bytes == 1)
    for store, _ in found:
        for i in range(5):
            for flip in (False, True):
                assert torch.equal(store.get(i, flip), alone.get(i, flip))
                assert np.array_equal(np.asarray(store.logvar(i, flip)), np.asarray(alone.logvar(i, flip)))


def test_all_processes_learn_of_a_bad_picture(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder), processes=2)
    path = folder / "p1.png"
    path.write_bytes(path.read_bytes()[:200])
    found, _ = in_processes(
        2,
        lambda rank, together: sampled(
            plan, to_disk=False, rank=rank, world_size=2, exchange=together.exchange(rank), threads=1
        ),
    )
    assert all(isinstance(error, UserError) and "p1.png" in str(error) for error in found)


def test_a_bad_picture_on_disk_stops_every_process_and_none_hangs(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder), processes=2)
    path = folder / "p1.png"
    path.write_bytes(path.read_bytes()[:200])
    found, _ = in_processes(
        2, lambda rank, together: sampled(plan, rank=rank, world_size=2, wait=together.barrier.wait, threads=1)
    )
    assert all(isinstance(error, UserError) and "p1.png" in str(error) for error in found)
    assert "another process could not cache" in str(found[0])
    assert "can't be decoded" in str(found[1])
    assert len(list(folder.glob("*.npz"))) == 4
