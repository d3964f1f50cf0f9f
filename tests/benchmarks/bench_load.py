"""What a full-size SD1.5 costs before and in a step: `python tests/benchmarks/bench_load.py [FILE] [--dtype bf16]`.

Prints one table: imports, loading (and its peak of anonymous memory against the model's bytes), a U-Net step of batch 1
at 256 px with the gradient to its inputs only, in both memory formats in turn, and the VAE's encoder per picture.
FILE is a single file in the original layout; without it one with random weights is written to a temporary folder.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.memory import Peak

SIZE = 256
REPEATS = 3


def timed(work: Callable[[], object]) -> float:
    """Median seconds of a few calls, after one that isn't counted."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(file: Path, kind: str) -> dict[str, str]:
    """All rows of the table for a file and a dtype (`fp32` or `bf16`)."""
    rows: dict[str, str] = {}
    start = time.perf_counter()
    import torch

    from library.conditioning import Conditioning
    from library.models.inspect import inspect
    from library.models.load import load

    rows["imports"] = f"{time.perf_counter() - start:.2f} s"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    with Peak() as peak:
        start = time.perf_counter()
        model = load(inspect(str(file)), dtype=dtype)
        rows["load"] = f"{time.perf_counter() - start:.2f} s"
    parts = (model.unet, model.reload_vae(), model.text_encoders[0])
    held = sum(value.nbytes for part in parts for value in part.parameters())
    rows["peak while loading / model"] = f"{peak.grown / held:.3f} of {held / 2**30:.2f} GiB"

    cells = SIZE // model.vae_factor
    noisy = torch.randn(1, 4, cells, cells)
    text = Conditioning(torch.randn(1, 77, 768, requires_grad=True))

    def step() -> None:
        model.predict(noisy, torch.tensor([500]), text).square().mean().backward()

    layouts = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
    for turn, name in enumerate([*layouts, *layouts]):
        model.unet.to(memory_format=layouts[name])
        rows[f"{turn + 1}: U-Net forward + backward, {name}"] = f"{timed(step):.2f} s"
    pixels = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    rows["VAE encoder, fp32, one picture"] = f"{timed(lambda: model.encode_images(pixels)):.2f} s"
    start = time.perf_counter()
    model.vae_id()
    rows["vae_id"] = f"{time.perf_counter() - start:.2f} s"
    rows["threads"] = str(torch.get_num_threads())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file
        if file is None:
            from tests.full_size import write_single_file

            file = Path(folder) / "sd15.safetensors"
            write_single_file("sd1", file)
        for name, value in measure(file, arguments.dtype).items():
            print(f"{name:<40} {value}")


if __name__ == "__main__":
    main()
