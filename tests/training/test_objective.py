"""Noisy latents, targets, distances and loss weights against their formulas in float64."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr

from library.models.schedule import alphas_cumprod
from library.options.training import Loss
from library.training.objective import LossSettings, Objective, huber_table, weight_table

VECTORS = json.loads((Path(__file__).parents[1] / "data/vectors/loss_weights.json").read_text())
STEPS = VECTORS["timesteps"]
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CPU = torch.device("cpu")
KINDS = ("epsilon", "v_prediction")


def schedule(zero_terminal: bool = False) -> np.ndarray:
    """Stable Diffusion's share of signal by timestep, float64, written out from the papers' formulas."""
    left = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if zero_terminal:
        roots = np.sqrt(left)
        left = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return left


PLAIN, ZERO = torch.from_numpy(schedule()), torch.from_numpy(schedule(True))


def reference_weight(abar: float, kind: str, settings: LossSettings) -> float:
    """The weight of one timestep in python floats; where SNR is 0, the limits that are written beside."""
    snr, factor = abar / (1 - abar), 1.0
    cap = min(snr, 1000.0)
    if settings.min_snr_gamma:
        if kind == "v_prediction":
            factor *= min(snr, settings.min_snr_gamma) / (snr + 1)
        else:
            factor *= min(snr, settings.min_snr_gamma) / snr if snr else 1.0  # min(1, g / SNR)
    if settings.scale_v_pred_loss_like_noise_pred:
        factor *= cap / (cap + 1)
    if settings.v_pred_like_loss:
        floor = max(cap, 1e-4)
        factor += factor * settings.v_pred_like_loss / (floor / (floor + 1))
    if settings.debiased_estimation_loss:
        factor *= 1 / (cap + 1) if kind == "v_prediction" else 1 / math.sqrt(max(cap, 1e-4))
    return factor


def reference_c(abar: float, timestep: int, settings: LossSettings) -> float:
    """The parameter of huber and smooth_l1 at one timestep."""
    c, scale = settings.huber_c, settings.huber_scale
    if settings.huber_schedule == "constant":
        return c * scale
    if settings.huber_schedule == "exponential":
        return math.exp(math.log(c) * timestep / 1000) * scale
    sigma = math.sqrt((1 - abar) / abar) if abar else math.inf
    return (1 - c) / (1 + sigma) ** 2 + c


@pytest.mark.parametrize(
    ("kind", "settings", "column"),
    [
        ("epsilon", {"min_snr_gamma": 5.0}, "min_snr_5_eps"),
        ("v_prediction", {"min_snr_gamma": 5.0}, "min_snr_5_v"),
        ("epsilon", {"debiased_estimation_loss": True}, "debiased_eps"),
        ("v_prediction", {"debiased_estimation_loss": True}, "debiased_v"),
        ("v_prediction", {"scale_v_pred_loss_like_noise_pred": True}, "scale_v_pred_like_noise_pred"),
        ("epsilon", {"v_pred_like_loss": 0.5}, "v_pred_like_0.5"),
    ],
)
def test_weights_are_those_of_sd_scripts(kind: str, settings: dict[str, Any], column: str) -> None:
    expected = pytest.approx(VECTORS[column], rel=1e-4)
    assert Objective(PLAIN, kind, LossSettings(**settings), CPU).weights[STEPS].numpy() == expected
    legacy = LossSettings(**settings, legacy_ztsnr_weights=True)
    assert Objective(ZERO, kind, legacy, CPU, alphas_before=PLAIN).weights[STEPS].numpy() == expected


@pytest.mark.parametrize("name", ["constant", "exponential", "snr"])
def test_huber_parameters_are_those_of_sd_scripts(name: Any) -> None:
    table = huber_table(PLAIN, LossSettings(huber_schedule=name))
    assert table[STEPS].numpy() == pytest.approx(VECTORS[f"huber_c_{name}"], rel=1e-5)


def test_the_schedule_is_that_of_diffusers() -> None:
    theirs = DDPMScheduler(**SCHEDULE)
    ours = alphas_cumprod(SCHEDULE)
    assert torch.allclose(ours, theirs.alphas_cumprod.double(), rtol=1e-4)
    rescaled = DDPMScheduler(**SCHEDULE, rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert torch.allclose(alphas_cumprod({**SCHEDULE, "rescale_betas_zero_snr": True}), rescaled, rtol=1e-3, atol=1e-7)
    timesteps = torch.tensor([0, 20, 500, 999])
    snr = ours[timesteps] / (1 - ours[timesteps])
    assert torch.allclose(snr, compute_snr(theirs, timesteps).double(), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_noising_and_targets_are_those_of_diffusers(kind: str) -> None:
    theirs = DDPMScheduler(**SCHEDULE, prediction_type=kind)
    objective = Objective(alphas_cumprod(SCHEDULE), kind, LossSettings(), CPU)
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(3, 4, 6, 5, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        objective.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps), rtol=0, atol=2e-5
    )
    ours = objective.target(latents, noise, timesteps)
    if kind == "epsilon":
        assert ours is noise
    else:
        torch.testing.assert_close(ours, theirs.get_velocity(latents, noise, timesteps), rtol=0, atol=2e-5)


def weightings() -> list[tuple[str, dict[str, Any]]]:
    """Every set of weightings that the flags allow for a kind of prediction."""
    found = []
    for kind, gamma, debiased, own in product(KINDS, (None, 1.0, 5.0), (False, True), (False, True)):
        flags = {"min_snr_gamma": gamma, "debiased_estimation_loss": debiased}
        if kind == "v_prediction":
            flags["scale_v_pred_loss_like_noise_pred"] = own
        else:
            flags["v_pred_like_loss"] = 0.5 if own else None
        found.append((kind, flags))
    return found


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize(("kind", "flags"), weightings())
def test_weights_stack_as_their_formulas_in_float64(kind: str, flags: dict[str, Any], zero_terminal: bool) -> None:
    settings, table = LossSettings(**flags), ZERO if zero_terminal else PLAIN
    expected = [reference_weight(float(abar), kind, settings) for abar in table]
    ours = weight_table(table, kind == "v_prediction", settings)
    assert ours.dtype == torch.float64 and torch.isfinite(ours).all()
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-300)


def test_at_no_signal_the_weights_are_finite() -> None:
    """min(SNR, g) / SNR is 1 where the SNR is 0, and min(SNR, g) / (SNR + 1) is 0."""
    assert ZERO[-1] == 0

    def last(kind: str, **flags: Any) -> float:
        return float(Objective(ZERO, kind, LossSettings(**flags), CPU).weights[-1])

    assert last("epsilon", min_snr_gamma=5.0) == 1
    assert last("v_prediction", min_snr_gamma=5.0) == 0
    assert last("epsilon", debiased_estimation_loss=True) == pytest.approx(100)
    assert last("v_prediction", debiased_estimation_loss=True) == 1
    assert last("epsilon", v_pred_like_loss=0.5) == pytest.approx(1 + 0.5 * 1.0001 / 1e-4)
    assert last("v_prediction", scale_v_pred_loss_like_noise_pred=True) == 0
    for name in ("constant", "exponential", "snr"):
        assert torch.isfinite(huber_table(ZERO, LossSettings(huber_schedule=name))).all()


def test_weights_follow_the_schedule_after_the_rescaling_unless_told() -> None:
    after = LossSettings(min_snr_gamma=5.0)
    legacy = LossSettings(min_snr_gamma=5.0, legacy_ztsnr_weights=True)
    weights = [
        Objective(ZERO, "v_prediction", settings, CPU, alphas_before=PLAIN).weights for settings in (after, legacy)
    ]
    assert torch.equal(weights[0], Objective(ZERO, "v_prediction", after, CPU).weights)
    assert torch.equal(weights[1], Objective(PLAIN, "v_prediction", after, CPU).weights)
    assert not torch.equal(weights[0], weights[1])
    legacy_noise = Objective(ZERO, "v_prediction", legacy, CPU, alphas_before=PLAIN)
    x, n, last = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0), torch.tensor([999])
    assert torch.equal(legacy_noise.add_noise(x, n, last), n), "noising itself is rescaled all the same"
    plain = LossSettings(loss_type="huber", legacy_ztsnr_weights=True)
    errors = [
        float(Objective(ZERO, "epsilon", plain, CPU, alphas_before=before).losses(x, n, last))
        for before in (PLAIN, None)
    ]
    assert errors[0] == errors[1], "huber's parameter is of the schedule that is trained, as in sd-scripts"


def distance(d: np.ndarray, c: Any, loss_type: str) -> np.ndarray:
    """Of each element, as the formulas stand."""
    if loss_type == "l2":
        return d**2
    if loss_type == "l1":
        return abs(d)
    bent = 2 * (np.sqrt(d**2 + c**2) - c)
    return bent * c if loss_type == "huber" else bent


LOSSES = [
    ("l2", "snr"),
    ("l1", "snr"),
    *((kind, name) for kind in ("huber", "smooth_l1") for name in ("constant", "exponential", "snr")),
]


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("masked", ["no", "mean", "area"])
@pytest.mark.parametrize(("loss_type", "huber_schedule"), LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_loss_is_its_formula_in_float64(
    kind: str, loss_type: Any, huber_schedule: Any, masked: str, zero_terminal: bool
) -> None:
    """A stub predictor, 0.5 x + t / 1000, through noising, target, distance, mask and weights; SNR 0 included."""
    settings = LossSettings(
        loss_type,
        huber_schedule,
        huber_c=0.2,
        huber_scale=1.5,
        min_snr_gamma=5.0,
        debiased_estimation_loss=kind == "epsilon",
        masked_loss_normalize=masked == "area",
    )
    table = alphas_cumprod({**SCHEDULE, "rescale_betas_zero_snr": zero_terminal})
    objective = Objective(table, kind, settings, CPU)
    generator = np.random.default_rng(5)
    latents, noise = generator.standard_normal((2, 6, 4, 3, 5))
    masks = generator.uniform(size=(6, 1, 3, 5)) * (generator.uniform(size=(6, 1, 3, 5)) < 0.6)
    timesteps = np.array([0, 1, 250, 700, 998, 999])

    left = schedule(zero_terminal)[timesteps]
    signal, sigma = (np.sqrt(one)[:, None, None, None] for one in (left, 1 - left))
    noisy = signal * latents + sigma * noise
    target = noise if kind == "epsilon" else signal * noise - sigma * latents
    predicted = 0.5 * noisy + timesteps[:, None, None, None] / 1000
    c = np.array([reference_c(abar, int(t), settings) for abar, t in zip(left, timesteps, strict=True)])
    distances = distance(predicted - target, c[:, None, None, None], loss_type)
    if masked == "mean":
        expected = (distances * masks).mean((1, 2, 3))
    elif masked == "area":
        expected = (distances * masks).sum((1, 2, 3)) / (4 * masks.sum((1, 2, 3)))
    else:
        expected = distances.mean((1, 2, 3))
    expected = expected * [reference_weight(float(abar), kind, settings) for abar in left]

    x, n, m = (torch.from_numpy(one).float() for one in (latents, noise, masks))
    t = torch.from_numpy(timesteps)
    ours = objective.add_noise(x, n, t)
    stub = 0.5 * ours + t.view(-1, 1, 1, 1) / 1000
    losses = objective.losses(stub, objective.target(x, n, t), t, None if masked == "no" else m)
    assert losses.dtype == torch.float32 and torch.isfinite(losses).all()
    np.testing.assert_allclose(losses.double().numpy(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3, 1.0, 100.0])
def test_bent_distances_and_their_slopes_are_right_at_every_size(loss_type: Any, size: float) -> None:
    """In float32, sqrt(d^2 + c^2) - c as it stands would be 0 for d below 1e-4."""
    objective = Objective(
        PLAIN, "epsilon", LossSettings(loss_type=loss_type, huber_schedule="constant", huber_c=0.5), CPU
    )
    prediction = torch.full((1, 1, 1, 1), size, requires_grad=True)
    loss = objective.losses(prediction, torch.zeros(1, 1, 1, 1), torch.tensor([500]))
    (slope,) = torch.autograd.grad(loss.sum(), prediction)
    d, c = float(np.float32(size)), 0.5
    factor = c if loss_type == "huber" else 1.0
    assert float(loss.detach()) == pytest.approx(factor * 2 * d**2 / (math.sqrt(d**2 + c**2) + c), rel=1e-6)
    assert float(slope) == pytest.approx(factor * 2 * d / math.sqrt(d**2 + c**2), rel=1e-6)


def test_a_normalized_loss_does_not_depend_on_the_masked_area() -> None:
    settings = LossSettings(masked_loss_normalize=True)
    objective = Objective(PLAIN, "epsilon", settings, CPU)
    prediction = torch.full((4, 4, 4, 4), 3.0, requires_grad=True)
    masks = torch.zeros(4, 1, 4, 4)
    masks[0, :, 0, 0], masks[1, :, :2], masks[2] = 1.0, 1.0, 0.004
    losses = objective.losses(prediction, torch.zeros(4, 4, 4, 4), torch.tensor([5, 5, 5, 5]), masks)
    assert losses.tolist() == pytest.approx([9.0, 9.0, 9.0, 0.0], rel=1e-5)
    losses.sum().backward()
    assert prediction.grad is not None and torch.isfinite(prediction.grad).all()
    legacy = Objective(PLAIN, "epsilon", LossSettings(), CPU)
    means = legacy.losses(prediction, torch.zeros(4, 4, 4, 4), torch.tensor([5, 5, 5, 5]), masks)
    assert means.tolist() == pytest.approx([9 / 16, 4.5, 0.036, 0.0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_predictions_are_judged_in_float32(dtype: torch.dtype) -> None:
    objective = Objective(PLAIN, "epsilon", LossSettings(), CPU)
    prediction = torch.full((1, 4, 8, 8), 300.0).to(dtype)
    losses = objective.losses(prediction, torch.zeros(1, 4, 8, 8), torch.tensor([1]))
    assert losses.dtype == torch.float32
    assert float(losses) == pytest.approx(90_000)


@pytest.mark.parametrize(("loss_type", "huber_schedule"), LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_back_from_the_device(kind: str, loss_type: Any, huber_schedule: Any) -> None:
    """A tensor on `meta` has no values: to ask for one, or for a loop over timesteps, is an error."""
    meta = torch.device("meta")
    settings = LossSettings(loss_type, huber_schedule, min_snr_gamma=5.0, masked_loss_normalize=True)
    objective = Objective(ZERO, kind, settings, meta, alphas_before=PLAIN)
    latents, noise = torch.empty(2, 4, 8, 8, device=meta), torch.empty(2, 4, 8, 8, device=meta)
    timesteps, masks = torch.empty(2, device=meta, dtype=torch.int64), torch.empty(2, 1, 8, 8, device=meta)
    prediction = objective.add_noise(latents, noise, timesteps).requires_grad_()
    losses = objective.losses(prediction, objective.target(latents, noise, timesteps), timesteps, masks)
    losses.sum().backward()
    assert losses.shape == (2,) and losses.device.type == "meta"
    assert prediction.grad is not None


@pytest.mark.gpu
def test_a_step_on_the_gpu_waits_for_nothing() -> None:
    device = torch.device("cuda")
    settings = LossSettings("huber", min_snr_gamma=5.0, masked_loss_normalize=True)
    results = []
    for place in (CPU, device):
        objective = Objective(ZERO, "v_prediction", settings, place)
        generator = torch.Generator().manual_seed(1)
        latents, noise = (torch.randn(2, 4, 8, 8, generator=generator).to(place) for _ in range(2))
        timesteps, masks = torch.tensor([3, 999]).to(place), torch.ones(2, 1, 8, 8).to(place)
        torch.cuda.set_sync_debug_mode("error")
        try:
            noisy = objective.add_noise(latents, noise, timesteps)
            losses = objective.losses(noisy, objective.target(latents, noise, timesteps), timesteps, masks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(losses.cpu())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_settings_are_what_the_flags_say() -> None:
    assert LossSettings.of(Loss()) == LossSettings()
    flags: dict[str, Any] = {
        "loss_type": "smooth_l1",
        "huber_schedule": "exponential",
        "huber_c": 0.3,
        "huber_scale": 2.0,
        "min_snr_gamma": 7.0,
        "scale_v_pred_loss_like_noise_pred": True,
        "v_pred_like_loss": 0.25,
        "debiased_estimation_loss": True,
        "masked_loss_normalize": True,
        "legacy_ztsnr_weights": True,
    }
    assert LossSettings.of(Loss(**flags)) == LossSettings(**flags)


def test_what_no_objective_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="sample"):
        Objective(PLAIN, "sample", LossSettings(), CPU)
