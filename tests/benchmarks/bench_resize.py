"""What resizing costs without the full matrix: `python tests/benchmarks/bench_resize.py [--threads 1] [--every]`.

For random full-size files, SD1.5 of rank 128 (264 modules) and SDXL of rank 64 (986), in turn for each shape of module:
our decomposition and truncation in float64, and `torch.linalg.svd(up @ down, full_matrices=False)` in float32. Only the
algebra is timed. The full SVD is timed for one module of each shape and multiplied by their number, unless `--every`
says to time it for all. Then the whole tool, as a process of its own: start, reading, resizing, writing, checking.
Prints markdown tables.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FILES = {"sd1": 128, "sdxl": 64}
NEW_RANK = 16
MODULES = ROOT / "tests" / "data" / "lora_modules.tsv"


@dataclass(frozen=True, order=True)
class Shape:
    """Of a module: `kernel` is the number of its weights for each input channel."""

    out: int
    wide: int
    kernel: int


def modules(family: str) -> Iterator[tuple[str, Shape]]:
    """What LoRA-LierLa trains."""
    with MODULES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["family"] == family and row["needs"] == "LierLa":
                sides = (int(row["out"]), int(row["in"]))
                yield row["module"], Shape(*sides, kernel=1 if row["kernel"] == "1x1" else 0)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def full_svd(up: Any, down: Any) -> object:
    """What ours is measured against: the whole matrix in the factors' float32."""
    import torch

    return torch.linalg.svd(up @ down, full_matrices=False)


def measure(shape: Shape, rank: int, turns: int, pool: ThreadPoolExecutor, *, every: bool) -> tuple[float, float]:
    """Median seconds for a module of a shape: ours, and the full SVD.

    Ours runs as the tool does: with several threads each takes a module of its own.
    """
    import torch

    from library.weights.loras.forms import Factors
    from library.weights.loras.low_rank import shortened

    def one(found: Factors) -> object:
        return shortened(found, lambda _: NEW_RANK)

    def side_by_side(found: Factors) -> None:
        list(pool.map(one, [found] * width))

    ours, full, width = [], [], torch.get_num_threads()
    for turn in range(turns):
        up, down = torch.randn(shape.out, rank) * 0.02, torch.randn(rank, shape.wide) * 0.02
        found = Factors(up, down, (shape.out, shape.wide), 0.5)
        if turn == 0:
            side_by_side(found)
        ours.append(timed(partial(side_by_side, found)) / width)
        if every or turn == 0:
            full.append(timed(partial(full_svd, up, down)))
    return statistics.median(ours), statistics.median(full)


def write_file(family: str, rank: int, path: Path) -> None:
    """A float16 file of random factors."""
    import torch

    from library.weights.files import save_safetensors

    torch.manual_seed(0)
    tensors: dict[str, Any] = {}
    for name, shape in modules(family):
        ones = (1, 1)[: 2 * shape.kernel]
        tensors[f"{name}.lora_down.weight"] = (torch.randn(rank, shape.wide, *ones) * 0.02).half()
        tensors[f"{name}.lora_up.weight"] = (torch.randn(shape.out, rank, *ones) * 0.02).half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2).half()
    save_safetensors(tensors, path, {"ss_network_dim": str(rank), "ss_network_alpha": str(rank / 2)})


def tool_seconds(path: Path, threads: int, *more: str) -> float:
    """Seconds of the whole tool as a user runs it."""
    command = [sys.executable, str(ROOT / "tools" / "resize_lora.py"), "--model", str(path), "--save_precision", "fp16"]
    command += ["--save_to", str(path.with_name("small.safetensors")), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return timed(lambda: subprocess.run(command, env=environment, check=True, capture_output=True))


def table(family: str, rank: int, repeats: int, pool: ThreadPoolExecutor, *, every: bool) -> None:
    """Print a row for each shape, and the sums."""
    counts = Counter(Shape(shape.out, shape.wide, 0) for _, shape in modules(family))
    say(f"\n### {family}, rank {rank}, {sum(counts.values())} modules\n")
    say("| module (out x in) | modules | ours, ms | full SVD, ms | times faster |\n|---|---:|---:|---:|---:|")
    sums = [0.0, 0.0]
    for shape, count in sorted(counts.items()):
        ours, full = measure(shape, rank, count if every else repeats, pool, every=every)
        sums = [sums[0] + count * ours, sums[1] + count * full]
        say(f"| {shape.out} x {shape.wide} | {count} | {ours * 1e3:.2f} | {full * 1e3:.1f} | {full / ours:.0f} |")
    say(f"| all, s | {sum(counts.values())} | {sums[0]:.2f} | {sums[1]:.1f} | **{sums[1] / sums[0]:.0f}** |")


def say(line: str) -> None:
    """To stdout at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=tuple(FILES), default=tuple(FILES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="of ours, for each shape")
    parser.add_argument("--every", action="store_true", help="time the full SVD for every module")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    say(f"torch {torch.__version__}, {given.threads} threads, load {os.getloadavg()[0]:.1f}")
    for family in given.families:
        with ThreadPoolExecutor(given.threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            table(family, FILES[family], given.repeats, pool, every=given.every)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lora.safetensors"
            write_file(family, FILES[family], path)
            size = path.stat().st_size / 1e6
            static = tool_seconds(path, given.threads, "--new_rank", str(NEW_RANK))
            target = tool_seconds(path, given.threads, "--target_size_mb", f"{size / 4:.0f}")
        times = f"{static:.1f} s to rank {NEW_RANK}, {target:.1f} s with --target_size_mb {size / 4:.0f}"
        say(f"\nthe whole tool, {size:.0f} MB in float16: {times}")


if __name__ == "__main__":
    main()
