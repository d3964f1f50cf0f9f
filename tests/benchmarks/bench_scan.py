"""How long many small captioned pictures take from folder to batches, without an index and with one; and memory.

python tests/benchmarks/bench_scan.py [--numbers 1000 10000 100000] [--folders 1] [--turns 3]

Each turn is a process of its own; its start and imports aren't counted. The least of all turns is printed, since other
programs only ever add to a time.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.memory import anonymous
from tests.programs import environment

STAGES = ("scan", "plan", "fingerprint", "epoch")


def make_pictures(folder: Path, number: int, folders: int) -> None:
    """PNG and JPEG files of 48 sizes by turns, each with a caption."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    kinds: list[tuple[str, bytes]] = []
    for i in range(48):
        width, height = (int(side) for side in draws.integers(40, 90, 2))
        file = io.BytesIO()
        name, ending = (("PNG", ".png"), ("JPEG", ".jpg"))[i % 2]
        Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, name)
        kinds.append((ending, file.getvalue()))
    for i in range(number):
        ending, data = kinds[i % len(kinds)]
        place = folder / f"{i % folders}"
        if i < folders:
            place.mkdir(parents=True)
        base = f"{place}/picture {i:06d}"
        for path, content in ((base + ending, data), (base + ".txt", f"number {i}, red, tag{i % 97}\n".encode())):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, content)
            os.close(descriptor)


def measure(folder: Path) -> dict[str, float]:
    """Seconds of each stage in this process, and MB that it holds at most, whole and beyond those at the start."""
    from library.data.plan import build_plan
    from library.data.sources.scan import scan
    from library.options.specs import DatasetSpec, SubsetSpec
    from tests.memory import Peak

    subsets = tuple(SubsetSpec(path, caption_extension=".txt") for path in sorted(folder.iterdir()))
    specs = [DatasetSpec(4, (64, 64), subsets, True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=8)]
    start = anonymous()
    clock = [time.perf_counter()]
    with Peak() as peak:
        records = scan(specs).records
        clock.append(time.perf_counter())
        plan = build_plan(specs, records, 8, 1)
        clock.append(time.perf_counter())
        plan.fingerprint()
        clock.append(time.perf_counter())
        plan.epoch(0, 1)
        clock.append(time.perf_counter())
    seconds = dict(zip(STAGES, (after - before for before, after in pairwise(clock)), strict=True))
    return {**seconds, "all": clock[-1] - clock[0], "peak": (start + peak.grown) / 2**20, "pictures": len(records)}


def measured(folder: Path, *, cold: bool) -> dict[str, float]:
    """`measure` in a fresh process; `cold` removes the indexes first."""
    if cold:
        for path in folder.glob("*/.lorasmith-index"):
            path.unlink()
    command = [sys.executable, __file__, "--measure", str(folder)]
    result = subprocess.run(command, env=environment(), capture_output=True, check=True)
    found: dict[str, float] = json.loads(result.stdout)
    return found


def main() -> None:
    """Print a row for each number of pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--folders", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    columns = ("pictures", "index", "all s", *(f"{name} s" for name in STAGES), "us/picture", "peak MB")
    print("".join(f"{column:>15}" for column in columns))
    for number in arguments.numbers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_pictures(folder, number, min(arguments.folders, number))
            time.sleep(2.5)
            for cold in (True, False):
                turns = [measured(folder, cold=cold) for _ in range(arguments.turns)]
                best = min(turns, key=lambda turn: turn["all"])
                cells = [f"{number:,}", "none" if cold else "fresh", f"{best['all']:.2f}"]
                cells += [f"{best[stage]:.2f}" for stage in STAGES]
                cells += [f"{best['all'] / number * 1e6:.1f}", f"{max(turn['peak'] for turn in turns):.0f}"]
                print("".join(f"{cell:>15}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
