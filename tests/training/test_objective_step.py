"""One micro-batch through its formulas: what the U-Net is shown, and what its answer is compared with, in float64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from library.conditioning import Conditioning
from library.data.loader import Batch
from library.models.schedule import alphas_cumprod
from library.options.specs import PRESERVE
from library.training.coordinates import Coordinates
from library.training.denoising import Denoising
from library.training.distributed import Processes
from library.training.noise import NoiseSettings, draw_noise, draw_timesteps, finish
from library.training.objective import LossSettings, Objective

CPU = torch.device("cpu")
SHAPE = (3, 4, 6, 5)
AT = Coordinates(11, 2, 4, (0, 1, 2))
ALPHAS = alphas_cumprod({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


class Multiplied:
    """A network whose strength is all that can be seen of it."""

    trains_text_encoder = False
    strength = 1.0

    def set_multiplier(self, multiplier: float) -> None:
        self.strength = multiplier


class Model:
    """Predicts half of what it is shown, and the strength of the network."""

    latent_scale = 0.25

    def __init__(self, network: Multiplied) -> None:
        self.network = network
        self.shown: list[torch.Tensor] = []

    def encode_images(self, pixels: torch.Tensor, *, moments: bool = False) -> torch.Tensor:
        raise AssertionError("latents are given")

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: torch.Tensor
    ) -> torch.Tensor:
        assert len(noisy) == len(timesteps) == len(conditioning) == len(sizes)
        self.shown.append(noisy)
        return 0.5 * noisy + self.network.strength


def batch_of(**more: Any) -> Batch:
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) + 2.0
    count = SHAPE[0]
    fixed = (tuple("abc"), tuple("ABC"), torch.ones(count), torch.zeros(count, 6), latents, None)
    return Batch(2, 4, (40, 48), AT.positions, count, *fixed, **more)


def encode(captions: Sequence[str]) -> Conditioning:
    return Conditioning(torch.zeros(len(captions), 77, 8))


def denoising_of(objective: Objective, settings: NoiseSettings) -> tuple[Model, Denoising]:
    network: Any = Multiplied()
    model = Model(network)
    return model, Denoising(model, encode, network, objective, settings, Processes(0, 1, CPU))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("preserved", [(), (1,), (0, 2)])
def test_the_input_is_perturbed_and_the_target_is_not(kind: str, preserved: tuple[int, ...]) -> None:
    settings = NoiseSettings(noise_offset=0.3, adaptive_noise_scale=0.5, ip_noise_gamma=0.4)
    model, denoising = denoising_of(Objective(ALPHAS, kind, LossSettings("huber", "constant"), CPU), settings)
    masks = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(3))
    attributes = tuple({PRESERVE: index in preserved} for index in range(3))
    batch = batch_of(masks=masks, multiplier=0.75, custom_attributes=attributes)
    losses = denoising.losses(batch, AT)

    assert batch.latents is not None
    scaled = batch.latents * 0.25
    drawn = finish(draw_noise(SHAPE, AT, settings), scaled)
    x, n, shown = (one.double().numpy() for one in (scaled, drawn.target, drawn.input))
    timesteps = draw_timesteps(AT, settings).numpy()
    left = ALPHAS.numpy()[timesteps][:, None, None, None]
    noisy = np.sqrt(left) * x + np.sqrt(1 - left) * shown
    np.testing.assert_allclose(model.shown[-1].double().numpy(), noisy, atol=3e-6)
    target = n if kind == "epsilon" else np.sqrt(left) * n - np.sqrt(1 - left) * x
    for index in preserved:
        target[index] = 0.5 * noisy[index]
    distance = 2 * 0.1 * (np.sqrt((0.5 * noisy + 0.75 - target) ** 2 + 0.1**2) - 0.1)
    expected = (distance * masks.double().numpy()).mean((1, 2, 3))
    np.testing.assert_allclose(losses.double().numpy(), expected, rtol=2e-5)
    assert model.network.strength == 0.75


def test_adaptive_noise_sees_the_latents_that_are_trained() -> None:
    """After the VAE's scale, as in sd-scripts."""
    settings = NoiseSettings(noise_offset=0.1, adaptive_noise_scale=2.0)
    model, denoising = denoising_of(Objective(ALPHAS, "epsilon", LossSettings(), CPU), settings)
    batch = batch_of()
    denoising.losses(batch, AT)
    assert batch.latents is not None
    drawn = draw_noise(SHAPE, AT, settings)
    scaled = batch.latents * 0.25
    timesteps = draw_timesteps(AT, settings)
    right, wrong = (
        denoising.objective.add_noise(scaled, finish(drawn, seen).target, timesteps) for seen in (scaled, batch.latents)
    )
    torch.testing.assert_close(model.shown[0], right)
    assert not torch.allclose(model.shown[0], wrong, atol=1e-2)
