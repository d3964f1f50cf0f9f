"""Lines about what has no effect or is unusual for a family; the run goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pictures import make_pictures


@pytest.mark.parametrize(
    ("family", "flags", "said"),
    [
        ("sdxl", ("--clip_skip", "1"), "--clip_skip 1: SDXL models are made for 2"),
        ("sdxl", ("--clip_skip", "2"), ""),
        ("sd1", ("--clip_skip", "2"), ""),
        ("sd1", ("--clip_skip", "3"), "made for 1 or 2"),
        ("sd1", ("--exact_crop_conditioning",), "SD1 models aren't told sizes"),
        ("sdxl", ("--exact_crop_conditioning",), ""),
        ("sd1_file", ("--variant", "fp16"), "the base model is a single file"),
        ("sdxl", ("--zero_terminal_snr",), "zero terminal SNR with a model that predicts noise"),
        ("sdxl_file", ("--zero_terminal_snr", "--v_parameterization"), ""),
        ("sdxl", ("--network_train_unet_only", "--text_encoder_lr", "1e-5"), "has no effect with"),
    ],
)
def test_one_line_or_none(
    family: str,
    flags: tuple[str, ...],
    said: str,
    tiny_models: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train_network import main

    make_pictures(tmp_path / "pictures", count=1)
    line = [
        *("--pretrained_model_name_or_path", str(tiny_models(family)), "--dry_run", "--seed", "1"),
        *("--train_data_dir", str(tmp_path / "pictures"), "--output_dir", str(tmp_path / "output")),
        *("--network_module", "networks.lora", "--resolution", "64", "--caption_extension", ".txt", *flags),
    ]
    capsys.readouterr()
    assert main(line) == 0
    heard = capsys.readouterr().err
    assert said in heard and bool(said) == bool(heard.strip())
