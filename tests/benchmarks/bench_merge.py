"""A LoRA merged into a full-size checkpoint, ours against loading everything first:
`python tests/benchmarks/bench_merge.py [--family sdxl] [--rank 64] [--repeats 3]`.

Prints a table: seconds and peak memory (RssAnon + RssShmem, sampled every 20 ms) of `merge_into` and of a merge that
reads the whole file, adds every product in float32 and saves, each in a process of its own, in turn. Both write to the
same temporary folder, one file at a time; a run that isn't counted comes first, so that both find a warm page cache.
Imports are not counted.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

WAYS = ("ours", "load all")


def write_lora(family: str, rank: int, path: Path) -> None:
    """A random LoRA in float16 on all that LierLa trains, text encoders too."""
    import torch
    from safetensors.torch import save_file

    from library.models.families import FAMILIES
    from library.models.lora_targets import targets
    from library.models.single_configs import packaged

    known = next(one for one in FAMILIES.values() if one.name == family)
    texts = [packaged(family, encoder.part) for encoder in known.text_encoders]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for target in targets(packaged(family, "unet"), texts, conv=False, unet_key=known.unet_key):
        for way, shape in zip(("down", "up"), target.shapes(rank), strict=True):
            tensors[f"{target.name}.lora_{way}.weight"] = (torch.randn(shape, generator=generator) * 0.02).half()
        tensors[f"{target.name}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path, {"ss_base_model_version": known.versions["epsilon"]})


def ours(model: Path, lora: Path, out: Path) -> None:
    """The tool's way."""
    from library.weights.checkpoints.merge import merge_into
    from library.weights.loras.lora import read
    from library.weights.loras.merging import Weighted

    merge_into(model, [Weighted(read(lora))], out)


def load_all(model: Path, lora: Path, out: Path) -> None:
    """Everything in memory first; the names come from our own table, and aren't timed apart."""
    from safetensors.torch import load_file, save_file

    from library.weights.checkpoints.opened import open_model

    opened = open_model(model)
    tensors, held = load_file(model), load_file(lora)
    for target in opened.targets:
        if f"{target.name}.alpha" not in held:
            continue
        source = opened.weight_of(target)
        up, down = (held[f"{target.name}.lora_{way}.weight"].float().flatten(1) for way in ("up", "down"))
        weight = tensors[source.name]
        rows = weight if source.rows is None else weight[slice(*source.rows)]
        scale = float(held[f"{target.name}.alpha"]) / down.shape[0]
        rows.copy_(rows.float() + (up @ down).view(rows.shape) * scale)
    save_file(tensors, out)


def one_run(way: str, model: Path, lora: Path, out: Path) -> None:
    """In a process of its own: prints seconds and the peak."""
    import torch

    from tests.memory import Peak, anonymous

    importlib.import_module("library.weights.checkpoints.merge")
    start_memory = anonymous()
    with Peak() as peak:
        start = time.perf_counter()
        (ours if way == "ours" else load_all)(model, lora, out)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": start_memory + peak.grown, "threads": torch.get_num_threads()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sdxl")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=4, metavar=("WAY", "MODEL", "LORA", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        one_run(given.run[0], *map(Path, given.run[1:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        from tests.full_size import write_single_file

        model, lora, out = (Path(folder) / f"{name}.safetensors" for name in ("model", "lora", "out"))
        write_single_file(given.family, model, dtype="F16")
        write_lora(given.family, given.rank, lora)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(given.repeats + 1):
            for way in WAYS:
                command = [sys.executable, __file__, "--run", way, str(model), str(lora), str(out)]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
                out.unlink()
                if turn:
                    found[way].append(json.loads(done.stdout))
        size = model.stat().st_size / 1e9
    print(
        f"{given.family}, {size:.1f} GB in float16, rank {given.rank}, {found['ours'][0]['threads']:.0f} torch threads"
    )
    print("\n| way | seconds (median) | each | peak, GB |\n|---|---|---|---|")
    for way, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        each = ", ".join(f"{one:.1f}" for one in seconds)
        print(f"| {way} | {statistics.median(seconds):.1f} | {each} | {max(run['peak'] for run in runs) / 1e9:.2f} |")


if __name__ == "__main__":
    main()
