"""Loading: a `ModelInfo` in, a `Model` out."""

from collections.abc import Collection

import torch

from library.errors import UserError
from library.models.inspect import ModelInfo
from library.models.parts import PARTS, Part, load_part
from library.models.sd1 import Model


def load(
    info: ModelInfo,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    clip_skip: int | None = None,
    max_token_length: int | None = None,
    prediction_type: str | None = None,
    parts: Collection[Part] = PARTS,
) -> Model:
    """Read a model's weights into frozen modules.

    Args:
        dtype: of U-Net and text encoder.
        clip_skip: which text layer from the end conditions, None or 1 the last one.
        max_token_length: 75 (None), 150 or 225 words of a caption.
        prediction_type: what a flag says; None takes what the model says.
        parts: without "vae", the VAE is read when it is first needed.

    Raises:
        UserError: a flag contradicts the model, or its weights don't fit its configs.
    """
    layers = int(info.text_encoder_config.get("num_hidden_layers", 12))
    if clip_skip is not None and not 1 <= clip_skip <= layers:
        raise UserError.single("--clip_skip", f"{clip_skip} is not within 1 and {layers}, the text encoder's layers")
    if info.prediction_known and prediction_type not in (None, info.prediction_type):
        wrong = f"{info.path} says that it predicts {info.prediction_type}, not {prediction_type}"
        raise UserError.single("--v_parameterization", wrong, "leave the flag out")
    place = torch.device(device)
    return Model(
        info,
        unet=load_part(info, "unet", device=place, dtype=dtype),
        text_encoder=load_part(info, "text_encoder", device=place, dtype=dtype),
        vae=load_part(info, "vae", device=place, dtype=vae_dtype) if "vae" in parts else None,
        device=place,
        dtype=dtype,
        vae_dtype=vae_dtype,
        clip_skip=clip_skip,
        max_token_length=max_token_length,
        prediction_type=prediction_type or info.prediction_type,
    )
