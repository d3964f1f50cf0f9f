"""Full-size models of every family: their tensors' names on `meta`, and, slowly, their loading and a step."""

import json
import os
import sys
from pathlib import Path

import pytest

from library.models import parts
from library.models.families import FAMILIES, FamilyName, Part
from library.models.headers import Entry, Header
from library.models.info import ModelInfo, PartInfo
from library.models.single_configs import packaged
from tests.full_size import shapes, write_single_file
from tests.memory import run_measured

COUNTS: dict[FamilyName, dict[Part, int]] = {
    "sd1": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sd2": {"unet": 686, "vae": 248, "text_encoder": 372},
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517},
}
PREFIXES: dict[Part, str] = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}


def full_size(family: FamilyName) -> ModelInfo:
    """What is known of a full-size single file in the original layout, from packaged configs."""
    facts = FAMILIES[family]
    entries = {name: Entry("F16", shape, 0, 0) for name, shape in shapes(family).items()}
    prefixes: dict[Part, str] = {**PREFIXES, **{encoder.part: encoder.prefix for encoder in facts.text_encoders}}
    held = {
        part: PartInfo(packaged(family, part), (Header(Path("full"), entries, {}),), True, prefixes[part], "full")
        for part in facts.parts
    }
    scheduler = packaged(family, "scheduler")
    return ModelInfo(Path("full"), "full", family, "single_file", held, scheduler, "epsilon", False, 8)


@pytest.mark.parametrize("family", COUNTS)
def test_every_tensor_has_a_source_of_its_shape(family: FamilyName) -> None:
    info = full_size(family)
    for part, count in COUNTS[family].items():
        module = parts.build(info, part)
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        found = {source.target: source.shape for source in parts.sources(info, part, module)}
        assert len(wanted) == count
        assert wanted.keys() - found.keys() == set()
        for name, shape in wanted.items():
            squeezed = [tuple(side for side in one if side != 1) for one in (found[name], shape)]
            assert squeezed[0] == squeezed[1], name
        beyond = found.keys() - wanted.keys()
        assert all("logit_scale" in name or name == "text_projection.weight" for name in beyond), beyond


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", COUNTS)
def test_a_full_size_model_loads_and_takes_a_step(family: str, tmp_path: Path, repo_root: Path) -> None:
    """A float16 file into bfloat16, and one step at 256 px, within 24 GB; what it costs is printed."""
    file, answer = tmp_path / f"{family}.safetensors", tmp_path / "answer.json"
    write_single_file(family, file, dtype="F16")
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(repo_root / "tests/full_size_step.py"), str(file), str(answer)]
    try:
        size = file.stat().st_size
        run = run_measured(command, environment, tmp_path / "log", timeout=1500)
    finally:
        file.unlink()
    assert run.returncode == 0, run.stderr
    values = json.loads(answer.read_text())
    print(
        f"\n{family}: {size / 1e9:.2f} GB file, {values['held'] / 1e9:.2f} GB of weights held; "
        f"load {values['load_seconds']:.1f} s, peak {values['load_peak'] / 1e9:.2f} GB "
        f"({values['load_peak'] / size:.3f} x the file); "
        f"step {values['step_seconds']:.1f} s, {values['step_peak'] / 1e9:.2f} GB more; "
        f"VAE and text encoders {values['let_go'] / 1e9:.2f} GB, {values['given_back'] / 1e9:.2f} GB given back; "
        f"process {run.anonymous / 1e9:.2f} GB anonymous, VmHWM {run.high_water / 1e9:.2f} GB"
    )
    assert values["finite"] and values["family"] == family
    assert values["load_peak"] < 1.3 * size
    assert values["given_back"] > 0.9 * values["let_go"]
    assert run.high_water < 24e9
