"""What a run is made of, as far as a resumed run must share it: settings by name, as text. Imports no torch."""

import hashlib
import json

from library.data.fingerprint import contents
from library.data.plan import Plan
from library.models.info import ModelInfo
from library.options import Options
from library.training.learning_rates import LearningRates
from library.training.steps import Clock

PREDICTION = "prediction type"
MAY_CHANGE = (
    *("learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "max_grad_norm"),
    *("noise_offset", "min_snr_gamma", "min_timestep", "max_timestep", "prior_loss_weight", "clip_skip"),
    *("max_token_length", "weighted_captions", "exact_crop_conditioning"),
)


def run_settings(
    options: Options, plan: Plan, model: ModelInfo, clock: Clock, seed: int, rates: LearningRates
) -> dict[str, str]:
    """What a resumed run must share with the one that it goes on from."""
    network, optimizer = options.network, options.optimizer
    shape = {
        "module": network.network_module,
        "dim": network.network_dim,
        "alpha": network.network_alpha,
        "dropout": network.network_dropout,
        "args": sorted(network.network_args or ()),
        "dim_from_weights": str(network.network_weights) if network.dim_from_weights else None,
        "parts": rates.trained,
        "text encoders": [rate != 0 for rate in rates.text_encoders],
    }
    return {
        "seed": str(seed),
        "data": plan.fingerprint(),
        "base model": _model_fingerprint(model),
        PREDICTION: str(model.prediction_type),
        "zero terminal SNR": str(model.zero_terminal_snr),
        "batch size over all processes": "+".join(str(plan.global_batch_size(n)) for n in range(len(plan.datasets))),
        "gradient_accumulation_steps": str(clock.accumulation),
        "network": json.dumps(shape),
        "optimizer": " ".join([optimizer.optimizer_type or "AdamW", *(optimizer.optimizer_args or ())]),
        "mixed_precision": options.model.mixed_precision or "no",
        "latent_sampling": options.caching.latent_sampling,
        "masked_loss": str(options.dataset.masked_loss),
        **({} if options.config.dry_run or options.dataset.debug_dataset else {"pictures": contents(plan)}),
    }


def _model_fingerprint(model: ModelInfo) -> str:
    """Sizes and pieces of the base model's files: tells models apart without reading gigabytes."""
    digest = hashlib.sha256()
    for path in model.files():
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - 65536)):
                file.seek(offset)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]
