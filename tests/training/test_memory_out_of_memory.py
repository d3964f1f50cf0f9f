"""Memory that runs out becomes one message, whose advice is true; and what a run needed is summed up."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.options.parse import parse
from library.training.memory_plan import MIB, Prediction, gib, on_device, predict, predict_memory
from library.training.out_of_memory import NotEnoughMemoryError, explained, remedies, shortage
from library.training.phases import Phases, peak_memory
from library.training.prepare import prepare
from tests.pictures import make_pictures

Line = Callable[..., list[str]]


@pytest.fixture
def line(tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    """The command line of a run on four pictures of 64 px."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make_pictures(tmp_path / "pictures", count=4)

    def make(*flags: object) -> list[str]:
        line = [
            *("--pretrained_model_name_or_path", tiny_models("sd1"), "--train_data_dir", tmp_path / "pictures"),
            *("--output_dir", tmp_path / "output", "--network_module", "networks.lora", "--network_dim", 4),
            *("--resolution", 64, "--caption_extension", ".txt", "--seed", 1, *flags),
        ]
        return [str(one) for one in line]

    return make


def predicted(line: list[str]) -> Prediction:
    return predict_memory(prepare(parse(line)))


@pytest.fixture
def large(line: Line) -> Prediction:
    """A run that needs gigabytes beside the libraries: the tiny model at 1024 px."""
    demand = predicted(line("--train_batch_size", 4)).demand
    return predict(replace(demand, bucket=(1024, 1024), largest=1024 * 1024))


def explode(how: str) -> None:
    if how == "torch":
        torch.empty(1 << 50, dtype=torch.uint8)
    elif how == "python":
        bytearray(1 << 62)
    else:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("how", ["torch", "python", "cuda"])
def test_one_message_for_memory_that_ran_out(how: str, large: Prediction) -> None:
    phases = Phases()
    attempt = pytest.raises(NotEnoughMemoryError)
    with attempt as caught, explained(phases, large), phases.phase("steps"), phases.phase("previews"):
        explode(how)
    told = str(caught.value)
    assert "'previews'" in told and gib(large.total) in told and gib(peak_memory()) in told
    assert "--gradient_checkpointing" in told
    assert isinstance(caught.value.__cause__, MemoryError | RuntimeError)


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("shapes (2, 3) and (4, 5) cannot be multiplied"), ValueError("out of memory"), OSError(12, "x")],
)
def test_other_errors_stay_what_they_are(fault: Exception, large: Prediction) -> None:
    with pytest.raises(type(fault)) as caught, explained(Phases(), large):
        raise fault
    assert caught.value is fault


def test_the_phase_is_that_of_the_error_and_not_of_one_that_was_dealt_with(large: Prediction) -> None:
    phases = Phases()
    with phases.phase("steps"), pytest.raises(MemoryError), phases.phase("validation"):
        raise MemoryError
    attempt = pytest.raises(NotEnoughMemoryError, match="'saving'")
    with attempt, explained(phases, large), phases.phase("steps"), phases.phase("saving"):
        raise MemoryError


def test_a_gpu_with_too_little_is_named_and_others_are_not(large: Prediction) -> None:
    assert shortage(large, 0) is None
    on_gpu = on_device(large, "cuda")
    assert on_gpu.device == "cuda" and on_device(on_gpu, "cuda") is on_gpu
    assert on_device(on_gpu, "cpu").total == large.total
    assert shortage(on_gpu, on_gpu.total) is None
    told = shortage(on_gpu, on_gpu.total - 1)
    assert told is not None and gib(on_gpu.total) in told and "--gradient_checkpointing" in told


def test_previews_can_have_the_gpu_for_themselves(large: Prediction) -> None:
    demand = replace(large.demand, device="cuda", preview=(512, 512))
    alone = predict(replace(demand, offloads_previews=True)).moments["previews"]
    assert alone < predict(demand).moments["previews"]


def test_advice_is_ordered_and_each_helps(large: Prediction) -> None:
    lines = remedies(large)
    sizes = [line.rpartition("about ")[2] for line in lines]
    numbers = [float(size.split()[0]) * (1024 if size.endswith("GiB") else 1) for size in sizes]
    assert 2 <= len(lines) <= 5
    assert numbers == sorted(numbers)
    assert max(numbers) < large.total / MIB


def test_advice_names_no_setting_that_is_on(line: Line) -> None:
    flags = ("--gradient_checkpointing", "--mixed_precision", "bf16", "--cache_latents", "--train_batch_size", 1)
    demand = replace(predicted(line(*flags)).demand, bucket=(2048, 2048), largest=2048 * 2048)
    told = "\n".join(remedies(predict(demand)))
    for known in ("--gradient_checkpointing:", "--mixed_precision", "--cache_latents:", "--train_batch_size"):
        assert known not in told


@pytest.mark.parametrize(
    ("before", "advice"),
    [
        ((), "--mixed_precision bf16"),
        ((), "--gradient_checkpointing"),
        (("--train_batch_size", 4), "--train_batch_size 2 --gradient_accumulation_steps 2"),
        (("--train_batch_size", 3), "--train_batch_size 1 --gradient_accumulation_steps 3"),
        ((), "--cache_latents"),
        ((), "--network_train_unet_only --cache_text_encoder_outputs"),
        (("--network_train_unet_only",), "--cache_text_encoder_outputs"),
        (("--gradient_checkpointing", "--gradient_checkpointing_every", 3), "--gradient_checkpointing_every 1"),
        (("--mixed_precision", "bf16"), "--fp8_base"),
        ((), "--optimizer_type AdamW8bit"),
        (("--cache_latents",), "--cache_latents_to_disk"),
    ],
)
def test_advice_says_what_a_run_with_it_is_predicted_to_need(
    before: tuple[object, ...], advice: str, line: Line
) -> None:
    """The changed demand of the advice equals that of a command line with the advised flags, as far as sizes go."""
    from library.training.out_of_memory import _changes

    start = predicted(line(*before)).demand
    found = dict(_changes(start))
    flags = [*map(str, before)]
    words = advice.split()
    for word in words:
        if word.startswith("--") and word in flags:
            place = flags.index(word)
            del flags[place : place + 2]
    wanted = predicted(line(*flags, *words))
    mine = found[advice]
    assert predict(replace(mine, latents_bytes=0, text_bytes=0)).total == pytest.approx(
        predict(replace(wanted.demand, latents_bytes=0, text_bytes=0)).total, rel=1e-6
    )


def test_the_summary_has_what_was_predicted_and_where_the_peak_was(large: Prediction) -> None:
    phases = Phases()
    with phases.phase("model"):
        pass
    with phases.phase("steps"):
        held = torch.ones(48 * MIB)
        more = torch.ones(int(max(0, peak_memory() - _resident()) / 4) + 16 * MIB)
        assert held[0] == more[0]
    summary = phases.summary(2, large)
    assert f"predicted {large.total / 2**30:.2f} GiB" in summary
    assert phases.peak_phase == "steps"
    assert f"peak memory {peak_memory() / 2**30:.2f} GiB (steps)" in summary
    assert "a step" in summary and "predicted" not in phases.summary(2)


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_peak_memory_is_this_programs_own() -> None:
    """A child's figure doesn't start with that of the process that started it, as getrusage's would."""
    import subprocess
    import sys

    from tests.programs import ROOT, environment

    held = torch.ones(256 * MIB // 4 * 2)
    code = "from library.training.phases import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert held[0] == 1 and 0 < int(done.stdout) < peak_memory() - 256 * MIB, done.stderr
