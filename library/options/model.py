"""Flags of the base model and of the precision in which it runs."""

from typing import Literal

from library.options.flags import Group, equivalent, honoured, refused

_SDPA = "attention always uses torch's scaled-dot-product kernels"


class Model(Group):
    """Base model"""

    pretrained_model_name_or_path: str | None = honoured(
        None, "the base model (SD1, SD2 or SDXL): a checkpoint file, a diffusers folder or a hub id", metavar="PATH"
    )
    clip_skip: int | None = honoured(
        None,
        "take text from the n-th last layer of the text encoders (default: 1, the last; 2 for SDXL, whose pooled "
        "output always comes from the last)",
        ge=1,
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
    vae: str | None = honoured(
        None,
        "take the VAE from here: a file (a VAE, or a whole model), a diffusers folder or a hub id",
        metavar="PATH",
    )
    text_encoder: str | None = honoured(
        None,
        "take the text encoders from this base model of the same family; for files that hold none",
        metavar="PATH",
    )
    variant: str | None = honoured(
        None,
        "which of a diffusers folder's weights to read, such as fp16 (default: those without a name)",
        metavar="NAME",
    )
    v2: bool = honoured(
        False,
        "the base model is an SD2 model; files show that by themselves, and it is refused where they show another",
    )
    v_parameterization: bool = honoured(
        False,
        "the base model predicts velocity (v); needed where neither the file nor its folder says so, refused where "
        "they say otherwise",
    )
    ignore_model_hash: bool = honoured(
        False, "use a model file although the hash in its own metadata isn't that of its content"
    )
    tokenizer_cache_dir: str | None = equivalent(None, "where tokenizers are kept", "tokenizers come with the package")
    no_half_vae: bool = honoured(False, "keep the VAE in float32 where --mixed_precision would run it in 16 bits")
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
