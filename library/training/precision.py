"""From options to how a loaded model computes: attention, frozen weights in 8 bits, compiled blocks; and in which
dtype what is trained is kept. In which dtype the model itself is read: training.loading.
"""

import torch

from library.console import say
from library.models.attention import choose_attention
from library.models.compiling import CompileTimes
from library.models.model import Model
from library.options import Options


def settle_model(options: Options, model: Model) -> None:
    """Attention and 8-bit weights, said in one line each where something is to be said. After weights were merged into
    the model (`--base_weights`), before a network is put on it."""
    flags = options.model
    choose_attention(
        model.unet, xformers=flags.xformers, mem_eff=flags.mem_eff_attn, device=model.device, dtype=model.dtype
    )
    if flags.fp8_base or flags.fp8_base_unet:
        saved = model.store_in_fp8(unet=True, text_encoders=flags.fp8_base)
        say(f"fp8: the frozen weights take {saved / 2**20:.0f} MB less")


def compile_model(options: Options, model: Model) -> CompileTimes | None:
    """With `--torch_compile`, compile the U-Net's blocks; what this gives tells how long it took. For a model that has
    its network and its checkpointing already."""
    if not options.model.torch_compile:
        return None
    times = CompileTimes()
    count = model.compile_unet(options.model.dynamo_backend)
    say(
        f"{count} blocks are compiled by {options.model.dynamo_backend} when they first see a size of pictures or of "
        "batches: these steps take long"
    )
    return times


def trained_dtype(options: Options) -> torch.dtype:
    """In what the parameters that are trained are kept: float32, or 16 bits with `--full_fp16` and `--full_bf16`."""
    if options.model.full_bf16:
        return torch.bfloat16
    return torch.float16 if options.model.full_fp16 else torch.float32
