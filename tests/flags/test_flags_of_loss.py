"""Flags of noise and loss: logged losses of real runs are those of the formula, in float64, on what a run predicted.

Weights stand still (a tiny learning rate), so that runs differ in nothing but what a flag does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from library.training.objective import Objective
from tests.flags.effects import Ran, Runs, observes

Floats = NDArray[np.float64]
pytestmark = pytest.mark.xdist_group("flags of loss")
STILL = ("--learning_rate", "1e-12", "--network_train_unet_only")
HUBER = ("--loss_type", "huber")
SMOOTH = ("--loss_type", "smooth_l1")


@dataclass
class Seen:
    """What a run put into its objective and what it predicted, one entry a step; the run itself."""

    ran: Ran
    latents: list[torch.Tensor] = field(default_factory=list)
    noise: list[torch.Tensor] = field(default_factory=list)
    input_noise: list[torch.Tensor] = field(default_factory=list)
    noisy: list[torch.Tensor] = field(default_factory=list)
    target: list[torch.Tensor] = field(default_factory=list)
    prediction: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)


def watch(runs: Runs, *flags: str, model: str = "sd1") -> Seen:
    """A run with its objective watched."""
    lists: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("latents", "noise", "input_noise", "noisy", "target", "prediction")
    }
    times: list[int] = []
    losses, add, target = Objective.losses, Objective.add_noise, Objective.target

    def watched_losses(
        self: Objective,
        prediction: torch.Tensor,
        wanted: torch.Tensor,
        timesteps: torch.Tensor,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        lists["prediction"].append(prediction.detach().double())
        times.append(int(timesteps[0]))
        return losses(self, prediction, wanted, timesteps, masks)

    def watched_add(
        self: Objective, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        noisy = add(self, latents, noise, timesteps)
        for name, tensor in (("latents", latents), ("input_noise", noise), ("noisy", noisy)):
            lists[name].append(tensor.double())
        return noisy

    def watched_target(
        self: Objective, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        wanted = target(self, latents, noise, timesteps)
        lists["noise"].append(noise.double())
        lists["target"].append(wanted.double())
        return wanted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "losses", watched_losses)
        patch.setattr(Objective, "add_noise", watched_add)
        patch.setattr(Objective, "target", watched_target)
        ran = runs.fresh(*STILL, *flags, model=model)
    return Seen(ran, timesteps=times, **lists)


def alphas(*, zero_terminal: bool = False) -> Floats:
    """The tiny models' cumulative products (scaled linear betas), rescaled as Lin et al. 2023, algorithm 1, or not."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    products = np.asarray(np.cumprod(1 - betas), dtype=np.float64)
    if not zero_terminal:
        return products
    roots = np.sqrt(products)
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return np.asarray(np.square(roots), dtype=np.float64)


def snr(t: int) -> float:
    return float(alphas()[t] / (1 - alphas()[t]))


@pytest.fixture(scope="module")
def noise_model(runs: Runs) -> Seen:
    """A run of a model that predicts noise, with no flag of this group."""
    return watch(runs)


@pytest.fixture(scope="module")
def velocity_model(runs: Runs) -> Seen:
    """The same for one that predicts velocity."""
    return watch(runs, model="sd2")


def c_snr(t: int) -> float:
    sigma = (1 / snr(t)) ** 0.5
    return (1 - 0.1) / (1 + sigma) ** 2 + 0.1


def huber(d: Floats, c: float) -> Floats:
    return np.asarray(2 * c * (np.sqrt(d**2 + c**2) - c))


def smooth(d: Floats, c: float) -> Floats:
    return np.asarray(2 * (np.sqrt(d**2 + c**2) - c))


Formula = Callable[[Floats, int], Floats]
DISTANCES: dict[str, tuple[tuple[str, ...], Formula]] = {
    "nothing": ((), lambda d, t: d**2),
    "l1": (("--loss_type", "l1"), lambda d, t: np.abs(d)),
    "huber": (HUBER, lambda d, t: huber(d, c_snr(t))),
    "smooth_l1": (SMOOTH, lambda d, t: smooth(d, c_snr(t))),
    "constant": ((*HUBER, "--huber_schedule", "constant"), lambda d, t: huber(d, 0.1)),
    "exponential": ((*SMOOTH, "--huber_schedule", "exponential"), lambda d, t: smooth(d, 0.1 ** (t / 1000))),
    "c": ((*HUBER, "--huber_schedule", "constant", "--huber_c", "0.4"), lambda d, t: huber(d, 0.4)),
    "scale": ((*HUBER, "--huber_schedule", "constant", "--huber_scale", "3"), lambda d, t: huber(d, 0.3)),
    "gamma": (("--min_snr_gamma", "0.05"), lambda d, t: d**2 * min(1, 0.05 / snr(t))),
    "debiased": (("--debiased_estimation_loss",), lambda d, t: d**2 / snr(t) ** 0.5),
    "v_like": (("--v_pred_like_loss", "0.5"), lambda d, t: d**2 * (1 + 0.5 * (snr(t) + 1) / snr(t))),
}


@observes(
    *("loss_type", "huber_schedule", "huber_c", "huber_scale", "min_snr_gamma", "debiased_estimation_loss"),
    *("v_pred_like_loss",),
)
@pytest.mark.parametrize("name", DISTANCES)
def test_losses_of_a_noise_model_are_the_formulas(runs: Runs, noise_model: Seen, name: str) -> None:
    flags, formula = DISTANCES[name]
    ran = runs(*STILL, *flags)
    assert len(ran.losses) == 2
    for logged, prediction, target, t in zip(
        ran.losses, noise_model.prediction, noise_model.target, noise_model.timesteps, strict=True
    ):
        expected = formula((prediction - target).numpy(), t).mean()
        assert logged == pytest.approx(expected, rel=2e-5)
    assert name == "nothing" or ran.losses != pytest.approx(noise_model.ran.losses, rel=1e-3)


@observes("scale_v_pred_loss_like_noise_pred")
@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        (("--scale_v_pred_loss_like_noise_pred",), lambda s: s / (s + 1)),
        (("--min_snr_gamma", "0.05"), lambda s: min(s, 0.05) / (s + 1)),
        (("--debiased_estimation_loss",), lambda s: 1 / (s + 1)),
    ],
    ids=("scaled", "gamma", "debiased"),
)
def test_losses_of_a_velocity_model_are_the_formulas(
    runs: Runs, velocity_model: Seen, flags: tuple[str, ...], weight: Callable[[float], float]
) -> None:
    ran = runs(*STILL, *flags, model="sd2")
    for logged, plain, t in zip(ran.losses, velocity_model.ran.losses, velocity_model.timesteps, strict=True):
        assert logged == pytest.approx(plain * weight(min(snr(t), 1000)), rel=2e-5)


@observes("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss")
def test_weightings_of_the_other_prediction_are_refused(runs: Runs) -> None:
    assert "--v_pred_like_loss" in runs("--v_pred_like_loss", "0.5", model="sd2", expect=2).err
    refused = runs("--scale_v_pred_loss_like_noise_pred", expect=2)
    assert "--scale_v_pred_loss_like_noise_pred" in refused.err and refused.steps_were_made is False


@observes("min_timestep", "max_timestep")
@pytest.mark.parametrize(
    ("flags", "low", "high"),
    [(("--min_timestep", "950"), 950, 1000), (("--max_timestep", "40"), 0, 40), ((), 0, 1000)],
    ids=("min", "max", "none"),
)
def test_weights_give_away_timesteps_within_the_range(runs: Runs, flags: tuple[str, ...], low: int, high: int) -> None:
    few = (*STILL, *flags, "--max_train_steps", "4")
    plain, weighted = runs(*few), runs(*few, "--debiased_estimation_loss")
    table = 1 / np.sqrt(np.array([snr(t) for t in range(1000)]))
    found = [int(np.abs(table - two / one).argmin()) for one, two in zip(plain.losses, weighted.losses, strict=True)]
    assert all(low <= t < high for t in found) and len(set(found)) > 1
    assert bool(flags) or not any(all(a <= t < b for t in found) for a, b in ((950, 1000), (0, 40)))


def channel_offsets(one: Seen, other: Seen) -> Floats:
    """What the noise of two runs differs by, (steps, channels); the same over a whole channel."""
    rows = []
    for first, second in zip(one.noise, other.noise, strict=True):
        difference = (second - first)[0]
        assert bool((difference - difference.mean(dim=(1, 2), keepdim=True)).abs().max() < 1e-6)
        rows.append(difference.mean(dim=(1, 2)).numpy())
    return np.array(rows)


@observes("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
def test_offsets_are_constant_over_a_channel_and_as_strong_as_asked(runs: Runs, noise_model: Seen) -> None:
    offset = channel_offsets(noise_model, watch(runs, "--noise_offset", "0.1"))
    twice = channel_offsets(noise_model, watch(runs, "--noise_offset", "0.2"))
    assert np.allclose(twice, 2 * offset, atol=1e-6) and np.abs(offset).max() > 0.02
    varied = watch(runs, "--noise_offset", "0.1", "--noise_offset_random_strength")
    shares = channel_offsets(noise_model, varied) / offset
    assert np.allclose(shares, shares[:, :1], atol=1e-4)
    assert ((shares > 0) & (shares < 1)).all() and abs(shares[0, 0] - shares[1, 0]) > 1e-3
    adaptive = watch(runs, "--noise_offset", "0.1", "--adaptive_noise_scale", "0.5")
    means = np.array([one[0].mean(dim=(1, 2)).abs().numpy() for one in noise_model.latents])
    assert np.allclose(channel_offsets(noise_model, adaptive), offset / 0.1 * (0.1 + 0.5 * means), atol=1e-5)
    assert noise_model.ran.losses != varied.ran.losses != adaptive.ran.losses


@observes("multires_noise_iterations", "multires_noise_discount")
def test_pyramid_noise_is_coarser_noise_added_and_normalised(runs: Runs, noise_model: Seen) -> None:
    flags = ("--multires_noise_iterations", "2", "--multires_noise_discount")
    fine = watch(runs, "--multires_noise_iterations", "1")
    weak, strong = watch(runs, *flags, "0.3"), watch(runs, *flags, "0.9")
    default = watch(runs, *flags[:2])
    for step, plain in enumerate(noise_model.noise):
        a, b, c = (seen.noise[step].flatten().numpy() for seen in (fine, weak, strong))
        assert np.allclose([a.std(ddof=1), b.std(ddof=1), c.std(ddof=1)], 1, atol=1e-5)
        assert not np.allclose(a, plain.flatten().numpy(), atol=0.1)
        basis = np.stack([a, b], axis=1)
        factors, *_ = np.linalg.lstsq(basis, c, rcond=None)
        assert np.allclose(basis @ factors, c, atol=1e-5) and factors[0] < 0 < factors[1]
        assert not np.allclose(b, c, atol=1e-2)
        assert torch.equal(default.noise[step], weak.noise[step])


@observes("ip_noise_gamma", "ip_noise_gamma_random_strength")
def test_input_perturbation_is_in_the_input_only(runs: Runs, noise_model: Seen) -> None:
    gamma, varied = (
        watch(runs, "--ip_noise_gamma", "0.1", *more) for more in ((), ("--ip_noise_gamma_random_strength",))
    )
    for step, target in enumerate(noise_model.target):
        assert torch.equal(gamma.target[step], target) and torch.equal(varied.target[step], target)
        extra = gamma.input_noise[step] - target
        assert float(extra.std()) == pytest.approx(0.1, rel=0.25)
        share = (varied.input_noise[step] - target) / extra
        assert 0 < float(share.median()) < 1 and float((share - share.median()).abs().median()) < 1e-4
    assert gamma.ran.losses != noise_model.ran.losses != varied.ran.losses


@observes("zero_terminal_snr", "legacy_ztsnr_weights")
def test_zero_terminal_snr_ends_in_pure_noise_and_weighs_by_what_it_is(runs: Runs) -> None:
    last = ("--min_timestep", "999", "--zero_terminal_snr")
    seen = watch(runs, *last, model="sd2")
    for noisy, noise, target, latents in zip(seen.noisy, seen.noise, seen.target, seen.latents, strict=True):
        assert torch.equal(noisy, noise) and torch.equal(target, -latents)
    pinned = ("--min_timestep", "900", "--max_timestep", "901", *STILL, "--zero_terminal_snr")
    weighed = (*pinned, "--min_snr_gamma", "1")
    plain, now, before = (
        runs(*flags, model="sd2") for flags in (pinned, weighed, (*weighed, "--legacy_ztsnr_weights"))
    )
    for ran, table in ((now, alphas(zero_terminal=True)), (before, alphas())):
        ratio = table[900] / (1 - table[900])
        assert ran.losses == pytest.approx([min(ratio, 1) / (ratio + 1) * loss for loss in plain.losses], rel=1e-4)
    assert now.losses != pytest.approx(before.losses, rel=1e-2)


@observes("prior_loss_weight", "reg_data_dir", "train_data_dir")
def test_regularization_pictures_weigh_what_is_asked(runs: Runs) -> None:
    from tests.pictures import make_pictures

    if not (runs.root / "reg").is_dir():
        make_pictures(runs.root / "reg", count=3, repeats=1, name="other", sizes=((64, 64),))
    flags = (*STILL, "--reg_data_dir", "@/reg", "--max_train_steps", "6")
    whole, quarter = runs(*flags), runs(*flags, "--prior_loss_weight", "0.25")
    ratios = [two / one for one, two in zip(whole.losses, quarter.losses, strict=True)]
    assert {round(ratio, 4) for ratio in ratios} == {1.0, 0.25}
    assert whole.metadata["ss_num_reg_images"] != runs(*STILL).metadata["ss_num_reg_images"] == "0"
    assert (whole.metadata["ss_num_train_images"], whole.metadata["ss_num_reg_images"]) == ("8", "8")


@observes("masked_loss_normalize", "masked_loss")
def test_masks_leave_their_part_of_the_loss_and_may_be_normalised(runs: Runs, noise_model: Seen) -> None:
    masks = runs.root / "masks"
    masks.mkdir(exist_ok=True)
    grey = np.zeros((64, 64), np.uint8)
    grey[:, :16] = 255
    for number in range(4):
        Image.fromarray(grey).save(masks / f"picture{number:02d}.png")
    masked = runs(*STILL, "--conditioning_data_dir", "@/masks", "--masked_loss")
    normal = runs(*STILL, "--conditioning_data_dir", "@/masks", "--masked_loss", "--masked_loss_normalize")
    for step, (prediction, target) in enumerate(zip(noise_model.prediction, noise_model.target, strict=True)):
        squares = (prediction - target).square()[..., :2]
        assert masked.losses[step] == pytest.approx(float(squares.sum()) / prediction.numel(), rel=1e-4)
        assert normal.losses[step] == pytest.approx(float(squares.mean()), rel=1e-4)
    assert "no picture has a mask" in runs(*STILL, "--masked_loss", "--masked_loss_normalize").err
