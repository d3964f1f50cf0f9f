"""Prediction type and noise schedule: evidence first, then flags, then what is usual; contradictions are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from library.errors import UserError
from library.models.info import Said
from library.models.inspect import inspect
from tests.original_layout import folder_as_single_file

Models = Callable[[str], Path]
V, EPSILON = "v_prediction", "epsilon"
NOTHING = np.zeros(0, np.float32)


def marked(folder: Path, path: Path, *names: str, **metadata: str) -> Path:
    """A single file with marker tensors and `modelspec` metadata."""
    told = {f"modelspec.{key}": value for key, value in metadata.items()}
    folder_as_single_file(folder, path, extra=dict.fromkeys(names, NOTHING), metadata=told)
    return path


def scheduled(folder: Path, target: Path, **values: object) -> Path:
    """A folder whose scheduler config says other things; None takes a key out."""
    shutil.copytree(folder, target)
    path = target / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target


def problems(path: Path, said: Said) -> list[str]:
    with pytest.raises(UserError) as raised:
        inspect(path, said=said)
    return [str(problem) for problem in raised.value.problems]


@pytest.mark.parametrize(
    ("names", "metadata", "prediction", "schedule", "phrase"),
    [
        (("v_pred",), {}, V, False, "predicts v (its tensor v_pred)"),
        (("v_pred", "ztsnr"), {}, V, True, "zero terminal SNR (its tensor ztsnr)"),
        (("ztsnr",), {"prediction_type": "v"}, V, True, "predicts v (its metadata, modelspec.prediction_type = v)"),
        ((), {"prediction_type": "v_prediction"}, V, False, "modelspec.prediction_type = v_prediction"),
        ((), {"prediction_type": "epsilon"}, EPSILON, False, "predicts noise (its metadata"),
        (("v_pred",), {"prediction_type": "epsilon"}, V, False, "predicts v (its tensor v_pred)"),
        ((), {"architecture": "stable-diffusion-v2-768-v"}, V, False, "modelspec.architecture"),
        ((), {"architecture": "stable-diffusion-v2-768-v/lora"}, V, False, "modelspec.architecture"),
        ((), {"architecture": "stable-diffusion-xl-v1-base"}, EPSILON, False, "no evidence; usual for SDXL"),
    ],
)
def test_evidence_of_single_files(
    names: tuple[str, ...],
    metadata: dict[str, str],
    prediction: str,
    schedule: bool,
    phrase: str,
    tiny_sdxl: Path,
    tmp_path: Path,
) -> None:
    info = inspect(marked(tiny_sdxl, tmp_path / "model.safetensors", *names, **metadata))
    assert (info.prediction_type, info.zero_terminal_snr) == (prediction, schedule)
    assert info.scheduler_config["prediction_type"] == prediction
    assert info.scheduler_config["rescale_betas_zero_snr"] is schedule
    assert phrase in info.line


def test_evidence_in_a_pickle(tiny_sd2: Path, tmp_path: Path) -> None:
    import torch

    from tests.original_layout import original_tensors

    tensors = {name: torch.from_numpy(array.copy()) for name, array in original_tensors(tiny_sd2).items()}
    torch.save({"state_dict": {**tensors, "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}}, tmp_path / "model.ckpt")
    info = inspect(tmp_path / "model.ckpt")
    assert info.prediction_type == V and info.zero_terminal_snr


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_without_evidence_the_flag_decides(family: str, tiny_models: Models) -> None:
    path = tiny_models(f"{family}_file")
    assert inspect(path).prediction_type == (None if family == "sd2" else EPSILON)
    assert "prediction_type" not in inspect(path).scheduler_config or family != "sd2"
    info = inspect(path, said=Said(v_parameterization=True, zero_terminal_snr=True, v2=family == "sd2"))
    assert (info.prediction_type, info.zero_terminal_snr) == (V, True)
    assert info.scheduler_config["rescale_betas_zero_snr"] is True
    assert "predicts v (--v_parameterization" in info.line and "zero terminal SNR (--zero_terminal_snr" in info.line
    info = inspect(path, said=Said(v_parameterization=False, zero_terminal_snr=False))
    assert (info.prediction_type, info.zero_terminal_snr) == (EPSILON, False)
    assert info.scheduler_config["prediction_type"] == EPSILON


def test_a_scheduler_config_is_evidence(tiny_sd1: Path, tmp_path: Path) -> None:
    info = inspect(scheduled(tiny_sd1, tmp_path / "v", prediction_type="v_prediction", rescale_betas_zero_snr=True))
    assert (info.prediction_type, info.zero_terminal_snr) == (V, True)
    assert "predicts v (its scheduler_config.json)" in info.line
    silent = scheduled(tiny_sd1, tmp_path / "silent", prediction_type=None, rescale_betas_zero_snr=None)
    info = inspect(silent, said=Said(v_parameterization=True, zero_terminal_snr=True))
    assert (info.prediction_type, info.zero_terminal_snr) == (V, True)
    assert inspect(silent).prediction_type == EPSILON
    shutil.rmtree(silent / "scheduler")
    assert inspect(silent).scheduler_config["beta_schedule"] == "scaled_linear"


def test_contradictions_show_the_evidence(tiny_models: Models, tmp_path: Path) -> None:
    (one,) = problems(tiny_models("sd1_file"), Said(v2=True))
    assert one.startswith("--v2: tiny_sd1.safetensors is an SD1 model") and one.endswith("; leave it out")
    (one,) = problems(tiny_models("sd2"), Said(v2=False))
    assert one.startswith("--v2: tiny_sd2 is an SD2 model")
    (one,) = problems(tiny_models("sd2"), Said(v_parameterization=False))
    assert one.startswith("--v_parameterization: tiny_sd2 predicts v (its scheduler_config.json)")
    (one,) = problems(tiny_models("sd1"), Said(v_parameterization=True))
    assert "tiny_sd1 predicts noise (its scheduler_config.json)" in one
    rescaled = scheduled(tiny_models("sdxl"), tmp_path / "rescaled", rescale_betas_zero_snr=True)
    (one,) = problems(rescaled, Said(zero_terminal_snr=False))
    assert one.startswith("--zero_terminal_snr: rescaled has zero terminal SNR (its scheduler_config.json)")
    file = marked(tiny_models("sdxl"), tmp_path / "noob.safetensors", "v_pred", "ztsnr")
    three = problems(file, Said(v2=True, v_parameterization=False, zero_terminal_snr=False))
    assert [one.split(":")[0] for one in three] == ["--v2", "--v_parameterization", "--zero_terminal_snr"]
    assert "(its tensor v_pred)" in three[1] and "noob.safetensors has zero terminal SNR (its tensor ztsnr)" in three[2]


def test_contradictions_name_the_place_of_what_was_said(tiny_models: Models, tmp_path: Path) -> None:
    file = marked(tiny_models("sdxl"), tmp_path / "noob.safetensors", "v_pred", "ztsnr")
    places = {"v2": "run.toml:3 v2", "zero_terminal_snr": "run.toml:5 zero_terminal_snr"}
    three = problems(file, Said(v2=True, v_parameterization=False, zero_terminal_snr=False, places=places))
    assert [one.split(": ")[0] for one in three] == [places["v2"], "--v_parameterization", places["zero_terminal_snr"]]
    assert all(one.endswith("; leave it out") for one in three)
    places = {"v_parameterization": "run.toml:4 v_parameterization"}
    info = inspect(tiny_models("sdxl_file"), said=Said(v_parameterization=True, places=places))
    assert "predicts v (run.toml:4 v_parameterization; the model doesn't say)" in info.line


def test_a_false_in_a_scheduler_config_is_no_evidence(tiny_models: Models, tmp_path: Path) -> None:
    folder = scheduled(tiny_models("sdxl"), tmp_path / "plain", rescale_betas_zero_snr=False)
    info = inspect(folder, said=Said(zero_terminal_snr=True))
    assert info.zero_terminal_snr and info.scheduler_config["rescale_betas_zero_snr"] is True
    assert "zero terminal SNR (--zero_terminal_snr)" in info.line
    for said in (Said(), Said(zero_terminal_snr=False)):
        info = inspect(folder, said=said)
        assert not info.zero_terminal_snr and "zero terminal SNR" not in info.line


def test_flags_that_agree_with_the_evidence(tiny_models: Models, tmp_path: Path) -> None:
    assert inspect(tiny_models("sd2"), said=Said(v2=True, v_parameterization=True)).prediction_type == V
    file = marked(tiny_models("sdxl"), tmp_path / "noob.safetensors", "v_pred", "ztsnr")
    assert inspect(file, said=Said(v_parameterization=True, zero_terminal_snr=True)).zero_terminal_snr


def test_other_predictions_are_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    (one,) = problems(marked(tiny_sd1, tmp_path / "flow.safetensors", prediction_type="flow"), Said())
    assert "predicts 'flow'" in one and "can be trained" in one
