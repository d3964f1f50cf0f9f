"""What must hold between the flags of precision, memory and speed; known without torch and without the model.

What depends on the device (xformers, compilers, float16 on a CPU that nobody named) is found out where it is used.
"""

import os
from collections.abc import Iterator, Mapping

from library.errors import Problem
from library.options.modules import find_module
from library.options.registry import Options

_NEEDS = {
    "full_fp16": ("fp16",),
    "full_bf16": ("bf16",),
    "fp8_base": ("bf16", "fp16"),
    "fp8_base_unet": ("bf16", "fp16"),
}
_COMPILERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "tvm": (("tvm", "pip install apache-tvm"),),
    "onnxrt": (
        ("torch.onnx._internal.onnxruntime", ""),
        ("onnxruntime", "pip install onnxruntime-training"),
        ("onnxscript", "pip install onnxscript"),
    ),
    "ipex": (("intel_extension_for_pytorch", "pip install intel-extension-for-pytorch"),),
}
"""What compilers need beside torch: a module, and how to get it; torch's own module where torch may lack it."""


def problems(options: Options) -> Iterator[Problem]:
    """What can't be run."""
    flags = options.model
    if flags.full_fp16 and flags.full_bf16:
        yield Problem(options.where("full_bf16"), "can't be combined with --full_fp16", "choose one")
    for name, allowed in _NEEDS.items():
        if getattr(flags, name) and flags.mixed_precision not in allowed:
            wanted = " or ".join(allowed)
            yield Problem(options.where(name), f"needs --mixed_precision {wanted}, not {flags.mixed_precision}")
    yield from _compiler(options)
    if flags.mixed_precision == "fp16" and told_cpu():
        wrong = "fp16 is hundreds of times slower on a CPU"
        yield Problem(options.where("mixed_precision"), wrong, "use bf16 or no")
    module = options.network.network_module
    if module is not None and not module.startswith("networks."):
        for name in ("fp8_base", "fp8_base_unet"):
            if getattr(flags, name):
                wrong = f"{module} computes with the frozen weights itself, and can't with 8-bit ones"
                yield Problem(options.where(name), wrong, "leave it out, or use a module of networks.")


def notices(options: Options) -> Iterator[str]:
    """What has no effect, in one line each."""
    flags = options.model
    if flags.mem_eff_attn and flags.xformers:
        yield "--xformers: has no effect with --mem_eff_attn, which wins"
    if flags.fp8_base and flags.fp8_base_unet:
        yield "--fp8_base_unet: has no effect with --fp8_base, which includes the U-Net"
    if told_cpu():
        for name in ("offload_text_encoders", "offload_during_sampling"):
            if getattr(flags, name):
                yield f"--{name}: has no effect on a CPU, where everything is in main memory"


def _compiler(options: Options) -> Iterator[Problem]:
    """What the compiler of `--torch_compile` lacks."""
    backend = options.model.dynamo_backend
    if not options.model.torch_compile:
        return
    for module, install in _COMPILERS.get(backend, ()):
        if find_module(module) is not None:
            wrong = f"{backend} needs {module}, which isn't installed" if install else f"this torch has no {backend}"
            yield Problem(options.where("dynamo_backend"), wrong, f"{install}, or use inductor".removeprefix(", or "))
            return


def told_cpu() -> bool:
    """Whether the launcher was told to use the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
