"""What the loader delivers: `python tests/benchmarks/bench_loader.py [--workers 2] [--pictures 200]`.

Prints one table:
(a) samples/s of batches cached as npz at the latent size of SD1 (4x64x64), plain and with flips and shuffled captions;
(b) samples/s of decoded 512-px batches from JPEGs of about a megapixel, against the same number of threads that
    only decode and resize: by Pillow's decoder with OpenCV's resize, and by OpenCV alone. In turns, medians; CPU time
    beside it, since other programs disturb that less;
(c) the time to the first batch of each epoch, half a second after the one before, and of making an epoch's order.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import cv2
import numpy as np
import skimage.data
import torch
from PIL import Image

from library.data.caches.latents import LatentCache
from library.data.loader import Loader
from library.data.plan import Plan, build_plan
from library.data.sources import scan as sources
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

RESOLUTION = (512, 512)
REPEATS = 7


def plan_of(folder: Path, batch_size: int, **how: Any) -> Plan:
    subset = SubsetSpec(folder, caption_extension=".txt", **how)
    spec = DatasetSpec(batch_size, RESOLUTION, (subset,))
    return build_plan([spec], sources.scan([spec]).records, 8, 1)


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Photographs of `side` x `side`, each a little different, as JPEGs of quality 92 with captions."""
    photo = cv2.resize(skimage.data.astronaut(), (side + 64, side + 64), interpolation=cv2.INTER_CUBIC)
    for number in range(count):
        top, left = number % 8 * 8, number // 8 % 8 * 8
        Image.fromarray(photo[top : top + side, left : left + side]).save(folder / f"{number:05d}.jpg", quality=92)
        (folder / f"{number:05d}.txt").write_text(f"photo, number {number}, red, blue, green, an astronaut, flag")


def encode(pixels: torch.Tensor) -> torch.Tensor:
    small = torch.nn.functional.avg_pool2d(pixels, 8)
    return torch.cat([small, small[:, :1]], 1)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drain(loader: Loader, epoch: int) -> int:
    return sum(len(batch.names) for batch in loader.epoch(epoch))


def cached(folder: Path, workers: int) -> dict[str, str]:
    """(a): the rows of batches cached as npz."""
    rows = {}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "flips, shuffled captions": {"flip_aug": True, "caption": CaptionSpec(shuffle=True, keep_tokens=1)},
    }
    LatentCache.build(plan_of(folder, 4, flip_aug=True), encode, vae_id="v", to_disk=True, vae_batch_size=8)
    for batch_size in (4, 8, 16):
        for name, how in kinds.items():
            plan = plan_of(folder, batch_size, num_repeats=max(1, 1600 // len(list(folder.glob("*.jpg")))), **how)
            store = LatentCache.build(plan, encode, vae_id="v", to_disk=True)
            loader = Loader(plan, seed=1, latents=store, workers=workers, total_steps=10**6)
            drain(loader, 1)
            times = [seconds(partial(drain, loader, epoch)) for epoch in range(2, 2 + REPEATS)]
            loader.close()
            rate = plan.samples_per_epoch / statistics.median(times)
            rows[f"(a) npz, batch {batch_size}, {name}"] = f"{rate:.0f} samples/s"
    return rows


def by_pillow(path: Path) -> object:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return cv2.resize(pixels, RESOLUTION, interpolation=cv2.INTER_AREA)


def by_opencv(path: Path) -> object:
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return cv2.resize(pixels, RESOLUTION, interpolation=cv2.INTER_AREA)


def decoded(folder: Path, workers: int) -> dict[str, str]:
    """(b): the rows of decoded batches, and the terms of their ratios."""
    plan = plan_of(folder, 4)
    paths = [record.path for record in plan.records]
    loader = Loader(plan, seed=1, workers=workers)
    threads = max(1, workers)
    with ThreadPoolExecutor(threads) as pool:
        works: dict[str, Callable[[int], object]] = {
            "loader": lambda epoch: drain(loader, epoch),
            "Pillow decode + OpenCV resize": lambda epoch: [None for _ in pool.map(by_pillow, paths)],
            "OpenCV decode + resize": lambda epoch: [None for _ in pool.map(by_opencv, paths)],
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for epoch in range(1, 2 + REPEATS):
            for name, work in works.items():
                cpu = time.process_time()
                wall = seconds(partial(work, epoch))
                taken[name].append((wall, time.process_time() - cpu))
    loader.close()
    rows, medians = {}, {}
    for name, times in taken.items():
        wall, cpu = medians[name] = [statistics.median(column) for column in zip(*times[1:], strict=True)]
        rate, each = len(paths) / wall, 1000 * cpu / len(paths)
        rows[f"(b) {name}, {threads} threads"] = f"{rate:.1f} samples/s, {each:.2f} ms of CPU time each"
    mine, *others = medians
    for name in others:
        speed, cost = (medians[name][i] / medians[mine][i] for i in (0, 1))
        rows[f"(b) loader / {name}"] = f"{speed:.3f} of its speed, {cost:.3f} by CPU time"
    return rows


def starts(folder: Path, workers: int) -> dict[str, str]:
    """(c): the rows of the times to the first batch."""
    rows = {}
    for name, repeats in (("few samples", 1), ("100,000 samples", 100_000 // len(list(folder.glob("*.jpg"))))):
        plan = plan_of(folder, 4, num_repeats=repeats)
        rows[f"(c) order of an epoch, {name}"] = f"{1000 * seconds(partial(plan.epoch, 1, 1)):.1f} ms"
        loader = Loader(plan, seed=1, workers=workers, total_steps=10**6)
        for epoch in (1, 2, 3):
            batches = loader.epoch(epoch)
            first = seconds(partial(next, batches))
            rows[f"(c) first batch, {name}, epoch {epoch}"] = f"{1000 * first:.1f} ms"
            if repeats == 1:
                for _ in batches:
                    continue
            time.sleep(0.5)
            batches.close()
        loader.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--side", type=int, default=1000, help="of the pictures, in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, arguments.pictures, arguments.side)
        for work in (cached, decoded, starts):
            for row, value in work(folder, arguments.workers).items():
                print(f"{row:<52} {value}", flush=True)


if __name__ == "__main__":
    main()
