"""Loads a model into bfloat16, takes one step at 256 px, and lets VAE and text encoders go:
`python tests/full_size_step.py FILE ANSWER.json`.

Writes seconds and peak memory of load and step, in bytes beyond what was held before, and what letting go gave back.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from library.conditioning import Conditioning
from library.models.inspect import inspect
from library.models.load import load
from tests.memory import Peak, anonymous


def main() -> None:
    """Measure."""
    info = inspect(sys.argv[1])
    info = replace(info, prediction_type=info.prediction_type or "v_prediction")
    with Peak() as loading:
        start = time.perf_counter()
        model = load(info, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
        load_seconds = time.perf_counter() - start
    modules = (model.unet, model.reload_vae(), *model.text_encoders)
    held = sum(value.nbytes for module in modules for value in module.parameters())
    with Peak() as stepping:
        start = time.perf_counter()
        text = model.encode_prompts(["a photo of a cat"])
        states = text.states.detach().requires_grad_()
        latents = model.encode_images(torch.rand(1, 3, 256, 256) * 2 - 1) * model.latent_scale
        output = model.predict(latents, torch.tensor([500]), Conditioning(states, text.pooled))
        output.square().mean().backward()
        step_seconds = time.perf_counter() - start
    let_go = sum(value.nbytes for module in modules[1:] for value in module.parameters())
    del modules
    before = anonymous()
    model.release_vae()
    model.release_text_encoders()
    given_back = before - anonymous()
    finite = bool(output.isfinite().all()) and states.grad is not None and bool(states.grad.isfinite().all())
    values = {
        "family": model.family.name,
        "held": held,
        "load_seconds": load_seconds,
        "load_peak": loading.grown,
        "step_seconds": step_seconds,
        "step_peak": stepping.grown,
        "finite": finite,
        "let_go": let_go,
        "given_back": given_back,
    }
    Path(sys.argv[2]).write_text(json.dumps(values))


if __name__ == "__main__":
    main()
