"""Attention kernels: what can't run falls back to torch's, with one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from library.models.attention import MemorySavingProcessor, choose_attention
from tests.networks.tiny_families import load_unet


@pytest.mark.parametrize(
    ("flags", "device", "said"),
    [
        ({"xformers": False, "mem_eff": False}, "cpu", None),
        ({"xformers": True, "mem_eff": False}, "cpu", "--xformers is for CUDA"),
        ({"xformers": True, "mem_eff": True}, "cpu", "--mem_eff_attn is for CUDA"),
        ({"xformers": True, "mem_eff": False}, "cuda", "--xformers can't run here ("),
        ({"xformers": False, "mem_eff": True}, "cuda", "--mem_eff_attn can't run here ("),
    ],
)
def test_what_can_not_run_is_torch_s_attention_and_one_line(
    tiny_models: Callable[[str], Path],
    flags: dict[str, bool],
    device: str,
    said: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    unet = load_unet(tiny_models("sd1"))
    processors = set(map(type, unet.attn_processors.values()))
    chosen = choose_attention(unet, **flags, device=torch.device(device), dtype=torch.float32)
    lines = [line for line in capsys.readouterr().err.splitlines() if "attention" in line]
    assert chosen == "torch" and set(map(type, unet.attn_processors.values())) == processors == {AttnProcessor2_0}
    assert lines == [] if said is None else len(lines) == 1 and said in lines[0] and "same result" in lines[0]


def test_the_memory_saving_one_uses_no_other_kernel() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA, which has the kernel")
    attention = Attention(query_dim=8, heads=2, dim_head=4, processor=MemorySavingProcessor())
    with pytest.raises(RuntimeError, match=r"[Nn]o (available|viable)"):
        attention(torch.zeros(1, 3, 8))
