"""What a training step costs beyond the bare U-Net: LoRA's share, what compiling saves, and what the loop adds.

python tests/benchmarks/bench_step.py [MODEL] [--dtype bf16] [--turns 7] [--threads 2] [--compile inductor]

Without MODEL, a tiny model of random weights is made, whose ratios say nothing about large ones: there, what the loop
adds is most of a step. The first part alternates the frozen U-Net, forward and backward to its input, with a step of
networks.lora on it, at the same shape; the second runs whole trainings, with few captions and with many.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.pictures import make_pictures
from tests.tiny_models import save_tiny_sd1

_WARMUP_STEPS = 5
_JOB_SIDE = 64


class Shape:
    """One micro-batch of random latents for a loaded model, and the steps over it that are compared."""

    def __init__(self, model: Any, side: int, batch: int) -> None:
        import torch

        cells = side // model.vae_factor
        channels = int(model.info.unet_config["in_channels"])
        self.model = model
        self.noisy = torch.randn(batch, channels, cells, cells, device=model.device)
        self.timesteps = torch.full((batch,), 500, device=model.device)
        self.sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]] * batch, device=model.device)
        with torch.no_grad():
            self.conditioning = model.encode_prompts(["photo of a cat, close-up"] * batch)

    def _through(self, noisy: Any) -> None:
        import torch

        prediction = self.model.predict(noisy, self.timesteps, self.conditioning, self.sizes)
        torch.nn.functional.mse_loss(prediction, self.noisy).backward()

    def bare(self) -> None:
        """Forward and backward to the noisy latents; nothing is trained."""
        self._through(self.noisy.clone().requires_grad_())

    def trained(self, optimizer: Any) -> None:
        """Forward, backward and update of the adapters, as the loop does it."""
        import torch

        self._through(self.noisy)
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def settle() -> None:
    """Wait for a GPU, so that a time is that of the work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(action: Callable[[], None]) -> float:
    settle()
    start = time.perf_counter()
    action()
    settle()
    return time.perf_counter() - start


def told(title: str, first: Sequence[float], second: Sequence[float]) -> None:
    """Medians of two alternated series, their ratio, and how far it strays from turn to turn."""
    ratios = sorted(b / a for a, b in zip(first, second, strict=True))
    one, other = statistics.median(first), statistics.median(second)
    print(
        f"{title}: {one * 1000:.1f} ms against {other * 1000:.1f} ms, {other / one:.3f}x "
        f"(by turn {ratios[0]:.2f}-{ratios[-1]:.2f})",
        flush=True,
    )


@contextmanager
def attached(model: Any, rank: int) -> Iterator[Any]:
    """An optimizer over LoRAs on the U-Net, which are gone afterwards."""
    from library.training.optimizers import build_optimizer
    from networks.lora import create_network

    network = create_network(1.0, rank, 1.0, None, None, model.unet)
    network.apply_to(None, model.unet, False, True)
    network.to(model.device)
    groups, _ = network.prepare_optimizer_params(None, 1e-4, 1e-4)
    yield build_optimizer("AdamW", groups, {}, device=model.device).optimizer
    network.remove()


def compare(shape: Shape, rank: int, turns: int) -> None:
    """LoRA over the bare U-Net, in turn; each adapter's first step, which sets up its optimizer, isn't counted."""
    bare, ours = [], []
    shape.bare()
    for _ in range(turns):
        bare.append(timed(shape.bare))
        with attached(shape.model, rank) as optimizer:
            shape.trained(optimizer)
            ours.append(timed(partial(shape.trained, optimizer)))
    told(f"networks.lora (rank {rank}) over the bare U-Net", bare, ours)


def compare_compiled(shape: Shape, rank: int, turns: int, backend: str) -> None:
    """The same step with the U-Net's blocks as they are, and compiled."""
    from library.models.compiling import compile_blocks, uncompiled

    with attached(shape.model, rank) as optimizer:
        compile_blocks(shape.model.unet, backend)
        seconds = timed(lambda: shape.trained(optimizer))
        print(f"first step with compile {backend}: {seconds:.1f} s", flush=True)
        plain, compiled = [], []
        for _ in range(turns):
            with uncompiled():
                plain.append(timed(lambda: shape.trained(optimizer)))
            compiled.append(timed(lambda: shape.trained(optimizer)))
    told(f"compile off against on ({backend})", plain, compiled)


class Watched:
    """How long the parts of a running training take, by wrapping what they all go through."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.rows: list[dict[str, float]] = []
        self._depth, self._last = 0, 0.0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted under `name`, unless it runs inside of another that is counted."""

        def counted(*arguments: Any, **more: Any) -> Any:
            settle()
            start = time.perf_counter()
            self._depth += 1
            try:
                return function(*arguments, **more)
            finally:
                settle()
                self._depth -= 1
                if not self._depth:
                    self.seconds[name] += time.perf_counter() - start
                if name == "backward":
                    self._step()

        return counted

    def _step(self) -> None:
        """A step is what lies between the ends of two backward passes."""
        now = time.perf_counter()
        if self._last:
            row = dict(self.seconds)
            row["step"] = now - self._last
            row["outside"] = row["step"] - sum(self.seconds.values())
            self.rows.append(row)
        self.seconds.clear()
        self._last = now

    def median(self, name: str) -> float:
        return statistics.median(row.get(name, 0.0) for row in self.rows[_WARMUP_STEPS:])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Predictions, text encoders, VAE, backward and optimizer are counted inside of this."""
        import torch

        from library.models.model import Model
        from library.models.sd1 import SD1
        from library.models.sdxl import SDXL

        places: list[tuple[Any, str, str]] = [
            (Model, "predict", "forward"),
            (SD1, "encode_prompts", "text encoders"),
            (SDXL, "encode_prompts", "text encoders"),
            (Model, "encode_images", "VAE"),
            (torch.Tensor, "backward", "backward"),
            (torch.optim.AdamW, "step", "optimizer"),
        ]
        kept = [(owner, method, getattr(owner, method)) for owner, method, _ in places]
        for owner, method, name in places:
            setattr(owner, method, self.wrap(name, getattr(owner, method)))
        try:
            yield
        finally:
            for owner, method, original in kept:
                setattr(owner, method, original)


def train(model: Path, work: Path, captions: int, steps: int, rank: int, dtype: str) -> Watched:
    """A whole run of train_network on so many pictures, each with a caption of its own."""
    from train_network import main as train_network

    folder = work / f"pictures{captions}"
    if not folder.exists():
        make_pictures(folder, captions, 1, sizes=((_JOB_SIDE, _JOB_SIDE),))
    watched = Watched()
    with watched.watching():
        code = train_network(
            [
                *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder)),
                *("--output_dir", str(work / "output"), "--output_name", f"bench{captions}", "--resolution", "64"),
                *("--network_module", "networks.lora", "--network_dim", str(rank), "--network_train_unet_only"),
                *("--caption_extension", ".txt", "--cache_latents", "--max_train_steps", str(steps), "--seed", "1"),
                *("--mixed_precision", {"fp32": "no"}.get(dtype, dtype), "--console_log_level", "WARNING"),
            ]
        )
    if code:
        raise SystemExit(f"the run ended with {code}")
    return watched


def measure_loop(arguments: argparse.Namespace, model: Path, work: Path) -> None:
    """What the loop adds to forward and backward, for each number of captions."""
    first: float | None = None
    for captions in arguments.captions:
        watched = train(model, work, captions, arguments.steps, arguments.rank, arguments.dtype)
        step, outside = watched.median("step"), watched.median("outside")
        parts = ", ".join(
            f"{name} {watched.median(name) * 1000:.2f}"
            for name in ("forward", "backward", "text encoders", "VAE", "optimizer")
        )
        compared = "" if first is None else f", {outside / first:.2f}x that of {arguments.captions[0]:,}"
        print(
            f"{captions:,} captions: step {step * 1000:.2f} ms ({parts}), all else {outside * 1000:.2f} ms, "
            f"{outside / step:.3f} of it{compared}",
            flush=True,
        )
        first = outside if first is None else first


def main() -> None:
    """Print one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint or a diffusers folder")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--side", type=int, default=256, help="of the pictures of the first part, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", metavar="BACKEND", help="also compare compiled blocks with those that are not")
    parser.add_argument("--captions", type=int, nargs="*", default=[12, 8000], help="of the trainings; none to skip")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = arguments.threads

    import torch

    from library.models.inspect import inspect
    from library.models.load import load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        path = arguments.model or work / "tiny"
        if arguments.model is None:
            save_tiny_sd1(path)
        print(
            f"{path.name}, {arguments.dtype}, {arguments.side} px, batch {arguments.batch}, {device.type}, "
            f"{arguments.threads} threads, medians of {arguments.turns} turns",
            flush=True,
        )
        shape = Shape(load(inspect(path), device=device, dtype=dtype, with_vae=False), arguments.side, arguments.batch)
        compare(shape, arguments.rank, arguments.turns)
        if arguments.compile:
            compare_compiled(shape, arguments.rank, arguments.turns, arguments.compile)
        del shape
        measure_loop(arguments, path, work)


if __name__ == "__main__":
    main()
