"""Two processes see the same samples and noise as one with the same global batch, and stop together."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.pictures import make_pictures
from tests.programs import SCRIPT, environment

DECAY = ("--optimizer_args", "weight_decay=0.5", "eps=1e-3")


def arguments(model: Path, folder: Path, name: str, batch_size: int) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / "pictures")),
        *("--output_dir", str(folder / "output"), "--output_name", name, "--network_module", "tests.signalling_lora"),
        *("--network_dim", "4", "--network_dropout", "0.2", "--resolution", "64", "--enable_bucket"),
        *("--min_bucket_reso", "32", "--bucket_reso_steps", "16", "--caption_extension", ".txt", "--shuffle_caption"),
        *("--train_batch_size", str(batch_size), "--max_train_steps", "6", "--seed", "4", "--learning_rate", "1e-3"),
        *("--optimizer_args", "eps=1e-3", "--cache_latents_to_disk", "--max_data_loader_n_workers", "0"),
    ]


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    variables = environment(ACCELERATE_USE_CPU="true", **extra)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def two(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]


def assert_equal_weights(output: Path) -> None:
    """The runs `one` and `both` have trained the same."""
    first, second = (load_file(output / f"{name}.safetensors") for name in ("one", "both"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert np.allclose(tensor, second[key], rtol=1e-3, atol=2e-5), key


def test_two_processes_equal_one_with_twice_the_batch(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=7)
    one = run([sys.executable, str(SCRIPT), *arguments(tiny_sd1, tmp_path, "one", 4)])
    assert one.returncode == 0, one.stderr
    (tmp_path / "prompts.txt").write_text("a thing --w 64 --h 64 --s 1\n")
    previews = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first", "--sample_every_n_steps", "3"]
    both = run(two(str(SCRIPT), *arguments(tiny_sd1, tmp_path, "both", 2), *previews))
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("saved ") == 1
    assert len(list((tmp_path / "output/sample").glob("both_0*.png"))) == 3
    assert_equal_weights(tmp_path / "output")


def test_a_process_without_samples_scales_its_loss_too(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=1, repeats=1)
    words = [*arguments(tiny_sd1, tmp_path, "x", 1), "--network_module", "tests.scaling_lora"]
    both = run(two(str(SCRIPT), *words, "--max_train_steps", "2", "--save_state"))
    assert both.returncode == 0, both.stderr
    again = run(two(str(SCRIPT), *words, "--max_train_steps", "3", "--resume", "latest", "--resume_schedule", "keep"))
    assert again.returncode == 0, again.stderr


def test_a_signal_to_one_process_stops_both_with_one_state(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=7)
    stopped = run(two(str(SCRIPT), *arguments(tiny_sd1, tmp_path, "x", 2)), LORASMITH_TEST_SIGNAL="rank1:TERM@3")
    assert stopped.returncode != 0
    manifest = json.loads((tmp_path / "output/x-step00000003-state/manifest.json").read_text())
    assert manifest["updates_done"] == 3
    assert (tmp_path / "output/x-step00000003.safetensors").is_file()
    assert not (tmp_path / "output/x.safetensors").exists()


def test_two_processes_share_the_work_of_text_outputs(tiny_sdxl: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=7)
    (tmp_path / "prompts.txt").write_text("a thing --w 64 --h 64 --s 1\n")
    more = [
        *("--network_module", "networks.lora", "--network_train_unet_only", "--cache_text_encoder_outputs_to_disk"),
        *("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "6"),
    ]

    def line(name: str, batch_size: int) -> list[str]:
        given = [word for word in arguments(tiny_sdxl, tmp_path, name, batch_size) if word != "--shuffle_caption"]
        return [str(SCRIPT), *given, *more]

    both = run(two(*line("both", 2)))
    assert both.returncode == 0, both.stderr
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").rglob("*_te_outputs.npz")}
    assert len(files) == 7
    one = run([sys.executable, *line("one", 4)])
    assert one.returncode == 0, one.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in files.items())
    assert_equal_weights(tmp_path / "output")


def test_what_has_no_gradient_is_passed_over_with_any_number_of_processes(tiny_sdxl: Path, tmp_path: Path) -> None:
    """The last layer of SDXL's first text encoder has none; a zero in its place would let weight decay change it."""
    make_pictures(tmp_path / "pictures", count=4)

    def line(name: str, batch_size: int) -> list[str]:
        more = ("--network_module", "networks.lora", "--max_train_steps", "2", "--network_dropout", "0")
        return [str(SCRIPT), *arguments(tiny_sdxl, tmp_path, name, batch_size), *more, *DECAY]

    both = run(two(*line("both", 1)))
    one = run([sys.executable, *line("one", 2)])
    assert both.returncode == one.returncode == 0, both.stderr + one.stderr
    first, second = (load_file(tmp_path / f"output/{name}.safetensors") for name in ("one", "both"))
    last = [key for key in first if key.startswith("lora_te1_text_model_encoder_layers_4_") and "down" in key]
    assert len(last) == 6
    assert all(np.array_equal(first[key], second[key]) for key in last)
