"""What must hold between the flags of precision and memory."""

from typing import Any

import pytest

from library.options import precision_checks
from library.options.model import Model
from library.options.network import Network
from library.options.registry import Options


def options(module: str | None = "networks.lora", **flags: Any) -> Options:
    """Options of which only these flags were set."""
    return Options(model=Model(**flags), network=Network(network_module=module), explicit=frozenset(flags))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"full_fp16": True, "mixed_precision": "fp16"}, []),
        ({"full_bf16": True, "mixed_precision": "bf16"}, []),
        ({"full_fp16": True}, ["--full_fp16: needs --mixed_precision fp16, not no"]),
        ({"full_bf16": True, "mixed_precision": "fp16"}, ["--full_bf16: needs --mixed_precision bf16, not fp16"]),
        (
            {"full_bf16": True, "full_fp16": True, "mixed_precision": "bf16"},
            [
                "--full_bf16: can't be combined with --full_fp16; choose one",
                "--full_fp16: needs --mixed_precision fp16, not bf16",
            ],
        ),
        ({"fp8_base": True, "mixed_precision": "bf16"}, []),
        ({"fp8_base_unet": True, "mixed_precision": "fp16"}, []),
        ({"fp8_base": True}, ["--fp8_base: needs --mixed_precision bf16 or fp16, not no"]),
        ({"fp8_base_unet": True}, ["--fp8_base_unet: needs --mixed_precision bf16 or fp16, not no"]),
    ],
)
def test_16_and_8_bits_need_the_mixed_precision_that_fits(
    flags: dict[str, Any], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert [str(problem) for problem in precision_checks.problems(options(**flags))] == told


@pytest.mark.parametrize("name", ["fp8_base", "fp8_base_unet"])
def test_8_bits_are_for_modules_that_know_them(name: str) -> None:
    flags = {name: True, "mixed_precision": "bf16"}
    (problem,) = precision_checks.problems(options("lycoris.kohya", **flags))
    assert str(problem).startswith(f"--{name}: lycoris.kohya computes with the frozen weights itself")
    assert not [*precision_checks.problems(options(None, **flags))]


@pytest.mark.parametrize(("value", "refused"), [("true", True), ("TRUE", True), ("false", False), (None, False)])
def test_fp16_on_a_cpu_is_told_when_the_launcher_says_cpu(
    value: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    found = [str(problem) for problem in precision_checks.problems(options(mixed_precision="fp16"))]
    wanted = ["--mixed_precision: fp16 is hundreds of times slower on a CPU; use bf16 or no"]
    assert found == (wanted if refused else [])
    assert not [*precision_checks.problems(options(mixed_precision="bf16"))]


def test_what_has_no_effect_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    flags: dict[str, Any] = {"mem_eff_attn": True, "xformers": True, "fp8_base": True, "fp8_base_unet": True}
    said = [*precision_checks.notices(options(**flags, offload_text_encoders=True, offload_during_sampling=True))]
    assert said == [
        "--xformers: has no effect with --mem_eff_attn, which wins",
        "--fp8_base_unet: has no effect with --fp8_base, which includes the U-Net",
    ]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert [*precision_checks.notices(options(offload_text_encoders=True, offload_during_sampling=True))] == [
        "--offload_text_encoders: has no effect on a CPU, where everything is in main memory",
        "--offload_during_sampling: has no effect on a CPU, where everything is in main memory",
    ]
    assert not [*precision_checks.notices(options(xformers=True, fp8_base=True))]


@pytest.mark.parametrize(
    ("backend", "installed", "told"),
    [
        ("tvm", (), "--dynamo_backend: tvm needs tvm, which isn't installed; pip install apache-tvm, or use inductor"),
        ("tvm", ("tvm",), ""),
        ("onnxrt", (), "--dynamo_backend: this torch has no onnxrt; use inductor"),
        (
            "onnxrt",
            ("torch.onnx._internal.onnxruntime", "onnxscript"),
            "--dynamo_backend: onnxrt needs onnxruntime, which isn't installed; pip install "
            "onnxruntime-training, or use inductor",
        ),
        ("ipex", (), "--dynamo_backend: ipex needs intel_extension_for_pytorch, which isn't installed"),
        ("inductor", (), ""),
        ("aot_eager", (), ""),
    ],
)
def test_what_compilers_lack_is_told_without_torch(
    backend: str, installed: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_checks, "find_module", lambda name: None if name in installed else f"no {name}")
    found = [str(one) for one in precision_checks.problems(options(torch_compile=True, dynamo_backend=backend))]
    assert len(found) == bool(told) and all(one.startswith(told) for one in found), found
    assert not [*precision_checks.problems(options(dynamo_backend=backend))]
