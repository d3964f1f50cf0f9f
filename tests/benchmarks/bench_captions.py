"""What captions, buckets and token counts cost at a hundred thousand pictures; no file is read.

python tests/benchmarks/bench_captions.py [--pictures 100000]
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.data.buckets import fit
from library.data.caption_plan import plan_captions
from library.data.captions import Progress, process
from library.data.plan import Plan, build_plan
from library.data.records import ImageRecord
from library.data.report import cropped_too_much
from library.data.token_counts import count_tokens
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

RECIPES = {
    "plain": CaptionSpec(),
    "dropout": CaptionSpec(dropout_rate=0.1),
    "shuffle": CaptionSpec(shuffle=True, keep_tokens=1),
    "shuffle, tag dropout, warmup": CaptionSpec(shuffle=True, tag_dropout_rate=0.1, warmup_step=0.5),
    "templates": CaptionSpec(templates=("{} here", "{} there"), subject="sks"),
}


def memory() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(title: str, count: int, action: Callable[[], object]) -> None:
    """Print how long an action takes, in all and for each of `count`."""
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    print(
        f"{title}: {seconds:.2f} s, {seconds / count * 1e6:.2f} us each, memory so far {memory():.0f} MiB", flush=True
    )


def make_records(count: int, sizes: int) -> list[ImageRecord]:
    """Pictures of so many sizes with 15 tags each."""
    draws = np.random.default_rng(0)
    words = ["".join(map(chr, draws.integers(97, 123, draws.integers(2, 9)))) for _ in range(5000)]
    shapes = [(int(width), int(height)) for width, height in draws.integers(300, 3000, (sizes, 2))]
    folder = Path("pictures")
    return [
        ImageRecord(
            folder,
            f"{i:06d}.jpg",
            shapes[i % sizes],
            1,
            f"{i}, " + ", ".join(words[int(j)] for j in draws.integers(0, 5000, 14)),
            True,
            *(0, 0, 1),
            False,
        )
        for i in range(count)
    ]


def make_plan(records: list[ImageRecord], recipe: CaptionSpec) -> Plan:
    """The plan at 1024 px."""
    spec = DatasetSpec(4, (1024, 1024), (SubsetSpec(Path("pictures"), caption=recipe),), True, 256, 2048)
    return build_plan([spec], records, 8, 1)


def fit_all(records: list[ImageRecord], spec: DatasetSpec) -> None:
    """Find the bucket of each."""
    for record in records:
        fit(record.size, spec, 8)


def process_all(records: list[ImageRecord], recipe: CaptionSpec) -> None:
    """Make the caption of each."""
    moment = Progress(1, 100)
    for record in records:
        process(record.caption, recipe, seed=1, epoch=1, key=record.key, repeat=0, progress=moment)


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100_000)
    count = parser.parse_args().pictures
    records = make_records(count, 500)
    print(f"{count:,} pictures: memory {memory():.0f} MiB")
    spec = DatasetSpec(4, (1024, 1024), (), True, 256, 2048)
    for title, group in (("500 sizes", records), ("all sizes different", make_records(count, count))):
        timed(f"fit, {title}", count, partial(fit_all, group, spec))
    for name, recipe in RECIPES.items():
        plan = make_plan(records, recipe)
        timed(f"process, {name}", count, partial(process_all, records, recipe))
        timed(f"plan_captions, {name}", count, partial(plan_captions, plan))
        captions = plan_captions(plan)
        timed(f"of_epoch, {name}", count, partial(captions.of_epoch, 1, 1, total_steps=10**6))
    plan = make_plan(records, RECIPES["shuffle"])
    timed("cropped_too_much", count, lambda: cropped_too_much(plan, 0.1))
    for limit in (75, 20):
        timed(f"count_tokens, limit {limit}", count, partial(count_tokens, plan, seed=1, limit=limit))


if __name__ == "__main__":
    main()
