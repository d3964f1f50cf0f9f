"""Runs that train the vectors of new tokens, alone or with a network, and what they leave."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.pictures import make_pictures
from tests.programs import ROOT, SCRIPT, Around, environment, launch_command

TI_SCRIPT = ROOT / "train_textual_inversion.py"
TOKENS = ("blorp", "zorbik")
COUNTS = (2, 1)
NOT_COMPARED = {
    "ss_training_started_at",
    "ss_training_finished_at",
    "modelspec.date",
    "sshs_model_hash",
    "sshs_legacy_hash",
}


def pictures_of_tokens(folder: Path, count: int = 6) -> Path:
    """Pictures of several sizes, an epoch shows each once; captions hold both tokens."""
    make_pictures(folder, count=count, repeats=1, name="blorp")
    for number, file in enumerate(sorted(folder.rglob("*.txt"))):
        file.write_text(f"a blorp, a Zorbik, tag{number}, red\n", encoding="utf-8")
    return folder


def arguments(model: Path, pictures: Path, output: Path, *more: object) -> list[str]:
    """What both scripts are given: two tokens of two and one vectors, seed, rates and small pictures."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(pictures)),
        *("--output_dir", str(output), "--output_name", "run", "--resolution", "64", "--caption_extension", ".txt"),
        *("--token_string", *TOKENS, "--num_vectors_per_token", "2", "1", "--init_word", "cat", "dog"),
        *("--learning_rate", "1e-2", "--seed", "5", "--train_batch_size", "2", "--max_data_loader_n_workers", "0"),
        *map(str, more),
    ]


LORA = ("--network_module", "networks.lora", "--network_dim", "2", "--network_alpha", "1")


def train(*given: Any) -> int:
    """train_textual_inversion.py in this process; its exit code."""
    from train_textual_inversion import main

    return main(arguments(*given))


def train_both(*given: Any) -> int:
    """train_network.py in this process; its exit code."""
    from train_network import main

    return main(arguments(*given))


def start(script: Path, words: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    """A script in one process, or under torchrun in several."""
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, *(several if processes > 1 else ()), str(script), *words]
    variables = environment(ACCELERATE_USE_CPU="true")
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


def launch(script: Path, words: list[str], around: Around) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --cpu` of a script."""
    launcher = launch_command()
    assert launcher.pop() == str(SCRIPT)
    command = [*around.prefix, *launcher, str(script), *words]
    variables = environment() | dict(around.variables)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


@dataclass(frozen=True)
class Watched:
    """A run's model, as the run left it, and the vocabulary's tables as they were read."""

    model: Any
    tables: tuple[torch.Tensor, ...]


@contextmanager
def watched_models() -> Iterator[list[Watched]]:
    """Every model that runs of this process load meanwhile."""
    from library.training.loading import load_model

    found: list[Watched] = []

    def loading(*given: Any, **named: Any) -> Any:
        model = load_model(*given, **named)
        tables = tuple(model.embedding_table(place).clone() for place in range(len(model.text_widths)))
        found.append(Watched(model, tables))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("library.training.session.load_model", loading)
        yield found


def tensors(path: Path) -> dict[str, bytes]:
    """A file's tensors, by their bits."""
    return {name: bits(tensor) for name, tensor in load_file(path).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def metadata(path: Path) -> dict[str, str]:
    """What a file tells, but for times."""
    with safe_open(path, "pt") as file:
        return {name: text for name, text in file.metadata().items() if name not in NOT_COMPARED}


def vectors(folder: Path, stem: str = "run") -> dict[str, dict[str, bytes]]:
    """The bits of every token's file of a save."""
    return {token: tensors(folder / f"{stem}-{token}.safetensors") for token in TOKENS}


def optimizer(folder: Path) -> dict[str, Any]:
    """What a state keeps beside the trained tensors; tensors as bits."""
    found = plain(torch.load(folder / "optimizer.pt", weights_only=True))
    assert isinstance(found, dict)
    return found


def plain(value: Any) -> Any:
    """The same with bits and shapes in place of tensors, so that it compares."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), bits(value)
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def assert_same_end(one: Path, other: Path, *files: str) -> None:
    """Two runs have ended with the same files, metadata but for times, states and optimizers."""
    for name in files:
        assert tensors(one / name) == tensors(other / name), name
        assert metadata(one / name) == metadata(other / name), name
    assert tensors(one / "run-state/trained.safetensors") == tensors(other / "run-state/trained.safetensors")
    assert optimizer(one / "run-state") == optimizer(other / "run-state")


def names(folder: Path) -> set[str]:
    """Every weight file under a folder, relative to it."""
    found = (Path(place) / name for place, _, inner in os.walk(folder) for name in inner if "-state" not in place)
    return {str(path.relative_to(folder)) for path in found if path.suffix in (".pt", ".safetensors", ".ckpt")}
