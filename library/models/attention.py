"""Which attention kernel the U-Net uses: torch's own choice, its memory-saving one only, or xformers'.

All give the same result but for rounding. What can't run here is found out by a trial before the first step, and
torch's choice takes its place.
"""

import importlib
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.console import say

_TOKENS = 77
_FAULTS = (ImportError, OSError, RuntimeError, ValueError, AttributeError, AssertionError)


class MemorySavingProcessor(AttnProcessor2_0):
    """torch's attention, by the one kernel that never holds the whole matrix of weights."""

    def __call__(self, attn: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        """As `AttnProcessor2_0`."""
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return super().__call__(attn, hidden_states, *arguments, **options)


def choose_attention(
    unet: nn.Module, *, xformers: bool, mem_eff: bool, device: torch.device, dtype: torch.dtype
) -> str:
    """Give the U-Net the kernel that was asked for, or leave it torch's choice and say in one line why.

    Args:
        xformers, mem_eff: `--xformers` and `--mem_eff_attn`, which wins; neither is torch's choice.
        device, dtype: where and in what the U-Net computes.

    Returns:
        "xformers", "memory-saving" or "torch".
    """
    wanted = ("--mem_eff_attn", "memory-saving") if mem_eff else ("--xformers", "xformers") if xformers else None
    if wanted is None:
        return "torch"
    flag, name = wanted
    if device.type != "cuda":
        say(f"{flag} is for CUDA, not for {device.type}: torch's attention is used, which gives the same result")
        return "torch"
    processor = MemorySavingProcessor() if mem_eff else XFormersAttnProcessor()
    try:
        _try(unet, processor, device, dtype)
    except _FAULTS as fault:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        said = f"{flag} can't run here ({reason}): torch's attention is used, which gives the same result"
        say(said + ("; pip install 'lorasmith[cuda]' has xformers" if isinstance(fault, ImportError) else ""))
        return "torch"
    unet.set_attn_processor(processor)
    return name


def _try(unet: nn.Module, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
    """One forward and backward by each size of head that the U-Net has; raises what the kernel raises."""
    if isinstance(processor, XFormersAttnProcessor):
        importlib.import_module("xformers.ops")
    sizes = {one.inner_dim // one.heads for one in unet.modules() if isinstance(one, Attention)}
    for size in sorted(sizes):
        with torch.device("meta"):
            trial = Attention(query_dim=size, heads=1, dim_head=size, processor=processor)
        trial = trial.to_empty(device=device).to(dtype)
        x = torch.zeros(1, _TOKENS, size, device=device, dtype=dtype, requires_grad=True)
        trial(x).sum().backward()
