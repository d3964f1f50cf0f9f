"""After `--stop_text_encoder_training` the text encoders are as good as never trained: told, logged, encoded once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from library.conditioning import Conditioning
from library.models.sd1 import SD1
from library.training.text import FrozenText
from tests.training.test_readings import train

FLAGS = ("--network_module", "networks.lora", "--output_name", "x")


class Part:
    """What is asked of a network."""

    def __init__(self) -> None:
        self.multiplier, self.is_training = 1.0, True
        self.seen: list[tuple[str, float, bool]] = []

    def train(self, mode: bool) -> None:
        self.is_training = mode

    def encode(self, captions: Sequence[str]) -> Conditioning:
        self.seen += [(caption, self.multiplier, self.is_training) for caption in captions]
        return Conditioning(torch.full((len(captions), 2, 3), self.multiplier), None)


def test_each_caption_is_encoded_once_for_each_strength_and_without_dropout() -> None:
    part: Any = Part()
    text = FrozenText(part.encode, part, 2**20, torch.device("cpu"))
    assert text(["a", "b", "a"]).states.shape == (3, 2, 3)
    part.multiplier = 0.0
    assert float(text(["a"]).states.max()) == 0.0
    part.multiplier, part.is_training = 1.0, False
    text(["a", "c"])
    text(["a", "c"])
    trained, looked_at = (
        [("a", 1.0, False), ("b", 1.0, False), ("a", 0.0, False)],
        [("a", 1.0, False), ("c", 1.0, False)],
    )
    assert part.seen == trained + looked_at
    assert not part.is_training


def test_a_run_says_so_logs_no_rate_and_encodes_no_more(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes: list[int] = []
    plain = SD1.encode_prompts

    def counted(self: SD1, captions: Sequence[str]) -> Conditioning:
        sizes.append(len(captions))
        return plain(self, captions)

    monkeypatch.setattr(SD1, "encode_prompts", counted)
    assert train(tiny_sd1, tmp_path, *FLAGS, "--max_train_steps", "40", "--stop_text_encoder_training", "2") == 0
    assert "the text encoders are trained no more, after step 2" in capfd.readouterr().err
    assert sum(sizes) == 2 + 4
    lines = [json.loads(line) for line in (tmp_path / "output/x.log.jsonl").read_text().splitlines()]
    rates = [line["lr/textencoder"] for line in lines if "lr/textencoder" in line]
    assert rates == [1e-2] * 2 + [0.0] * 38


def test_nothing_left_to_train_is_refused_at_the_start(
    tiny_sd1: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_sd1, tmp_path, *FLAGS, "--unet_lr", "0", "--stop_text_encoder_training", "1") == 2
    assert "nothing would be trained after it, because the U-Net's part is left out" in capfd.readouterr().err
