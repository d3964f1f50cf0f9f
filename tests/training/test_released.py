"""What a run no longer needs is let go: the VAE after latents and previews, text encoders after their outputs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from library.models.load import load as load_everything
from library.options import Options
from library.training import loading
from tests.pictures import make_pictures

CACHED = ("--cache_latents_to_disk", "--network_train_unet_only", "--cache_text_encoder_outputs")


@pytest.mark.parametrize(("family", "ending"), [("sd1", "_sd.npz"), ("sdxl", "_sdxl.npz")])
@pytest.mark.parametrize(("flags", "held"), [(CACHED, False), (("--network_train_unet_only",), True)])
def test_parts_that_are_cached_are_let_go(
    flags: tuple[str, ...],
    held: bool,
    family: str,
    ending: str,
    tiny_models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from train_network import main

    loaded: list[Any] = []

    def load(*given: Any, **more: Any) -> Any:
        loaded.append(load_everything(*given, **more))
        return loaded[-1]

    monkeypatch.setattr(loading, "load", load)
    make_pictures(tmp_path / "pictures", count=2)
    (tmp_path / "prompts.txt").write_text("a red shape --s 1 --w 64 --h 64 --d 1\n")
    line = [
        *("--pretrained_model_name_or_path", str(tiny_models(family)), "--train_data_dir", str(tmp_path / "pictures")),
        *("--output_dir", str(tmp_path / "output"), "--network_module", "networks.lora", "--resolution", "64"),
        *("--caption_extension", ".txt", "--max_train_steps", "2", "--sample_every_n_steps", "1", "--seed", "1"),
        *("--sample_prompts", str(tmp_path / "prompts.txt"), *flags),
    ]
    assert main(line) == 0
    (model,) = loaded
    assert bool(model.text_encoders) == held
    assert (model.vae is not None) == held
    assert len(list((tmp_path / "pictures").rglob(f"*{ending}"))) == (0 if held else 2)


@pytest.mark.parametrize(
    ("dtype", "no_half_vae", "fragile", "expected"),
    [
        (torch.float16, False, False, torch.float16),
        (torch.float16, False, True, torch.float32),
        (torch.float16, True, False, torch.float32),
        (torch.bfloat16, False, True, torch.bfloat16),
        (torch.bfloat16, True, False, torch.float32),
        (torch.float32, False, True, torch.float32),
    ],
)
def test_precision_of_the_vae(
    dtype: torch.dtype, no_half_vae: bool, fragile: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(loading, "load", lambda info, **more: asked.update(more))
    precision = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    flags = Options().model.model_copy(update={"no_half_vae": no_half_vae, "mixed_precision": precision})
    options = Options().model_copy(update={"model": flags})
    processes = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    loading.load_model(options, cast(Any, SimpleNamespace(vae_fragile=fragile)), cast(Any, processes))
    assert asked["vae_dtype"] == expected
