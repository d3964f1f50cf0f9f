"""From options to a model in the precision that they ask for: all of it, or only the parts that a tool needs."""

import os

import torch

from library.console import say
from library.errors import UserError
from library.models.compiling import check_backend
from library.models.info import ModelInfo
from library.models.load import load
from library.models.model import Model
from library.options import Options
from library.training.distributed import Processes

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(options: Options, processes: Processes) -> torch.dtype:
    """The dtype of the frozen parts.

    Raises:
        UserError: float16 on a CPU, where a step takes hundreds of times as long.
    """
    precision = options.model.mixed_precision or "no"
    if precision == "fp16" and processes.device.type == "cpu":
        raise UserError.single("--mixed_precision", "fp16 is hundreds of times slower on a CPU", "use bf16 or no")
    if options.model.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return _DTYPES[precision]


def load_model(
    options: Options,
    info: ModelInfo,
    processes: Processes,
    *,
    with_unet: bool = True,
    with_text_encoders: bool = True,
    with_vae: bool = True,
    trains_text_encoders: bool = True,
) -> Model:
    """The base model; a VAE that overflows in float16 computes in float32 there.

    Args:
        trains_text_encoders: they stay on the device whatever `--offload_text_encoders` says.

    Raises:
        UserError: weights that don't fit, a precision that the device lacks, or a compiler that isn't here.
    """
    dtype = compute_dtype(options, processes)
    if options.model.torch_compile and with_unet:
        check_backend(options.model.dynamo_backend, processes.device)
    in_ram = options.model.offload_text_encoders and not trains_text_encoders
    if options.model.offload_text_encoders and trains_text_encoders and with_unet:
        say("--offload_text_encoders: text encoders that are trained stay where they compute")
    fragile = dtype == torch.float16 and info.vae_fragile
    return load(
        info,
        device=processes.device,
        dtype=dtype,
        vae_dtype=torch.float32 if options.model.no_half_vae or fragile else dtype,
        clip_skip=options.model.clip_skip,
        max_token_length=options.model.max_token_length,
        weighted=options.dataset.weighted_captions,
        with_unet=with_unet,
        with_text_encoders=with_text_encoders,
        with_vae=with_vae,
        text_encoders_in_ram=in_ram,
    )
