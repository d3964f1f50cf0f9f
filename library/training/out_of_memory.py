"""What a user reads when memory ran out: how much was needed, where, and which settings would have helped most.

What each setting would save comes from the same formula as the prediction, worked out with that setting changed.
Whether there is enough memory to begin with is library.training.memory_plan's.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from library.training.memory_demand import Demand
from library.training.memory_plan import MIB, Prediction, gib, predict
from library.training.phases import Phases, device_peak, peak_memory

_SHOWN = 5
_LEAST = 0.01
_SMALL_OPTIMIZERS = 2.0
_CPU_MESSAGES = ("not enough memory", "can't allocate memory", "cannot allocate memory")
_GPU_MESSAGES = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")


class NotEnoughMemoryError(Exception):
    """Memory ran out; the text is what a user should read. The script's exit code is 1."""


@contextmanager
def explained(phases: Phases, prediction: Prediction) -> Iterator[None]:
    """Turn an allocation that failed within the body into one message.

    Raises:
        NotEnoughMemoryError: so. Other errors go through as they are.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if not is_out_of_memory(fault):
            raise
        raise NotEnoughMemoryError(message(phases, prediction)) from fault


def shortage(prediction: Prediction, free: int) -> str | None:
    """A line for a GPU that has fewer free bytes than the run is predicted to need; None where it has enough."""
    if prediction.device != "cuda" or prediction.total <= free:
        return None
    told = "; ".join(remedies(prediction))
    start = f"the GPU has {gib(free)} free, and the run may need about {gib(prediction.total)}"
    return f"{start}; what would help, the most first: {told}" if told else start


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether an error says that memory ran out, in main memory or on a GPU."""
    torch: Any = sys.modules.get("torch")
    known = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    if isinstance(fault, known):
        return True
    text = str(fault).lower()
    allocator = "allocator" in text or "allocate" in text
    return (allocator and any(one in text for one in _CPU_MESSAGES)) or any(one in text for one in _GPU_MESSAGES)


def message(phases: Phases, prediction: Prediction) -> str:
    """What ran out, where, at which peak, and what would help."""
    on_gpu = prediction.device == "cuda"
    peak = device_peak() if on_gpu else None
    peak = peak_memory() if peak is None else peak
    place = f" in the phase '{phases.failed}'" if phases.failed else ""
    lines = [
        f"not enough {'memory on the GPU' if on_gpu else 'main memory'}{place}: up to {gib(peak)} was held, "
        f"about {gib(prediction.total)} was predicted"
    ]
    advice = remedies(prediction)
    if advice:
        lines.append("what would help, the most first:")
        lines += [f"  {line}" for line in advice]
    return "\n".join(lines)


def remedies(prediction: Prediction) -> tuple[str, ...]:
    """Settings that lower the peak, the one that lowers it most first, each with what would be needed then."""
    found = []
    for what, demand in _changes(prediction.demand):
        total = predict(demand).total
        saved = prediction.total - total
        if saved > _LEAST * prediction.total and saved > MIB:
            found.append((saved, f"{what}: about {gib(total)}"))
    found.sort(key=lambda one: -one[0])
    return tuple(line for _, line in found[:_SHOWN])


def _changes(demand: Demand) -> Iterator[tuple[str, Demand]]:
    """Every setting that might help and isn't on, with the demand of the same run with it."""
    if demand.item == 4:
        yield "--mixed_precision bf16", replace(demand, item=2, vae_item=2)
    if demand.checkpointing == "none":
        yield "--gradient_checkpointing", replace(demand, checkpointing="all")
    elif demand.checkpointing == "attention":
        yield "without --gradient_checkpointing_attention_only", replace(demand, checkpointing="all")
    if demand.checkpointing != "none" and demand.every > 1:
        yield "--gradient_checkpointing_every 1", replace(demand, every=1)
    if demand.batch > 1:
        half = demand.batch // 2
        times = -(-demand.batch // half)
        what = f"--train_batch_size {half} --gradient_accumulation_steps {times}"
        yield what, replace(demand, batch=half)
    if not demand.cached_latents:
        yield "--cache_latents", replace(demand, cached_latents=True)
    if demand.trains_text and demand.rank and not demand.vectors:
        frozen = replace(demand, trains_text=False, releases_text=True)
        yield "--network_train_unet_only --cache_text_encoder_outputs", frozen
    elif not demand.releases_text and not demand.trains_text:
        yield "--cache_text_encoder_outputs", replace(demand, releases_text=True)
        if demand.device == "cuda" and not demand.offloads_text:
            yield "--offload_text_encoders", replace(demand, offloads_text=True)
    if demand.item == 2 and not demand.fp8_unet:
        yield "--fp8_base", replace(demand, fp8_unet=True, fp8_text=True)
    if demand.state_bytes > _SMALL_OPTIMIZERS:
        yield "--optimizer_type AdamW8bit", replace(demand, state_bytes=_SMALL_OPTIMIZERS)
    if demand.preview is not None:
        if demand.device == "cuda" and not demand.offloads_previews:
            yield "--offload_during_sampling", replace(demand, offloads_previews=True)
        yield "no previews, or smaller ones", replace(demand, preview=None)
    if demand.latents_bytes:
        yield "--cache_latents_to_disk", replace(demand, latents_bytes=0)
    if demand.text_bytes:
        yield "--cache_text_encoder_outputs_to_disk", replace(demand, text_bytes=0)
    width, height = demand.bucket
    smaller = (width * 3 // 4, height * 3 // 4)
    reduced = replace(demand, bucket=smaller, largest=demand.largest * 9 // 16)
    yield "a --resolution three quarters as large", reduced
