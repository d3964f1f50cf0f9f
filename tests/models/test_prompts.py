"""Captions to token rows and text states, against recorded rows and transformers used by hand."""

import json
from pathlib import Path

import pytest
import torch

from library.models.inspect import inspect
from library.models.load import load
from library.models.prompts import token_rows
from library.models.sd1 import Model

LONG = ", ".join(f"tag number {n} here" for n in range(40))


def rows_of(recorded: list[list[int | list[int]]]) -> list[list[int]]:
    """Run-length coded rows, written out."""
    return [
        [token for one in row for token in ([one] if isinstance(one, int) else [one[0]] * one[1])] for row in recorded
    ]


def test_recorded_rows(repo_root: Path) -> None:
    vectors = json.loads((repo_root / "tests" / "data" / "token_chunks_sd1.json").read_text())
    assert {vector["max_token_length"] for vector in vectors} == {75, 150, 225}
    for vector in vectors:
        rows = token_rows([vector["caption"]], vector["max_token_length"])
        assert list(rows.shape[1:]) == vector["shape"]
        assert rows[0].tolist() == rows_of(vector["rows_run_length"]), vector["caption"][:60]


@pytest.fixture(scope="module")
def model(tiny_sd1: Path) -> Model:
    return load(inspect(tiny_sd1), parts=())


def by_hand(model: Model, caption: str, words: int, clip_skip: int | None) -> torch.Tensor:
    """BEHAVIOUR 6.4 word for word, with transformers' public outputs."""
    encoder = model.text_encoders[0]
    states = []
    for row in token_rows([caption], words)[0]:
        output = encoder(row[None], output_hidden_states=True)
        layer = output.hidden_states[-(clip_skip or 1)]
        states.append(encoder.final_layer_norm(layer)[0])
    pieces = [states[0][:1], *(state[1:76] for state in states), states[-1][76:]]
    return torch.cat(pieces)


@pytest.mark.parametrize("words", [75, 150, 225])
@pytest.mark.parametrize("clip_skip", [None, 1, 2, 4])
def test_states_are_those_of_transformers(tiny_sd1: Path, words: int, clip_skip: int | None) -> None:
    model = load(inspect(tiny_sd1), parts=(), clip_skip=clip_skip, max_token_length=words)
    states = model.encode_prompts(["a cat", LONG])
    assert states.shape == (2, words + 2, 32)
    for caption, state in zip(["a cat", LONG], states, strict=True):
        assert torch.allclose(state, by_hand(model, caption, words, clip_skip), atol=2e-6)


def test_clip_skip_changes_states(tiny_sd1: Path, model: Model) -> None:
    skipping = load(inspect(tiny_sd1), parts=(), clip_skip=2)
    assert not torch.allclose(skipping.encode_prompts(["a cat"]), model.encode_prompts(["a cat"]), atol=1e-3)


def test_gradients_reach_the_text_encoder(tiny_sd1: Path) -> None:
    model = load(inspect(tiny_sd1), parts=(), clip_skip=2)
    layers = model.text_encoders[0].encoder.layers
    layers.requires_grad_(True)
    model.encode_prompts(["a cat"]).square().sum().backward()
    assert layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert layers[4].mlp.fc1.weight.grad is None


def test_memoised_states_are_kept_and_don_t_depend_on_the_batch(model: Model) -> None:
    model.forget_prompts()
    together = model.encode_prompts(["a cat", LONG, "a cat"], memoise=True)
    model.forget_prompts()
    alone = model.encode_prompts([LONG], memoise=True)
    assert torch.equal(together[1], alone[0]) and torch.equal(together[0], together[2])
    assert not together.requires_grad
    assert torch.allclose(together, model.encode_prompts(["a cat", LONG, "a cat"]), atol=2e-6)
    calls = []
    handle = model.text_encoders[0].register_forward_hook(lambda *_: calls.append(1))
    model.encode_prompts([LONG, LONG], memoise=True)
    model.encode_prompts(["something new"], memoise=True)
    handle.remove()
    assert len(calls) == 1


def test_memo_is_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.models.sd1._MEMO_BYTES", 3 * 77 * 32 * 4)
    model.forget_prompts()
    model.encode_prompts([f"caption {n}" for n in range(10)], memoise=True)
    assert len(model._memo) == 3
