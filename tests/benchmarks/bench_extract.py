"""Decomposing the differences of full-size models: extract_lora.py's randomized SVD against whole ones, in turn.

python tests/benchmarks/bench_extract.py [--family sd1] [--dim 64] [--conv_dim 32] [--turns 3] [--threads 2]
python tests/benchmarks/bench_extract.py --models a.safetensors b.safetensors

Matrices are random: singular values that fall like 1 / sqrt(n), which is slower than those of real fine-tunings, under
noise. One of each shape is timed and its time multiplied by the number of such modules. `left out` is the error above
that of the best approximation of this rank. With --models the whole tool is timed, on files of that size.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    import torch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sd1")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--conv_dim", type=int)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs=2, metavar=("ORG", "TUNED"), help="instead: time the whole tool")
    return parser.parse_args()


def shapes(family: str, dim: int, conv_dim: int | None) -> Counter[tuple[int, int, int]]:
    """(rows, columns, rank) of a LoRA's modules -> how many there are."""
    from library.models.families import FAMILIES
    from library.models.lora_targets import targets
    from library.models.single_configs import packaged
    from library.weights.checkpoints.difference import weight_shape
    from library.weights.checkpoints.extraction import Extraction, wanted

    facts = next(one for name, one in FAMILIES.items() if name == family)
    texts = [packaged(family, encoder.part) for encoder in facts.text_encoders]
    every = targets(packaged(family, "unet"), texts, conv=True)
    found: Counter[tuple[int, int, int]] = Counter()
    for target, rank in wanted(every, Extraction(dim, conv_dim)):
        rows, *rest = weight_shape(target)
        columns = 1
        for side in rest:
            columns *= side
        found[rows, columns, rank] += 1
    return found


def matrix(rows: int, columns: int) -> "torch.Tensor":
    import torch

    draws = torch.Generator().manual_seed(rows * columns)
    width = min(rows, columns) // 2
    falling = torch.arange(1, width + 1) ** -0.5
    left, right = (torch.randn(side, width, generator=draws) for side in (rows, columns))
    noise = torch.randn(rows, columns, generator=draws)
    return (left * falling) @ right.T / width + 0.1 * noise / width**0.5


def algebra(given: argparse.Namespace) -> None:
    """The table by shapes, as markdown."""
    import torch

    from library.weights.loras.randomized import cut

    torch.set_num_threads(given.threads)
    print("| module | rank | count | ours, ms | whole SVD, ms | times faster | left out, % more |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    ours_all = whole_all = 0.0
    for (rows, columns, rank), count in sorted(shapes(given.family, given.dim, given.conv_dim).items()):
        change = matrix(rows, columns)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(given.turns):
            for kind, exact in zip(times, (False, True), strict=True):
                start = time.perf_counter()
                found = cut(change, rank, name="m", exact=exact)
                kind.append(time.perf_counter() - start)
                if exact:
                    best = float(found.svd.s[rank:].double().norm())
                else:
                    left = change - (found.svd.u[:, :rank] * found.svd.s[:rank]) @ found.svd.vh[:rank]
                    error = float(left.double().norm())
        ours, whole = (statistics.median(kind) for kind in times)
        ours_all, whole_all = ours_all + ours * count, whole_all + whole * count
        more = 100 * (error / best - 1) if best else 0.0
        cells = (f"{ours * 1e3:.1f}", f"{whole * 1e3:.1f}", f"{whole / ours:.1f}", f"{more:.2f}")
        print(f"| {rows} x {columns} | {rank} | {count} | {' | '.join(cells)} |", flush=True)
    print(f"| all, s | | | {ours_all:.2f} | {whole_all:.2f} | {whole_all / ours_all:.1f} | |")


def whole(given: argparse.Namespace) -> None:
    """Wall clock and peak memory of the tool in a process of its own."""
    from tests.memory import run_measured
    from tests.programs import environment

    with tempfile.TemporaryDirectory() as place:
        flags = ["--model_org", given.models[0], "--model_tuned", given.models[1], "--dim", str(given.dim)]
        flags += ["--conv_dim", str(given.conv_dim)] if given.conv_dim else []
        command = [sys.executable, str(ROOT / "tools/extract_lora.py"), *flags, "--save_to", f"{place}/x.safetensors"]
        found = run_measured(command, environment(OMP_NUM_THREADS=str(given.threads)), Path(place) / "log")
        subprocess.run(["tail", "-n", "3", f"{place}/log"], check=False)
    print(f"whole tool: {found.seconds:.1f} s, peak {found.anonymous / 1e9:.2f} GB, exit code {found.returncode}")


if __name__ == "__main__":
    options = arguments()
    print(f"{os.cpu_count()} cores, {options.threads} threads, rank {options.dim}, conv rank {options.conv_dim}")
    whole(options) if options.models else algebra(options)
