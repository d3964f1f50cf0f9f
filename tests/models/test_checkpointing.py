"""Which blocks are computed again, and that the result is the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model


def model_and_calls(folder: Path) -> tuple[Model, Counter[str]]:
    """A model, and what counts the calls of each of its blocks."""
    model = load(inspect(str(folder)), with_vae=False)
    calls: Counter[str] = Counter()
    parts = {"unet": model.unet, "text": model.text_encoders[0]}
    kinds = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
    for part, root in parts.items():
        for name, module in root.named_modules():
            if type(module).__name__ in kinds:
                name = f"{part} {type(module).__name__} {name}"
                inner = next(module.children())
                inner.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return model, calls


def gradients(model: Model) -> list[torch.Tensor]:
    trained = [model.unet.conv_in.weight, model.text_encoders[0].encoder.layers[0].mlp.fc1.weight]
    for one in trained:
        one.requires_grad_(True)
        one.grad = None
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    model.predict(noisy, torch.tensor([300]), model.encode_prompts(["a cat"])).square().mean().backward()
    return [one.grad for one in trained]


def share(calls: Counter[str], kind: str) -> float:
    """How many of the blocks of a kind were called twice."""
    counts = [count for name, count in calls.items() if kind in name]
    assert counts and set(counts) <= {1, 2}
    return sum(count == 2 for count in counts) / len(counts)


@pytest.mark.parametrize(
    ("given", "resnets", "attentions", "texts"),
    [
        ({}, 21 / 22, 1, 1),
        ({"every": 2}, 11 / 22, 8 / 16, 3 / 5),
        ({"every": 100}, 1 / 22, 1 / 16, 1 / 5),
        ({"attention_only": True}, 0, 1, 1),
        ({"attention_only": True, "every": 4}, 0, 4 / 16, 2 / 5),
    ],
)
def test_blocks_are_computed_again_as_asked(
    tiny_sd1: Path, given: dict[str, Any], resnets: float, attentions: float, texts: float
) -> None:
    plain = gradients(load(inspect(str(tiny_sd1)), with_vae=False))
    model, calls = model_and_calls(tiny_sd1)
    model.enable_gradient_checkpointing(**given)
    found = gradients(model)
    assert share(calls, "ResnetBlock2D") == pytest.approx(resnets)
    assert share(calls, "BasicTransformerBlock") == pytest.approx(attentions)
    assert share(calls, "CLIPEncoderLayer") == pytest.approx(texts)
    for one, expected in zip(found, plain, strict=True):
        assert torch.allclose(one, expected, rtol=1e-5, atol=1e-9) and one.abs().sum() > 0


def test_text_encoders_that_are_read_again_follow(tiny_sd1: Path) -> None:
    model = load(inspect(str(tiny_sd1)), with_vae=False, with_text_encoders=False)
    model.enable_gradient_checkpointing(every=2)
    (encoder,) = model.reload_text_encoders()
    assert encoder.training
    assert [layer.gradient_checkpointing for layer in encoder.encoder.layers] == [True, False, True, False, True]
