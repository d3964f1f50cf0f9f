"""Bad input: exit code 2, one message that says what is wrong and where, and nothing heavy was imported."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.pictures import SIZES, make_pictures
from tests.programs import environment

RUN = "import sys, train_network as t; code = t.main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"


@dataclass
class Job:
    """A good command line for a tiny model; a case spoils one thing of it."""

    folder: Path
    model: Path
    options: dict[str, str] = field(default_factory=dict)
    sizes: Sequence[tuple[int, int]] = SIZES

    def __post_init__(self) -> None:
        make_pictures(self.folder / "pictures", count=3, sizes=self.sizes)
        self.options = {
            "--pretrained_model_name_or_path": str(self.model),
            "--train_data_dir": str(self.folder / "pictures"),
            "--output_dir": str(self.folder / "output"),
            "--output_name": "x",
            "--network_module": "networks.lora",
            "--network_dim": "2",
            "--resolution": "64",
            "--caption_extension": ".txt",
            "--max_train_steps": "1",
        }

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self) -> subprocess.CompletedProcess[str]:
        arguments = [part for pair in self.options.items() for part in pair]
        return subprocess.run(
            [sys.executable, "-c", RUN, *arguments],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def missing_model(job: Job) -> list[str]:
    job.options["--pretrained_model_name_or_path"] = str(job.folder / "no-such-model.safetensors")
    return ["no-such-model.safetensors"]


def no_pictures(job: Job) -> list[str]:
    for path in (job.folder / "pictures/2_thing").iterdir():
        path.unlink()
    return ["2_thing", "no picture"]


def misspelt_dataset_key(job: Job) -> list[str]:
    subset = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{job.folder}/pictures/2_thing"\n'
    text = f"[general]\nshuffle_captoin = true\n{subset}"
    del job.options["--train_data_dir"]
    job.options["--dataset_config"] = str(job.write("data.toml", text))
    return ["data.toml:2", "shuffle_captoin", "shuffle_caption"]


def misspelt_config_key(job: Job) -> list[str]:
    job.options["--config_file"] = str(job.write("job.toml", "[training]\nlearning_rate = 1e-4\nlerning_rate = 1e-4\n"))
    return ["job.toml:3", "lerning_rate", "learning_rate"]


def wrong_type(job: Job) -> list[str]:
    del job.options["--network_dim"]
    job.options["--config_file"] = str(job.write("job.toml", '\nnetwork_dim = "many"\n'))
    return ["job.toml:2", "network_dim", "many"]


def text_named_png(job: Job) -> list[str]:
    job.write("pictures/2_thing/picture01.png", "this is no picture")
    return ["picture01.png"]


def truncated_jpeg(job: Job) -> list[str]:
    path = job.folder / "pictures/2_thing/picture00.jpg"
    Image.effect_noise((80, 80), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-200])
    return ["picture00.jpg", "end"]


def missing_output_dir(job: Job) -> list[str]:
    del job.options["--output_dir"]
    return ["--output_dir"]


def impossible_output_dir(job: Job) -> list[str]:
    job.options["--output_dir"] = str(job.write("file", "x") / "below")
    return ["--output_dir", "file"]


def truncated_base_model(job: Job) -> list[str]:
    import numpy as np

    path = job.folder / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": np.zeros((320, 4, 3, 3), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    job.options["--pretrained_model_name_or_path"] = str(path)
    return ["model.safetensors"]


def resolution_outside_limits(job: Job) -> list[str]:
    job.options |= {"--resolution": "2048", "--enable_bucket": "", "--max_bucket_reso": "1024"}
    job.options = {key: value for key, value in job.options.items() if value}
    job.options["--config_file"] = str(job.write("job.toml", "enable_bucket = true\n"))
    return ["2048", "1024", "max_bucket_reso"]


def unknown_network_module(job: Job) -> list[str]:
    job.options["--network_module"] = "networks.lorra"
    return ["networks.lorra", "networks.lora"]


def decay_longer_than_the_run(job: Job) -> list[str]:
    job.options |= {"--lr_scheduler": "warmup_stable_decay", "--lr_warmup_steps": "2", "--lr_decay_steps": "5"}
    return ["--lr_decay_steps", "2 steps of warmup", "all 1 steps"]


def compiler_that_is_not_here(job: Job) -> list[str]:
    job.options["--config_file"] = str(job.write("job.toml", 'torch_compile = true\ndynamo_backend = "ipex"\n'))
    return ["job.toml:2", "ipex", "inductor"]


def network_without_a_module(job: Job) -> list[str]:
    zeros = ",".join("0" * 25)
    args = f'network_args = ["block_dims={zeros}"]\nnetwork_train_unet_only = true\n'
    job.options["--config_file"] = str(job.write("job.toml", args))
    return ["network_args", "nothing is left to train"]


CASES = [
    missing_model,
    no_pictures,
    misspelt_dataset_key,
    misspelt_config_key,
    wrong_type,
    text_named_png,
    truncated_jpeg,
    missing_output_dir,
    impossible_output_dir,
    truncated_base_model,
    resolution_outside_limits,
    unknown_network_module,
    decay_longer_than_the_run,
    compiler_that_is_not_here,
    network_without_a_module,
]


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_one_clear_message(spoil: Callable[[Job], list[str]], tmp_path: Path, tiny_sd1: Path) -> None:
    job = Job(tmp_path, tiny_sd1)
    words = spoil(job)
    result = job.run()
    assert result.returncode == 2, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "False", "torch was imported"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "output").exists()
