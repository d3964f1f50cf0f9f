"""What a U-Net predicts, found by asking it: of pure noise, one that predicts noise gives that noise back."""

import math

import torch

from library.errors import UserError
from library.models.families import PredictionType
from library.models.model import Model
from library.rng import rng

_THRESHOLD = 0.5
_CELLS = 32


@torch.no_grad()
def measure(model: Model) -> float:
    """How much of unit noise x one forward pass at the last timestep with an empty prompt gives back.

    Returns:
        <out, x> / <x, x>: near 1 where the model predicts noise, near 0 where it predicts velocity, which there is the
        picture turned negative. The same for every call.

    Raises:
        UserError: the model gives no finite numbers.
    """
    config = model.info.unet_config
    cells = min(_CELLS, int(config.get("sample_size") or _CELLS))
    shape = (1, int(config.get("in_channels", 4)), cells, cells)
    noise = torch.from_numpy(rng(0, "noise", "probe").standard_normal(shape, dtype="float32")).to(model.device)
    timestep = torch.tensor([len(model.alphas_cumprod) - 1])
    output = model.predict(noise, timestep, model.encode_prompts([""]))
    value = float((output * noise).sum() / noise.square().sum())
    if not math.isfinite(value):
        name = str(model.dtype).removeprefix("torch.")
        wrong = f"{model.info.name} gives no finite numbers in {name}, for an empty prompt and pure noise"
        raise UserError.single("--mixed_precision", wrong, "use bf16 or no, or another base model")
    return value


def prediction_type(value: float) -> PredictionType:
    """What a value of `measure` tells."""
    return "v_prediction" if value < _THRESHOLD else "epsilon"


def line(value: float) -> str:
    """The one line that says so."""
    told = {"epsilon": "noise", "v_prediction": "velocity"}[prediction_type(value)]
    return (
        f"no evidence and no --v_parameterization; one forward pass gave {value:.2f} (noise 1, velocity 0): "
        f"it predicts {told}"
    )
