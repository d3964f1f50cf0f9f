"""Training steps of full-size models on a GPU: how many a second, how much memory, what share of the card's speed.

python tests/benchmarks/bench_gpu.py [--families sd1 sdxl] [--batches 1 4 8] [--sides 512 1024] [--cases plain fp8 ...]
python tests/benchmarks/bench_gpu.py --tiny --device cpu       # the same on tiny models, to see that the program works

Prints a table ready for docs/performance.md. Models have their families' true configs and random weights, made on the
device; latents and texts are random, as if they came from caches. A step is what the loop does: the U-Net with
networks.lora forward and backward, clipping, the optimizer. "plain" is bf16 and AdamW at every batch and size; the
other cases change one thing, at one batch and size of each family.

The share of the peak is that of the work of the bare U-Net, forward and backward to its input, over what a big matrix
product reaches here: what adapters, recomputation and casts add counts as lost. Without CUDA the program says so and
ends with exit code 2.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.memory import Peak

if TYPE_CHECKING:
    from library.models.families import FamilyName
    from library.models.info import ModelInfo

TINY: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 8, "cross_attention_dim": 32},
    "sdxl": {
        "block_out_channels": [32, 64, 64],
        "norm_num_groups": 8,
        "cross_attention_dim": 96,
        "attention_head_dim": [1, 1, 1],
        "transformer_layers_per_block": [1, 2, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
}
"""What of a family's U-Net config is another one with `--tiny`."""
SHOWN = {"sd1": "SD1.5", "sdxl": "SDXL"}
USUAL = {"sd1": (4, 512), "sdxl": (4, 1024)}
"""Batch and side of the cases that change one thing."""
_TOKENS = 77
_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """One thing that is changed.

    Attributes:
        says: what the table calls it.
        needs_cuda: it is left out elsewhere.
    """

    says: str
    optimizer: str = "AdamW"
    dtype: str = "bfloat16"
    fp8: bool = False
    xformers: bool = False
    mem_eff: bool = False
    compiles: bool = False
    checkpointing: bool = False
    attention_only: bool = False
    needs_cuda: bool = False


CASES = {
    "plain": Case("bf16, AdamW"),
    "fp32": Case("float32", dtype="float32"),
    "adamw8bit": Case("AdamW8bit", optimizer="AdamW8bit"),
    "paged8bit": Case("PagedAdamW8bit", optimizer="PagedAdamW8bit"),
    "lion8bit": Case("Lion8bit", optimizer="Lion8bit"),
    "fp8": Case("--fp8_base_unet", fp8=True),
    "xformers": Case("--xformers", xformers=True, needs_cuda=True),
    "mem_eff": Case("--mem_eff_attn", mem_eff=True, needs_cuda=True),
    "compile": Case("--torch_compile", compiles=True),
    "checkpointing": Case("--gradient_checkpointing", checkpointing=True),
    "attention_checkpointing": Case("--gradient_checkpointing_attention_only", checkpointing=True, attention_only=True),
    "fp8_checkpointing_8bit": Case(
        "fp8, checkpointing, AdamW8bit", optimizer="AdamW8bit", fp8=True, checkpointing=True
    ),
}


@dataclass(frozen=True)
class Shape:
    """What is measured: a family's U-Net at a batch and a side in pixels."""

    family: "FamilyName"
    batch: int
    side: int


class Bench:
    """Everything that the measurements share: the device, how large models are, and how fast a matrix product is."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        self.device = torch.device(arguments.device)
        self.tiny, self.rank, self.steps, self.blocks = (
            arguments.tiny,
            arguments.rank,
            arguments.steps,
            arguments.blocks,
        )
        self.on_gpu = self.device.type == "cuda"
        self._work: dict[tuple[FamilyName, int], int] = {}
        self.peak = {kind: self._matmul_peak(getattr(torch, kind)) for kind in ("bfloat16", "float32")}

    def settle(self) -> None:
        """Wait for a GPU, so that a time is that of the work."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def timed(self, action: Callable[[], None], times: int = 1) -> float:
        """Seconds of one call, of so many in a row."""
        self.settle()
        start = time.perf_counter()
        for _ in range(times):
            action()
        self.settle()
        return (time.perf_counter() - start) / times

    def _matmul_peak(self, dtype: Any) -> float:
        """Operations a second of a big matrix product: the best of a few series."""
        import torch

        side = 512 if self.tiny else 8192
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))

        def multiply() -> None:
            torch.mm(a, b)

        self.timed(multiply, 3)
        return 2 * side**3 / min(self.timed(multiply, 10) for _ in range(5))

    def config(self, family: "FamilyName") -> dict[str, Any]:
        """The U-Net's config."""
        from library.models.single_configs import packaged

        return packaged(family, "unet") | (TINY[family] if self.tiny else {})

    def model(self, family: "FamilyName", dtype: Any) -> Any:
        """A loaded model without text encoders and VAE; weights normal with std 0.02, norms 1, biases 0."""
        import torch

        from library.models.parts import build
        from library.models.sd1 import SD1
        from library.models.sdxl import SDXL

        info = self.info(family)
        unet = (
            torch.nn.Module.to(build(info, "unet"), dtype=dtype)
            .to_empty(device=self.device)
            .requires_grad_(False)
            .eval()
        )
        torch.manual_seed(0)
        for name, weight in unet.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() < 2:
                weight.fill_(1)
            else:
                weight.normal_(std=0.02)
        unet.to(memory_format=torch.channels_last)
        return {"sd1": SD1, "sdxl": SDXL}[family](
            info, unet=unet, text_encoders=(), vae=None, device=self.device, dtype=dtype, vae_dtype=dtype,
            clip_skip=None, max_token_length=None, weighted=False,
        )  # fmt: skip

    def info(self, family: "FamilyName") -> "ModelInfo":
        """What `library.models.inspect` would say of such a model."""
        from library.models.families import FAMILIES
        from library.models.info import ModelInfo, PartInfo
        from library.models.single_configs import packaged

        parts = {part: PartInfo(packaged(family, part), (), False, "", "") for part in FAMILIES[family].parts}
        parts["unet"] = PartInfo(self.config(family), (), False, "", "")
        return ModelInfo(
            path=Path(family), name=family, family_name=family, layout="folder", parts=parts,
            scheduler_config=packaged(family, "scheduler"), prediction_type="epsilon", zero_terminal_snr=False,
            vae_factor=8,
        )  # fmt: skip

    def work(self, family: "FamilyName", side: int) -> int:
        """Operations of the bare U-Net for one sample, forward and backward to its input; nothing is computed."""
        if (family, side) in self._work:
            return self._work[family, side]
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        from library.models.parts import build

        unet: Any = build(self.info(family), "unet").requires_grad_(False)
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            noisy, more = self.inputs(family, 1, side, torch.float32, "meta")
            output = unet(noisy.requires_grad_(), torch.full((1,), 500), return_dict=False, **more)[0]
            output.sum().backward()
        return self._work.setdefault((family, side), int(counter.get_total_flops()))

    def inputs(
        self, family: "FamilyName", batch: int, side: int, dtype: Any, device: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Noisy latents, and texts and sizes by the names of the U-Net's own arguments."""
        import torch

        config = self.config(family)
        noisy = torch.randn(batch, 4, side // 8, side // 8, device=device, dtype=dtype)
        states = torch.randn(batch, _TOKENS, config["cross_attention_dim"], device=device, dtype=dtype)
        more: dict[str, Any] = {"encoder_hidden_states": states}
        if family == "sdxl":
            width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            pooled = torch.randn(batch, width, device=device, dtype=dtype)
            sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]] * batch, device=device)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        return noisy, more

    def measure(self, shape: Shape, case: Case) -> "Measured":
        """Warm up, then take times and the peak.

        Raises:
            UserError: the optimizer can't run here.
            RuntimeError: memory ran out, or a kernel isn't here.
        """
        import torch

        from library.models.attention import choose_attention

        dtype = getattr(torch, case.dtype)
        model = self.model(shape.family, dtype)
        flags = {"xformers": case.xformers, "mem_eff": case.mem_eff}
        chosen = choose_attention(model.unet, **flags, device=self.device, dtype=dtype)
        if chosen == "torch" and any(flags.values()):
            raise RuntimeError("can't run here")
        if case.fp8:
            model.store_in_fp8(unet=True, text_encoders=False)
        step = self.step(model, shape, case)
        if case.compiles:
            model.compile_unet("aot_eager" if self.tiny else "inductor")
        self.settle()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with Peak() as peak:
            first = self.timed(step)
            self.timed(step, 2)
            seconds = statistics.median(self.timed(step, self.steps) for _ in range(self.blocks))
        held = torch.cuda.max_memory_allocated() if self.on_gpu else peak.grown
        share = self.work(shape.family, shape.side) * shape.batch / seconds / self.peak[case.dtype]
        return Measured(seconds, held, share, first)

    def step(self, model: Any, shape: Shape, case: Case) -> Callable[[], None]:
        """One training step of networks.lora on the model."""
        import torch

        from library.conditioning import Conditioning
        from library.training.optimizers import build_optimizer
        from networks.lora import create_network

        network = create_network(1.0, self.rank, float(self.rank), None, None, model.unet)
        network.apply_to(None, model.unet, False, True)
        network.to(self.device)
        network.prepare_grad_etc(None, model.unet)
        if case.checkpointing:
            model.enable_gradient_checkpointing(attention_only=case.attention_only)
        groups, _ = network.prepare_optimizer_params(None, _RATE, _RATE)
        optimizer = build_optimizer(case.optimizer, groups, {}, device=self.device).optimizer
        parameters = network.get_trainable_params()
        noisy, more = self.inputs(shape.family, shape.batch, shape.side, torch.float32, self.device)
        added = more.get("added_cond_kwargs", {})
        conditioning = Conditioning(more["encoder_hidden_states"].to(model.dtype), added.get("text_embeds"))
        target, timesteps = torch.randn_like(noisy), torch.full((shape.batch,), 500, device=self.device)

        def once() -> None:
            prediction = model.predict(noisy, timesteps, conditioning, added.get("time_ids"))
            torch.nn.functional.mse_loss(prediction, target).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return once


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, bytes at the peak, share of the matrix product's speed, seconds of the first step."""

    seconds: float
    held: int
    share: float
    first: float

    def cells(self, batch: int) -> str:
        """As the table has it."""
        return (
            f"{1 / self.seconds:.2f} | {batch / self.seconds:.2f} | {self.held / 2**30:.2f} GiB | {self.share:.0%} | "
            f"{self.first:.1f} s"
        )


def plan(arguments: argparse.Namespace) -> Iterator[tuple[Shape, str]]:
    """What is measured, in order: the plain case at every batch and size, the others at one."""
    for family in arguments.families:
        for name in arguments.cases:
            if name != "plain":
                yield Shape(family, *((2, 64) if arguments.tiny else USUAL[family])), name
                continue
            for side in arguments.sides:
                for batch in arguments.batches:
                    yield Shape(family, batch, side), name


def row(bench: Bench, shape: Shape, case: Case) -> str:
    """One line of the table, also of what can't be measured here."""
    from library.errors import UserError
    from library.training.out_of_memory import is_out_of_memory

    start = f"| {SHOWN[shape.family]} | {shape.side} | {shape.batch} | {case.says} | "
    if case.needs_cuda and not bench.on_gpu:
        return f"{start}needs CUDA | | | | |"
    try:
        return f"{start}{bench.measure(shape, case).cells(shape.batch)} |"
    except (UserError, RuntimeError, MemoryError) as fault:
        reason = "out of memory" if is_out_of_memory(fault) else (str(fault).strip() or repr(fault)).splitlines()[0]
        return f"{start}{reason} | | | | |"


def tidy(bench: Bench) -> None:
    """Give back what the last case held."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    found.add_argument(
        "--tiny", action="store_true", help="tiny models and pictures, and a compiler that takes seconds"
    )
    found.add_argument("--families", nargs="+", choices=list(SHOWN), default=list(SHOWN))
    found.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    found.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    found.add_argument("--sides", nargs="+", type=int, help="in pixels (default: 512 1024; with --tiny 64)")
    found.add_argument("--rank", type=int, default=16)
    found.add_argument("--steps", type=int, default=5, help="in a row, timed together")
    found.add_argument("--blocks", type=int, default=5, help="how many times; the median counts")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns the exit code."""
    arguments = parser().parse_args(argv)
    arguments.sides = arguments.sides or ([64] if arguments.tiny else [512, 1024])
    if arguments.device == "cpu" and not arguments.tiny:
        print("bench_gpu.py: full-size models are measured on CUDA; add --tiny to try the program", file=sys.stderr)
        return 2
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu.py: there is no CUDA device here; --tiny --device cpu tries the program", file=sys.stderr)
        return 2
    bench = Bench(arguments)
    card = torch.cuda.get_device_name() if bench.on_gpu else "CPU"
    peaks = ", ".join(f"{kind} {speed / 1e12:.1f}" for kind, speed in bench.peak.items())
    print(f"{card}, torch {torch.__version__}, {date.today()}; matrix product in TFLOP/s: {peaks}; rank {bench.rank}\n")
    print("| model | px | batch | what | it/s | pictures/s | peak | of matmul | first step |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for shape, name in plan(arguments):
        print(row(bench, shape, CASES[name]), flush=True)
        tidy(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
