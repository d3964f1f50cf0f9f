"""Caching latents of 1-megapixel JPEGs at 512 px with a full-size VAE against the sum of its parts, run in turn.

python tests/benchmarks/bench_caching.py [--pictures 24] [--turns 3] [--batch 1] [--device cpu] [--cores 2]
python tests/benchmarks/bench_caching.py --judging 10000

Predicted is the bare VAE's time for the same batches plus the CPU time of decoding and resizing, shared by the cores.
CPU seconds of it all are printed too: they tell more on a machine that does other things.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--judging", type=int, help="instead: judge so many cached files again and again, and read them"
    )
    return parser.parse_args()


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of photographic entropy: smooth colours with grain, about 0.3 bytes a pixel."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(draws.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
        grain = draws.normal(0, 6, (size[1], size[0], 1))
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=92)


def plan_of(folder: Path, side: int) -> Any:
    from library.data.plan import build_plan
    from library.data.sources import scan as sources
    from library.options.specs import DatasetSpec, SubsetSpec

    spec = DatasetSpec(1, (side, side), (SubsetSpec(folder),))
    return build_plan([spec], sources.scan([spec]).records, 8, 1)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def caching(given: argparse.Namespace, folder: Path) -> None:
    """Bare VAE, decoding, and all together, in turn."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from library.data.caches.latents import LatentCache
    from library.data.pixels import read_picture, unit_range
    from library.models.single_configs import packaged

    torch.set_num_threads(given.cores)
    torch.manual_seed(0)
    vae: Any = AutoencoderKL.from_config(packaged("sd1", "vae"))
    dtype = getattr(torch, given.dtype)
    vae = vae.to(given.device, dtype, memory_format=torch.channels_last).eval()
    plan = plan_of(folder, 512)

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        inputs = pixels.to(given.device, dtype, memory_format=torch.channels_last)
        return vae.encode(inputs).latent_dist.mean.float().cpu()

    def pixels(index: int) -> Any:
        record, fit = plan.records[index], plan.fits[index]
        return read_picture(record, fit, plan.datasets[0].spec.subsets[0]).pixels

    def decode_all() -> None:
        for index in range(len(plan.records)):
            pixels(index)

    made = [torch.from_numpy(unit_range([pixels(i)])) for i in range(len(plan.records))]
    batches = [torch.cat(made[start : start + given.batch]) for start in range(0, len(made), given.batch)]

    def vae_alone() -> None:
        for batch in batches:
            encode(batch)

    def cache() -> None:
        how: dict[str, Any] = {"vae_id": "bench", "to_disk": True, "threads": min(8, given.cores)}
        LatentCache.build(plan, encode, vae_batch_size=given.batch, **how)

    vae_alone()
    rows = []
    print(
        f"{len(plan.records)} pictures, batches of {given.batch}, {given.dtype} on {given.device}, {given.cores} cores"
    )
    for turn in range(given.turns):
        before = seconds(vae_alone)
        decoding = seconds(decode_all)[1]
        measured, cpu = seconds(cache)
        for path in folder.glob("*.npz"):
            path.unlink()
        after = seconds(vae_alone)
        bare, bare_cpu = ((one + other) / 2 for one, other in zip(before, after, strict=True))
        predicted = bare + decoding / given.cores
        rows.append((bare, decoding, predicted, measured, measured / predicted, cpu / (bare_cpu + decoding)))
        terms = f"bare VAE {bare:.2f} s + decode and resize {decoding:.2f} CPU s / {given.cores} = {predicted:.2f} s"
        cpus = f"CPU {cpu:.1f} s of {bare_cpu:.1f} + {decoding:.1f} s: {rows[-1][-1]:.3f} x"
        print(f"turn {turn + 1}: {terms}; took {measured:.2f} s: {rows[-1][-2]:.3f} x; {cpus}", flush=True)
    bare, decoding, predicted, measured, ratio, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
    terms = f"VAE {bare:.2f} s, decode and resize {decoding:.2f} CPU s, predicted {predicted:.2f} s"
    print(f"medians: {terms}, measured {measured:.2f} s, ratio {ratio:.3f}, of CPU seconds {cpu:.3f}")


def judging(count: int, folder: Path) -> None:
    """What a start costs when all is cached: for the first time, and when nothing has changed since."""
    import torch

    from library.data.caches.latents import LatentCache

    plan = plan_of(folder, 512)
    how: dict[str, Any] = {"vae_id": "bench", "to_disk": True, "threads": len(os.sched_getaffinity(0))}
    LatentCache.build(plan, lambda pixels: torch.zeros(len(pixels), 4, 64, 64), vae_batch_size=8, **how)
    time.sleep(2.5)
    for name in ("everything read and hashed", "nothing changed", "nothing changed, again"):
        start = time.perf_counter()
        assert LatentCache(plan, **how).missing == 0
        spent = time.perf_counter() - start
        print(f"judging {count} files, {name}: {spent:.2f} s, {spent / count * 1e6:.0f} us a file")
    store = LatentCache(plan, **how).fill(lambda pixels: pixels)
    for threads in (1, 2, 4):
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            deque(pool.map(lambda index: store.array(index, False), range(count), chunksize=64), maxlen=0)
            print(f"reading latents, {threads} threads: {count / (time.perf_counter() - start):.0f} samples/s")
    start = time.perf_counter()
    assert LatentCache(plan, skip_check=True, **how).missing == 0
    print(f"with --skip_cache_check: {time.perf_counter() - start:.2f} s")


def main() -> None:
    """One of the two."""
    given = arguments()
    os.environ["OMP_NUM_THREADS"] = str(given.cores)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        folder = Path(place) / "pictures"
        if given.judging:
            write_pictures(folder, given.judging, (640, 480))
            judging(given.judging, folder)
            return
        write_pictures(folder, given.pictures, (1152, 896))
        caching(given, folder)


if __name__ == "__main__":
    main()
