"""Flags of the base model and of the precision in which it runs."""

from typing import Literal

from library.options.flags import Group, equivalent, honoured, refused

_SDPA = "attention always uses torch's scaled-dot-product kernels"
_READ = "only SD1 models that predict noise are supported yet; what a model is, is read from its checkpoint"


class Model(Group):
    """Base model"""

    pretrained_model_name_or_path: str | None = honoured(
        None, "the base model: a .safetensors checkpoint or a diffusers folder", metavar="PATH"
    )
    clip_skip: int | None = honoured(
        None, "take the text encoder's output n layers before its end (1 = the last layer, the default)", ge=1
    )
    max_token_length: Literal[150, 225] | None = honoured(
        None, "tokens per caption, in rows of 75; longer captions are cut (default: 75)", synonyms={75: None}
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = honoured(
        "no", "precision of the frozen model and of the computation; what is trained stays in float32"
    )
    gradient_checkpointing: bool = honoured(
        False, "keep less in memory and compute it again when it is needed (slower)"
    )
    deterministic: bool = honoured(False, "on CUDA, use only kernels that give the same bits every time (slower)")
    vae: str | None = refused(
        None, "another VAE", "the base model's own VAE is used; convert the model with the other one"
    )
    v2: bool = refused(False, "the base model is of the SD2 family", _READ)
    v_parameterization: bool = refused(False, "the base model predicts v", _READ)
    tokenizer_cache_dir: str | None = equivalent(None, "where tokenizers are kept", "tokenizers come with the package")
    no_half_vae: bool = honoured(False, "keep the VAE in float32 where --mixed_precision bf16 would run it in bfloat16")
    sdpa: bool = equivalent(False, "use scaled-dot-product attention", _SDPA)
    xformers: bool = equivalent(False, "use xformers' attention", _SDPA)
    mem_eff_attn: bool = equivalent(False, "use memory-saving attention", _SDPA)
    lowram: bool = equivalent(False, "load the model straight to the GPU", "weights go to the device tensor by tensor")
    highvram: bool = equivalent(False, "don't empty the GPU's cache", "the GPU's cache is not emptied between batches")
    disable_mmap_load_safetensors: bool = equivalent(
        False, "read files instead of mapping them", "files are read, never mapped"
    )
    full_fp16: bool = refused(False, "train in fp16", "what is trained stays in float32; use --mixed_precision fp16")
    full_bf16: bool = refused(False, "train in bf16", "what is trained stays in float32; use --mixed_precision bf16")
    fp8_base: bool = refused(False, "hold the base model in fp8", "not supported yet; use --mixed_precision bf16")
    fp8_base_unet: bool = refused(False, "hold the U-Net in fp8", "not supported yet; use --mixed_precision bf16")
    cpu_offload_checkpointing: bool = refused(
        False,
        "keep checkpointed activations in RAM",
        "Stable Diffusion U-Nets have no such mode; use --gradient_checkpointing",
    )
    torch_compile: bool = refused(False, "compile the model", "not supported yet; leave it out")
    dynamo_backend: Literal[
        "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs",
        "ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm",
    ] = refused("inductor", "compiler of --torch_compile", "not supported yet; leave it out", needs="torch_compile",
                synonyms={"no": "inductor"})  # fmt: skip
