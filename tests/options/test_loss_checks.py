"""What must hold between the flags of noise and loss."""

from typing import Any

import pytest

from library.options import loss_checks
from library.options.dataset import Dataset
from library.options.registry import Options
from library.options.training import Loss


def options(**flags: Any) -> Options:
    """Options of which only these flags were set."""
    return Options(loss=Loss(**flags), explicit=frozenset(flags))


@pytest.mark.parametrize("offset", [{}, {"noise_offset": 0.0}])
def test_adaptive_noise_needs_an_offset(offset: dict[str, float]) -> None:
    (problem,) = loss_checks.problems(options(adaptive_noise_scale=0.01, **offset))
    assert str(problem) == (
        "--adaptive_noise_scale: is added to --noise_offset, which is off; add --noise_offset, such as 0.05"
    )
    assert not [*loss_checks.problems(options(adaptive_noise_scale=0.01, noise_offset=0.05))]


def test_a_problem_tells_the_line_of_a_config_file() -> None:
    placed = options(adaptive_noise_scale=1.0).model_copy(
        update={"places": {"adaptive_noise_scale": "run.toml:3 adaptive_noise_scale"}}
    )
    (problem,) = loss_checks.problems(placed)
    assert problem.where == "run.toml:3 adaptive_noise_scale"


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep"),
        ({"min_timestep": 0, "max_timestep": 1}, None),
        ({"max_timestep": 1}, None),
        ({"min_timestep": 999}, None),
        ({"min_timestep": 600, "max_timestep": 500}, "--min_timestep"),
    ],
)
def test_a_range_of_timesteps_holds_one(flags: dict[str, int], where: str | None) -> None:
    found = [problem.where for problem in loss_checks.problems(options(**flags))]
    assert found == ([] if where is None else [where])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"loss_type": "huber", "huber_scale": 2.0}, ["--huber_scale: has no effect with --huber_schedule snr"]),
        ({"loss_type": "huber", "huber_scale": 2.0, "huber_schedule": "constant"}, []),
        ({"loss_type": "smooth_l1", "huber_schedule": "exponential", "huber_scale": 0.5}, []),
        ({"loss_type": "huber", "huber_c": 0.2}, []),
        ({"loss_type": "l1", "huber_c": 0.2}, ["--huber_c: has no effect with --loss_type l1"]),
        ({"legacy_ztsnr_weights": True}, ["--legacy_ztsnr_weights: has no effect without a weighting"]),
        ({"legacy_ztsnr_weights": True, "min_snr_gamma": 5.0}, []),
        ({"legacy_ztsnr_weights": True, "debiased_estimation_loss": True}, []),
        ({}, []),
    ],
)
def test_what_has_no_effect_is_said(flags: dict[str, Any], says: list[str]) -> None:
    found = [*loss_checks.notices(options(**flags))]
    assert len(found) == len(says)
    assert all(line.startswith(start) for line, start in zip(found, says, strict=True))


@pytest.mark.parametrize(
    ("flags", "prediction_type", "wrong"),
    [
        ({"scale_v_pred_loss_like_noise_pred": True}, "epsilon", "--scale_v_pred_loss_like_noise_pred: is for base"),
        ({"scale_v_pred_loss_like_noise_pred": True}, "v_prediction", None),
        ({"scale_v_pred_loss_like_noise_pred": True}, None, None),
        ({"v_pred_like_loss": 0.5}, "v_prediction", "--v_pred_like_loss: is for base models that predict noise"),
        ({"v_pred_like_loss": 0.0}, "v_prediction", None),
        ({"v_pred_like_loss": 0.5}, "epsilon", None),
        ({"v_pred_like_loss": 0.5}, None, None),
        ({"debiased_estimation_loss": True, "min_snr_gamma": 5.0}, "v_prediction", None),
    ],
)
def test_weights_that_are_for_one_kind_of_prediction(
    flags: dict[str, Any], prediction_type: str | None, wrong: str | None
) -> None:
    found = [str(problem) for problem in loss_checks.objective_problems(options(**flags), prediction_type)]
    assert len(found) == (wrong is not None)
    assert wrong is None or found[0].startswith(wrong)


def test_what_finds_nothing_to_work_on_is_said() -> None:
    legacy = options(legacy_ztsnr_weights=True, min_snr_gamma=5.0)
    (line,) = loss_checks.objective_notices(legacy, zero_terminal_snr=False, masks=False)
    assert line.startswith("--legacy_ztsnr_weights: has no effect, the noise schedule")
    assert not [*loss_checks.objective_notices(legacy, zero_terminal_snr=True, masks=False)]
    masked = options(masked_loss_normalize=True).model_copy(update={"dataset": Dataset(masked_loss=True)})
    (line,) = loss_checks.objective_notices(masked, zero_terminal_snr=False, masks=False)
    assert line == "--masked_loss_normalize: has no effect, no picture has a mask"
    assert not [*loss_checks.objective_notices(masked, zero_terminal_snr=False, masks=True)]
