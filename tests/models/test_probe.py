"""The probe tells noise from velocity where nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.models import probe
from library.models.inspect import inspect
from library.models.load import load
from library.quickstart import finetune_v
from library.quickstart.architecture import MODEL_FOLDER


@pytest.fixture(scope="module")
def velocity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the quickstart model, fine-tuned to predict velocity."""
    folder = tmp_path_factory.mktemp("velocity") / "model"
    finetune_v.main(["--out", str(folder)])
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quickstart_model_predicts_noise(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    info = replace(inspect(str(MODEL_FOLDER)), prediction_type=None)
    model = load(info, dtype=dtype, with_vae=False)
    assert model.prediction_type == "epsilon" and model.base_model_version == "sd_v1"
    told = [line for line in capsys.readouterr().err.splitlines() if "forward pass" in line]
    assert told == [
        "no evidence and no --v_parameterization; one forward pass gave 1.00 (noise 1, velocity 0): it predicts noise"
    ]
    value = probe.measure(model)
    assert value == probe.measure(model) and value == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_copy_predicts_velocity(velocity: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    info = inspect(str(velocity))
    assert info.prediction_type == "v_prediction"
    model = load(replace(info, prediction_type=None), dtype=dtype, with_vae=False)
    assert model.prediction_type == "v_prediction" and model.base_model_version == "sd_v1_v"
    assert "it predicts velocity" in capsys.readouterr().err
    assert -0.4 < probe.measure(model) < 0.4


def test_what_is_known_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure", lambda model: pytest.fail("probed"))
    assert load(inspect(str(MODEL_FOLDER)), with_vae=False).prediction_type == "epsilon"


def test_a_model_that_overflows_can_t_be_probed() -> None:
    model = load(inspect(str(MODEL_FOLDER)), with_vae=False)
    model.unet.conv_out.bias.data.fill_(torch.inf)
    with pytest.raises(UserError, match="--mixed_precision: model gives no finite numbers in float32"):
        probe.measure(model)


@pytest.mark.parametrize(
    ("value", "told"), [(1.02, "epsilon"), (0.51, "epsilon"), (0.49, "v_prediction"), (-0.1, "v_prediction")]
)
def test_threshold(value: float, told: str) -> None:
    assert probe.prediction_type(value) == told
