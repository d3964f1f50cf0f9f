"""The benchmark for GPUs where there is none: it says so, tiny models work, and docs/performance.md has its rows."""

import re

import pytest

from tests.benchmarks import bench_gpu
from tests.programs import ROOT


@pytest.mark.parametrize("flags", [[], ["--device", "cpu"]])
def test_full_size_models_without_cuda_are_refused_in_one_line(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(flags) == 2
    told = capsys.readouterr()
    assert told.out == "" and re.fullmatch(r"bench_gpu\.py: .+\n", told.err)


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_tiny_models_are_measured_on_the_cpu(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--families", family, "--batches", "1", "--steps", "1", "--blocks", "1")
    assert bench_gpu.main(["--tiny", "--device", "cpu", *few, "--cases", "plain", "fp8", "xformers"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| S")]
    assert len(rows) == 3
    for model, _, _, what, rate, pictures, peak, share, first in rows:
        if "xformers" in what:
            assert rate.strip() == "needs CUDA"
        else:
            assert float(rate) > 0 and float(pictures) >= float(rate) * 0.99, model
            assert re.fullmatch(r" \d+\.\d\d GiB ", peak) and re.fullmatch(r" \d+% ", share)
            assert float(first.removesuffix("s ")) > 0


def test_the_page_has_a_row_for_everything_that_it_measures() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    arguments = bench_gpu.parser().parse_args([])
    arguments.sides = [512, 1024]
    for shape, name in bench_gpu.plan(arguments):
        start = f"| {bench_gpu.SHOWN[shape.family]} | {shape.side} | {shape.batch} | {bench_gpu.CASES[name].says} | "
        assert page.count(start) == 1
