"""How much memory a run will need, and in which of its moments, worked out before anything is loaded. Imports no torch.

Weights and kept activations come from library.models.memory_tables; what torch, its kernels and the allocator take
beside them are constants measured on full-size models (tests/training/test_memory_measured.py), on the CPU; on CUDA
they are not measured yet. What to do when memory runs out all the same is library.training.out_of_memory's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from library.errors import UserError
from library.models import memory_tables as tables
from library.tokenizer import WORDS
from library.training.memory_demand import Demand, Device, demand_of
from library.training.prepare import Prepared

Moment = Literal["model", "latents", "steps", "previews"]
Part = tuple[str, int]

MIB = 2**20
_LIBRARIES = 750 * MIB
"""Of a process on the CPU: imported libraries (560 MiB, files' pages counted in) and what the allocator keeps."""
_CONTEXT = 700 * MIB
"""On the GPU: CUDA's context and the libraries' workspaces."""
_GPU_HOST = 3 * 2**30
"""Of main memory, where a GPU computes."""
_STEP_TENSORS = 5
"""Tensors of the widest kind that a step holds at a time beside what is kept: gradients and the kernels' own."""
_VAE_TENSORS = 6
"""Tensors of the widest kind that encoding or decoding a picture holds at a time."""
_RECOMPUTE_TENSORS = 4
"""The same again where blocks are computed anew: what comes and goes between them isn't all used again."""
_GPU_CHUNK_PIXELS = 2 * 512 * 512
_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Prediction:
    """What a run will need at its peak.

    Attributes:
        total: bytes of one process, on `device`.
        moment: when that is: while the model is loaded, latents are made, steps are trained, or previews drawn.
        parts: what it consists of, the largest first.
        moments: the total of each moment.
        host: bytes of main memory where a GPU computes; else the same as `total`.
        biggest_bucket: (width, height) in pixels of the batch that needs most.
        demand: what it was worked out from.
    """

    total: int
    moment: Moment
    parts: tuple[Part, ...]
    moments: Mapping[Moment, int]
    device: Device
    host: int
    biggest_bucket: tuple[int, int]
    demand: Demand

    def lines(self) -> tuple[str, ...]:
        """What a dry run says about it."""
        demand, place = self.demand, "of the GPU's memory" if self.device == "cuda" else "of main memory"
        width, height = self.biggest_bucket
        shares = ", ".join(f"{name} {gib(size)}" for name, size in self.parts if size >= MIB)
        others = ", ".join(f"{name} {gib(size)}" for name, size in self.moments.items() if name != self.moment)
        lines = [
            f"memory: about {gib(self.total)} {place} while {SAYING[self.moment]} "
            f"(largest batch {demand.batch} of {width}x{height})",
            f"  of it {shares}",
            f"  at other times: {others}",
        ]
        if self.device == "cuda":
            lines.append(f"  beside it about {gib(self.host)} of main memory")
        if demand.processes > 1:
            lines.append(f"  for each of {demand.processes} processes on this machine")
        return tuple(lines)


SAYING: Mapping[Moment, str] = {
    "model": "the model is loaded",
    "latents": "latents are cached",
    "steps": "training",
    "previews": "previews are drawn",
}


def gib(size: float) -> str:
    """A size as messages give it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / MIB:.0f} MiB"


def predict_memory(prepared: Prepared) -> Prediction:
    """What a prepared run will need, and when."""
    return predict(demand_of(prepared))


def predict(demand: Demand) -> Prediction:
    """What such a run will need, and when."""
    makers: dict[Moment, Callable[[Demand], Iterator[Part]]] = {"model": _loading, "steps": _steps}
    if demand.cached_latents:
        makers["latents"] = _latents
    if demand.preview is not None:
        makers["previews"] = _previews
    found = {moment: tuple(part for part in maker(demand) if part[1]) for moment, maker in makers.items()}
    moments = {moment: sum(size for _, size in parts) for moment, parts in found.items()}
    moment = max(moments, key=lambda name: moments[name])
    parts = tuple(sorted(found[moment], key=lambda part: -part[1]))
    kept = demand.latents_bytes + demand.text_bytes + _ahead(demand)
    host = moments[moment] if demand.device == "cpu" else _GPU_HOST + kept
    return Prediction(moments[moment], moment, parts, moments, demand.device, host, demand.bucket, demand)


def _base(demand: Demand) -> Iterator[Part]:
    """What is there all the time. The caches are in main memory, whatever the device."""
    yield ("libraries", _LIBRARIES) if demand.device == "cpu" else ("CUDA", _CONTEXT)
    item, one = demand.item, 1 if demand.fp8_unet else None
    yield "U-Net", tables.unet_weights(demand.model.unet_config).size(item, one)


def _loading(demand: Demand) -> Iterator[Part]:
    yield from _base(demand)
    yield "text encoders", _text_size(demand)
    yield "VAE", _vae_size(demand)


def _latents(demand: Demand) -> Iterator[Part]:
    yield from _loading(demand)
    at_once = demand.largest
    if demand.device == "cuda":
        at_once = max(demand.largest, min(demand.vae_batch * demand.largest, _GPU_CHUNK_PIXELS))
    encoding, _ = tables.vae_widest(demand.model.vae_config, at_once)
    yield "encoding a picture", _VAE_TENSORS * encoding * demand.vae_item
    yield from _caches(demand)


def _steps(demand: Demand) -> Iterator[Part]:
    yield from _base(demand)
    yield from _resident(demand)
    yield from _network(demand)
    config, item = demand.model.unet_config, demand.item
    saved = tables.unet_saved(
        config,
        batch=demand.batch,
        cells=_cells(demand, demand.bucket),
        tokens=demand.tokens,
        rank=demand.rank,
        conv_rank=demand.conv_rank,
        checkpointing=demand.checkpointing,
        every=demand.every,
        outputs=demand.outputs,
        pooled=demand.trains_text and demand.model.pooled_width > 0,
    )
    work = _STEP_TENSORS * saved.widest * item
    if saved.block:
        work += saved.block * item + _RECOMPUTE_TENSORS * saved.widest * item
    if demand.device == "cpu":
        work += tables.widest_kernel(config) * item
    kept = saved.size(item) + (demand.parameters * item if item < 4 else 0)
    kept += demand.whole_weights
    if demand.trains_text:
        kept += _text_activations(demand)
    encoding = 0
    if not demand.cached_latents:
        width, _ = tables.vae_widest(demand.model.vae_config, demand.bucket[0] * demand.bucket[1])
        encoding = _VAE_TENSORS * width * demand.vae_item
    if encoding > kept + work:
        yield "encoding a picture", encoding
    else:
        yield "activations", kept
        yield "gradients on their way", work
    yield from _caches(demand)


def _previews(demand: Demand) -> Iterator[Part]:
    """The larger of denoising (with and without the prompt at once) and decoding.

    With `--offload_during_sampling` a GPU holds only what draws at that moment: the U-Net, or the VAE in its place.
    """
    assert demand.preview is not None
    yield from _base(demand)
    item, config = demand.item, demand.model
    denoised = tables.unet_forward(config.unet_config, batch=2, cells=_cells(demand, demand.preview))
    denoising = denoised.size(item) + _STEP_TENSORS * denoised.widest * item
    _, widest = tables.vae_widest(config.vae_config, demand.preview[0] * demand.preview[1])
    decoding = _VAE_TENSORS * widest * demand.vae_item
    if demand.offloads_previews and demand.device == "cuda":
        unet = tables.unet_weights(config.unet_config).size(item, 1 if demand.fp8_unet else None)
        yield "drawing", max(denoising, decoding + _vae_size(demand) - unet)
        return
    yield from _resident(replace(demand, cached_latents=False))
    yield from _network(demand)
    yield "drawing", max(denoising, decoding)
    yield from _caches(demand)


def _resident(demand: Demand) -> Iterator[Part]:
    """Text encoders and VAE, as far as they are there while a run trains."""
    away = demand.releases_text or (demand.offloads_text and demand.device == "cuda")
    yield "text encoders", 0 if away else _text_size(demand)
    yield "VAE", 0 if demand.cached_latents else _vae_size(demand)


def _network(demand: Demand) -> Iterator[Part]:
    """What is trained with its gradients and optimizer state; kept in 16 bits, it is copied into 32 for a step."""
    each = (4 if demand.halves else 8) + demand.state_bytes + (8 if demand.halves else 0)
    yield "network and optimizer", int(demand.parameters * each)
    yield "vectors and optimizer", int(demand.vectors * (8 + demand.state_bytes))


def _caches(demand: Demand) -> Iterator[Part]:
    if demand.device == "cpu":
        yield "latents in memory", demand.latents_bytes
        yield "text in memory", demand.text_bytes
        yield "pictures read ahead", _ahead(demand)


def _ahead(demand: Demand) -> int:
    """Decoded pictures that wait for their turn."""
    pixels = demand.bucket[0] * demand.bucket[1] * demand.batch
    return 0 if demand.cached_latents else _BATCHES_AHEAD * pixels * 3 * 4


def _text_weights(demand: Demand) -> Iterator[tables.Weights]:
    model = demand.model
    for encoder, config in zip(model.family.text_encoders, model.text_encoder_configs, strict=True):
        yield tables.text_encoder_weights(config, projects=encoder.projects)


def _text_size(demand: Demand) -> int:
    return sum(weights.size(demand.item, 1 if demand.fp8_text else None) for weights in _text_weights(demand))


def _text_activations(demand: Demand) -> int:
    """Of all text encoders: they go forward before the U-Net does, and what they keep waits for its gradients."""
    rows = demand.batch * max(1, (demand.tokens - 2) // WORDS)
    total = 0
    for config in demand.model.text_encoder_configs:
        saved = tables.text_encoder_saved(
            config,
            rows=rows,
            tokens=WORDS + 2,
            checkpointing=demand.checkpointing != "none",
            adapted=demand.adapts_text,
        )
        total += saved.size(demand.item)
    return total


def _vae_size(demand: Demand) -> int:
    return tables.vae_weights(demand.model.vae_config).size(demand.vae_item)


def _cells(demand: Demand, size: tuple[int, int]) -> tuple[int, int]:
    factor = demand.model.vae_factor
    return -(-size[1] // factor), -(-size[0] // factor)


def available_memory(proc: Path = Path("/proc"), control_groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of main memory that can still be had: what the system says, within the control group's limit; None where
    neither can be read."""
    found = [*_system_available(proc / "meminfo")]
    for limit, used, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            allowed = int((control_groups / limit).read_text())
            taken = int((control_groups / used).read_text())
        except (OSError, ValueError):
            continue
        found.append(max(0, allowed - taken + _reclaimable(control_groups / statistics)))
    return min(found, default=None)


def _system_available(path: Path) -> Iterator[int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _reclaimable(path: Path) -> int:
    """What the control group counts as used and gives up when memory is short: pages of files, recently read or not,
    and the kernel's own caches of them. Version 1 tells its children's in the `total_` lines, and no kernel caches."""
    try:
        pairs = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    names = ("inactive_file", "active_file", "slab_reclaimable")
    return sum(int(pairs.get(f"total_{name}", pairs.get(name, 0))) for name in names)


def on_device(prediction: Prediction, device: Device) -> Prediction:
    """The same for where the run really computes, once that is known."""
    if prediction.device == device:
        return prediction
    return predict(replace(prediction.demand, device=device))


def check_available(prediction: Prediction, where: str = "--ignore_memory_check", available: int | None = None) -> None:
    """Stop a run that would need more main memory than there is. Not for `--ignore_memory_check`.

    Args:
        where: how the message names the flag.
        available: bytes; asked of the system where it is None.

    Raises:
        UserError: so, with the settings that would help most.
    """
    from library.training.out_of_memory import remedies

    there = available_memory() if available is None else available
    needed = prediction.host * prediction.demand.processes
    if there is None or needed <= there:
        return
    wrong = f"the run would need about {gib(needed)} of main memory, and {gib(there)} are available"
    told = "; ".join(remedies(prediction))
    raise UserError.single("memory", wrong, (f"{told}; " if told else "") + f"{where} starts it all the same")
