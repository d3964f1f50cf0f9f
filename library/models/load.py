"""Loading: a `ModelInfo` in, a `Model` of its family out."""

import torch

from library.console import say
from library.models import probe
from library.models.families import FamilyName
from library.models.info import ModelInfo
from library.models.model import Model
from library.models.parts import load_part
from library.models.sd1 import SD1
from library.models.sd2 import SD2
from library.models.sdxl import SDXL

_CLASSES: dict[FamilyName, type[Model]] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def load(
    info: ModelInfo,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    clip_skip: int | None = None,
    max_token_length: int | None = None,
    weighted: bool = False,
    with_unet: bool = True,
    with_text_encoders: bool = True,
    with_vae: bool = True,
    text_encoders_in_ram: bool = False,
) -> Model:
    """Read a model's weights into frozen modules. A prediction type that nobody told is probed, and said in one line.

    Args:
        dtype: of U-Net and text encoders.
        clip_skip: which text layer from the end conditions; None is what the family does by default.
        max_token_length: 75 (None), 150 or 225 words of a caption.
        weighted: brackets in captions weigh words.
        with_unet: without it, nothing can be predicted: for tools that only encode.
        with_text_encoders, with_vae: without them, they are read when they are first needed.
        text_encoders_in_ram: they are read into RAM, and are on the device only while they encode.

    Raises:
        UserError: a flag that the model can't follow, weights that don't fit its configs, or that are no numbers.
    """
    info.check_clip_skip(clip_skip)
    place = torch.device(device)
    model = _CLASSES[info.family_name](
        info,
        unet=load_part(info, "unet", device=place, dtype=dtype) if with_unet else torch.nn.Module(),
        text_encoders=tuple(
            load_part(info, encoder.part, device=place, dtype=dtype)
            for encoder in info.family.text_encoders
            if with_text_encoders and not text_encoders_in_ram
        ),
        vae=load_part(info, "vae", device=place, dtype=vae_dtype) if with_vae else None,
        device=place,
        dtype=dtype,
        vae_dtype=vae_dtype,
        clip_skip=clip_skip,
        max_token_length=max_token_length,
        weighted=weighted,
    )
    if text_encoders_in_ram:
        model.keep_text_encoders_in_ram()
    if info.prediction_type is None and with_unet:
        value = probe.measure(model)
        model.prediction_type = probe.prediction_type(value)
        say(probe.line(value))
    return model
