"""Flags of the base model and of the precision in which it runs."""

from typing import Literal

from library.options.flags import Group, equivalent, honoured, refused

_SDPA = "attention uses torch's scaled-dot-product kernels anyway"
_OLD_COMPILERS = ("aot_ts_nvfuser", "nvprims_nvfuser", "ofi", "fx2trt", "tensort")


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
    gradient_checkpointing_every: int = honoured(
        1,
        "with --gradient_checkpointing, only every n-th block: faster, and more memory",
        ge=1,
        needs="gradient_checkpointing",
    )
    gradient_checkpointing_attention_only: bool = honoured(
        False,
        "with --gradient_checkpointing, only the attention blocks, which need the most",
        needs="gradient_checkpointing",
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
    xformers: bool = honoured(
        False, "use xformers' attention; where it can't run, torch's, which gives the same result"
    )
    mem_eff_attn: bool = honoured(
        False, "use only torch's memory-saving attention kernel on CUDA (wins over --xformers)"
    )
    lowram: bool = equivalent(False, "load the model straight to the GPU", "weights go to the device tensor by tensor")
    highvram: bool = equivalent(False, "don't empty the GPU's cache", "the GPU's cache is not emptied between batches")
    disable_mmap_load_safetensors: bool = equivalent(
        False, "read files instead of mapping them", "files are read, never mapped"
    )
    full_fp16: bool = honoured(False, "what is trained is kept in fp16, too; needs --mixed_precision fp16")
    full_bf16: bool = honoured(
        False, "what is trained is kept in bf16, too, rounded stochastically; needs --mixed_precision bf16"
    )
    fp8_base: bool = honoured(
        False, "keep the frozen weights of U-Net and text encoders in fp8; needs --mixed_precision bf16 or fp16"
    )
    fp8_base_unet: bool = honoured(False, "the same for the U-Net only")
    offload_text_encoders: bool = honoured(
        False, "keep text encoders that aren't trained in RAM, and on the GPU only while they encode"
    )
    offload_during_sampling: bool = honoured(
        False, "move to RAM what a preview doesn't need, while it is drawn: optimizer state, and what has done its part"
    )
    cpu_offload_checkpointing: bool = refused(
        False,
        "keep checkpointed activations in RAM",
        "Stable Diffusion U-Nets have no such mode; use --gradient_checkpointing",
    )
    torch_compile: bool = honoured(
        False, "compile the U-Net's blocks: the first steps take minutes, all others less time"
    )
    dynamo_backend: Literal[
        "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs",
        "ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm",
    ] = honoured("inductor", "compiler of --torch_compile", synonyms={"no": "inductor"}, needs="torch_compile",
                 refuse=dict.fromkeys(_OLD_COMPILERS, "torch has no such compiler any more; use inductor"))  # fmt: skip
