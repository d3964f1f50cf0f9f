"""What a run is made of, as far as a resumed run must share it: settings by name, as text. Imports no torch.

Every honoured flag of the groups in `CLASSIFIED` is of one of three kinds: it must be equal, it may change with a line,
or it changes nothing about what is learned. Flags of other groups (files, logs, previews) are of the third kind.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from library.data.fingerprint import contents
from library.data.plan import Plan
from library.models.info import ModelInfo
from library.options import Options
from library.options.optimizer_checks import chosen_optimizer
from library.training.embedding_plan import EmbeddingPlan, PlannedToken
from library.training.learning_rates import LearningRates
from library.training.steps import Clock

PREDICTION = "prediction type"
EMBEDDINGS = "embeddings"
NO_EMBEDDINGS = "{}"
"""That setting of a run without any, and of one that was started before there were any."""
TOTAL = "total steps"
"""Isn't among the settings: `state.schedule_total` looks at it, and takes --resume_schedule for an answer."""
CLASSIFIED = ("model", "network", "embeddings", "training", "optimizer", "loss", "dataset", "caching")

_PLACES = ("train_data_dir", "reg_data_dir", "dataset_config", "in_json", "conditioning_data_dir", "dataset_class")
_OF_DATA = (
    *_PLACES,
    *("dataset_repeats", "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"),
    *("bucket_no_upscale", "resize_interpolation", "shuffle_caption", "caption_separator", "caption_extension"),
    *("caption_extention", "keep_tokens", "keep_tokens_separator", "secondary_separator", "enable_wildcard"),
    *("caption_prefix", "caption_suffix", "caption_dropout_rate", "caption_dropout_every_n_epochs"),
    *("caption_tag_dropout_rate", "flip_aug", "random_crop", "recursive", "caption_from", "shuffle_caption_delimiter"),
    *("caption_preset", "caption_templates", "keep_original_captions", "token_warmup_min", "token_warmup_step"),
    *("color_aug", "face_crop_aug_range", "aspect_ratio_buckets", "bucket_choice", "more_resolutions"),
    *("max_crop_loss", "skip_small_images", "skip_bad_images", "alpha_mask", "validation_split", "validation_seed"),
    *("use_object_template", "use_style_template"),
)

MUST_BE_EQUAL: Mapping[str, str] = {
    **dict.fromkeys(_OF_DATA, "data"),
    "train_batch_size": "batch size over all processes",
    "masked_loss": "masked_loss",
    "latent_sampling": "latent_sampling",
    **dict.fromkeys(("pretrained_model_name_or_path", "vae", "text_encoder", "variant", "v2"), "base model"),
    "v_parameterization": PREDICTION,
    "zero_terminal_snr": "zero terminal SNR",
    **dict.fromkeys(("mixed_precision", "full_fp16", "full_bf16", "fp8_base", "fp8_base_unet"), "precision"),
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "seed": "seed",
    "max_train_steps": TOTAL,
    "max_train_epochs": TOTAL,
    **dict.fromkeys(("network_module", "network_dim", "network_alpha", "network_dropout", "network_args"), "network"),
    **dict.fromkeys(("dim_from_weights", "network_train_unet_only", "network_train_text_encoder_only"), "network"),
    **dict.fromkeys(("base_weights", "base_weights_multiplier"), "base weights"),
    **dict.fromkeys(("token_string", "num_vectors_per_token", "base_embeddings", "embedding_norm"), EMBEDDINGS),
    **dict.fromkeys(("optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer"), "optimizer"),
    "lr_scheduler_type": "lr_scheduler_type",
}
"""Flags by the setting in which they stand."""

MAY_CHANGE = (
    *("learning_rate", "unet_lr", "text_encoder_lr", "embedding_lr", "max_grad_norm"),
    *("lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power"),
    *("lr_scheduler_timescale", "lr_scheduler_min_lr_ratio", "lr_scheduler_args"),
    *("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations"),
    *("multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength", "min_timestep", "max_timestep"),
    *("loss_type", "huber_schedule", "huber_c", "huber_scale", "min_snr_gamma", "prior_loss_weight"),
    *("legacy_ztsnr_weights", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss"),
    *("masked_loss_normalize", "scale_weight_norms", "stop_text_encoder_training"),
    *("clip_skip", "max_token_length", "weighted_captions", "exact_crop_conditioning"),
    *("no_half_vae", "xformers", "mem_eff_attn", "torch_compile", "dynamo_backend", "deterministic"),
    *("max_validation_steps", "early_stopping_patience", "ti_train_steps_ratio"),
)
"""Flags that a resumed run may have otherwise, which is then said in a line."""

IRRELEVANT = (
    *("gradient_checkpointing", "gradient_checkpointing_every", "gradient_checkpointing_attention_only"),
    *("offload_text_encoders", "offload_during_sampling", "ignore_model_hash"),
    *("network_weights", "resume", "resume_schedule", "initial_epoch", "initial_step", "ignore_memory_check"),
    *("list_optimizers", "max_data_loader_n_workers", "verify_images", "keep_in_memory", "debug_dataset"),
    *("validate_every_n_steps", "validate_every_n_epochs", "cache_latents", "cache_latents_to_disk"),
    *("vae_batch_size", "trust_foreign_caches", "skip_cache_check", "cache_text_encoder_outputs"),
    *("cache_text_encoder_outputs_to_disk", "text_memo_mb", "scale_lr", "no_scale_lr"),
    *("init_word", "initial_phrase", "weights", "save_embedding_as"),
)
"""Flags of the same result. Of `network_weights` the state holds what became of them; with `dim_from_weights` their
shape counts. The same goes for what vectors start from. What `scale_lr` makes of learning rates shows in them."""


def run_settings(
    options: Options,
    plan: Plan,
    model: ModelInfo,
    clock: Clock,
    seed: int,
    rates: LearningRates,
    embeddings: EmbeddingPlan | None,
) -> dict[str, str]:
    """What a resumed run must share with the one that it goes on from."""
    return {
        "seed": str(seed),
        "data": plan.fingerprint(),
        "base model": files_fingerprint(model.files()),
        "base weights": _base_weights(options),
        PREDICTION: str(model.prediction_type),
        "zero terminal SNR": str(model.zero_terminal_snr),
        "batch size over all processes": "+".join(str(plan.global_batch_size(n)) for n in range(len(plan.datasets))),
        "gradient_accumulation_steps": str(clock.accumulation),
        "network": json.dumps(_network(options, rates)),
        EMBEDDINGS: json.dumps(_embeddings(embeddings)),
        "optimizer": " ".join([chosen_optimizer(options), *sorted(options.optimizer.optimizer_args or ())]),
        "lr_scheduler_type": _stateful_schedule(options),
        "precision": _precision(options),
        "latent_sampling": options.caching.latent_sampling,
        "masked_loss": str(options.dataset.masked_loss),
        **({} if options.config.dry_run or options.dataset.debug_dataset else {"pictures": contents(plan)}),
    }


def _network(options: Options, rates: LearningRates) -> dict[str, object]:
    """The shape of the network, and which parts it has; nothing without one."""
    network = options.network
    if network.network_module is None:
        return {"module": None}
    weights = network.network_weights if network.dim_from_weights else None
    return {
        "module": network.network_module,
        "dim": network.network_dim,
        "alpha": network.network_alpha,
        "dropout": network.network_dropout,
        "args": sorted(options.network_arguments().items()),
        "dim_from_weights": files_fingerprint([weights]) if weights else None,
        "parts": rates.trained,
        "text encoders": [rate != 0 for rate in rates.text_encoders],
    }


def _embeddings(plan: EmbeddingPlan | None) -> dict[str, object]:
    """The new tokens with their numbers of vectors, the files of frozen ones, and the norm rule of trained ones."""
    if plan is None:
        return {}
    found: dict[str, object] = {
        f"base_embeddings {one.token.text}": files_fingerprint([one.file] if one.file else []) for one in plan.base
    }
    if plan.trains:
        found["token_string"] = [_counted(one) for one in plan.trained]
        found["embedding_norm"] = plan.norm
    return found


def _counted(one: PlannedToken) -> str:
    vectors = one.token.vectors
    return f"{one.token.text} ({vectors} vector{'s' if vectors > 1 else ''})"


def _base_weights(options: Options) -> str:
    """The files that are merged into the base model first, each with its strength."""
    files = [Path(file) for file in options.network.base_weights or ()]
    strengths = options.network.base_weights_multiplier or ()
    padded = [*strengths, *(1.0 for _ in files[len(strengths) :])]
    return " ".join(f"{files_fingerprint([file])}*{strength}" for file, strength in zip(files, padded, strict=False))


def _precision(options: Options) -> str:
    """In what the model computes, and what is kept in fewer bits than that."""
    flags = options.model
    kept = ("full_fp16", "full_bf16", "fp8_base", "fp8_base_unet")
    return " ".join([flags.mixed_precision or "no", *(name for name in kept if getattr(flags, name))])


def _stateful_schedule(options: Options) -> str:
    """The class of a schedule that has a state of its own, with what that state is made of: it fits no other."""
    flags = options.optimizer
    if not flags.lr_scheduler_type:
        return "none"
    rates: list[object] = [flags.learning_rate, flags.unet_lr, flags.text_encoder_lr]
    if options.embeddings.embedding_lr is not None:
        rates.append(options.embeddings.embedding_lr)
    return " ".join([flags.lr_scheduler_type, *(flags.lr_scheduler_args or ()), f"learning rates {rates}"])


def files_fingerprint(files: Iterable[Path]) -> str:
    """Names, sizes and pieces of weight files: tells models apart without reading gigabytes.

    Raises:
        OSError: a file can't be read.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - 65536)):
                file.seek(offset)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]
