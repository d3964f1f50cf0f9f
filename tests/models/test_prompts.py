"""Captions to token rows and text states, against recorded rows and transformers used by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model
from library.models.prompts import token_rows, weighted_rows
from library.tokenizer import END_ID, START_ID, VOCABULARY_SIZE
from library.tokenizer.vocabulary import NewToken, Vocabulary

LONG = ", ".join(f"tag number {n} here" for n in range(40))
VECTORS = json.loads((Path(__file__).parents[1] / "data/vectors/token_chunks.json").read_text())
PADDING = {"sd1_and_sdxl_1": END_ID, "sd2_and_sdxl_2": 0}
Find = Callable[[str], Path]


def rows_of(recorded: list[list[int | list[int]]]) -> list[list[int]]:
    """Run-length coded rows, written out."""
    return [
        [token for one in row for token in ([one] if isinstance(one, int) else [one[0]] * one[1])] for row in recorded
    ]


@pytest.mark.parametrize("tokenizer", PADDING)
def test_recorded_rows(tokenizer: str) -> None:
    vectors = [vector for vector in VECTORS if vector["tokenizer"] == tokenizer]
    assert {vector["max_token_length"] for vector in vectors} == {75, 150, 225} and len(vectors) == 30
    for vector in vectors:
        rows = token_rows([vector["caption"]], vector["max_token_length"], PADDING[tokenizer])
        assert list(rows.shape[1:]) == vector["shape"]
        assert rows[0].tolist() == rows_of(vector["rows_run_length"]), vector["caption"][:60]
        plain, weights = weighted_rows([vector["caption"]], vector["max_token_length"], PADDING[tokenizer])
        assert torch.equal(plain, rows) and torch.equal(weights, torch.ones(weights.shape))


def test_a_length_that_is_no_number_of_rows() -> None:
    with pytest.raises(ValueError, match="multiple of 75"):
        token_rows(["a cat"], 100)


@pytest.mark.parametrize("pad_id", [END_ID, 0])
def test_each_vector_of_a_new_token_is_a_word_of_a_row(pad_id: int) -> None:
    tokens = Vocabulary((NewToken("mycat", 3), NewToken("mydog")))
    cat, dog, word = [*range(VOCABULARY_SIZE, VOCABULARY_SIZE + 3)], VOCABULARY_SIZE + 3, 2653
    captions = ["a MyCat", "word " * 74 + "mycat mydog", "mydog " * 80]
    short = token_rows(captions, 75, pad_id, tokens)
    assert short.shape == (3, 1, 77)
    assert short[0, 0].tolist() == [START_ID, 320, *cat, END_ID, *[pad_id] * 71]
    assert short[1, 0].tolist() == [START_ID, *[word] * 74, cat[0], END_ID], "words beyond the row are cut off"
    assert short[2, 0].tolist() == [START_ID, *[dog] * 75, END_ID]
    rows = token_rows(captions, 150, pad_id, tokens)
    assert rows[1, 0].tolist()[:76] == [START_ID, *[word] * 74, cat[0]]
    assert rows[1, 1].tolist()[:6] == [START_ID, *cat[1:], dog, END_ID, pad_id]
    plain, weights = weighted_rows(captions, 150, pad_id, tokens)
    assert torch.equal(plain, rows) and torch.equal(weights, torch.ones(weights.shape))


def test_all_vectors_of_a_new_token_weigh_what_it_weighs() -> None:
    tokens = Vocabulary((NewToken("mycat", 3), NewToken("mydog")))
    first, second, third, dog = range(VOCABULARY_SIZE, VOCABULARY_SIZE + 4)
    wanted = {
        "(mycat:1.5) mydog": [(first, 1.5), (second, 1.5), (third, 1.5), (dog, 1.0)],
        "mycat (mycat1:0.5) [mydog]": [(first, 1.0), (second, 0.5), (dog, 1 / 1.1)],
        "(mycat:2)(mycat:3)": [(one, weight) for weight in (2.0, 3.0) for one in (first, second, third)],
        "a (mycat": [(320, 1.0), (first, 1.1), (second, 1.1), (third, 1.1)],
    }
    for caption, pairs in wanted.items():
        rows, weights = weighted_rows([caption], 75, END_ID, tokens)
        end = len(pairs) + 1
        assert rows[0, 0, :end].tolist() == [START_ID, *(word for word, _ in pairs)], caption
        assert weights[0, 0].tolist() == pytest.approx([1.0, *(weight for _, weight in pairs), *[1.0] * (77 - end)])
    rows, weights = weighted_rows(["word " * 74 + "(mycat:2)"], 75, END_ID, tokens)
    assert rows[0, 0, 75:].tolist() == [first, END_ID] and weights[0, 0, 74:].tolist() == [1.0, 2.0, 1.0]


def by_hand(model: Model, caption: str, layer: int, *, norm: bool, index: int = 0) -> torch.Tensor:
    """BEHAVIOUR 6.4 word for word, with transformers' public outputs."""
    encoder, pad_id = model.text_encoders[index], model.family.text_encoders[index].pad_id
    states = []
    for row in token_rows([caption], model.max_words, pad_id)[0]:
        hidden = encoder(row[None], output_hidden_states=True).hidden_states[-layer]
        states.append((encoder.final_layer_norm(hidden) if norm else hidden)[0])
    return torch.cat([states[0][:1], *(state[1:76] for state in states), states[-1][76:]])


@pytest.mark.parametrize("words", [75, 150, 225])
@pytest.mark.parametrize("clip_skip", [None, 1, 2, 4])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_states_are_those_of_transformers(tiny_models: Find, family: str, words: int, clip_skip: int | None) -> None:
    model = load(inspect(str(tiny_models(family))), with_vae=False, clip_skip=clip_skip, max_token_length=words)
    conditioning = model.encode_prompts(["a cat", LONG])
    assert conditioning.pooled is None
    assert conditioning.states.shape == (2, words + 2, sum(model.text_widths))
    for caption, state in zip(["a cat", LONG], conditioning.states, strict=True):
        assert torch.allclose(state, by_hand(model, caption, clip_skip or 1, norm=True), atol=2e-6)


@pytest.mark.parametrize("words", [75, 225])
@pytest.mark.parametrize("clip_skip", [None, 1, 2, 4])
def test_sdxl_states_and_pooled_output(tiny_sdxl: Path, words: int, clip_skip: int | None) -> None:
    model = load(inspect(str(tiny_sdxl)), with_vae=False, clip_skip=clip_skip, max_token_length=words)
    conditioning = model.encode_prompts(["a cat", LONG, ""])
    assert model.text_widths == (32, 64) and conditioning.states.shape == (3, words + 2, 96)
    for caption, state in zip(["a cat", LONG, ""], conditioning.states, strict=True):
        halves = [by_hand(model, caption, clip_skip or 2, norm=False, index=index) for index in (0, 1)]
        assert torch.allclose(state, torch.cat(halves, dim=-1), atol=2e-6)
    first_rows = token_rows(["a cat", LONG, ""], words, 0)[:, 0]
    pooled = model.text_encoders[1](first_rows).text_embeds
    assert conditioning.pooled is not None and torch.allclose(conditioning.pooled, pooled, atol=2e-6)


def test_the_pooled_output_trusts_no_end_id_of_a_config(tiny_sdxl: Path) -> None:
    model = load(inspect(str(tiny_sdxl)), with_vae=False)
    before = model.encode_prompts(["a cat"]).pooled
    model.text_encoders[1].text_model.eos_token_id = 320
    after = model.encode_prompts(["a cat"]).pooled
    assert before is not None and after is not None and torch.equal(before, after)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_layer_that_counts(tiny_models: Find, family: str, checkpointing: bool) -> None:
    model = load(inspect(str(tiny_models(family))), with_vae=False, clip_skip=2)
    if checkpointing:
        model.enable_gradient_checkpointing()
    for encoder in model.text_encoders:
        encoder.requires_grad_(True)
    conditioning = model.encode_prompts(["a cat"])
    loss = conditioning.states.square().sum()
    if conditioning.pooled is not None:
        loss = loss + conditioning.pooled.square().sum()
    loss.backward()
    for index, encoder in enumerate(model.text_encoders):
        layers = getattr(encoder, "text_model", encoder).encoder.layers
        assert all(layer.mlp.fc1.weight.grad.abs().sum() > 0 for layer in layers[:4])
        reaches_the_last = index == 1
        assert (layers[4].mlp.fc1.weight.grad is not None) == reaches_the_last


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_checkpointing_changes_no_gradient(tiny_models: Find, family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(inspect(str(tiny_models(family))), with_vae=False, clip_skip=2, max_token_length=150)
        if checkpointing:
            model.enable_gradient_checkpointing()
        weights = [getattr(one, "text_model", one).encoder.layers[0].mlp.fc1.weight for one in model.text_encoders]
        for weight in weights:
            weight.requires_grad_(True)
        model.encode_prompts(["a cat", LONG]).states.square().sum().backward()
        gradients.append([weight.grad for weight in weights])
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_states_have_the_model_s_dtype(tiny_models: Find, family: str) -> None:
    low = load(inspect(str(tiny_models(family))), dtype=torch.bfloat16, with_vae=False, weighted=True)
    conditioning = low.encode_prompts(["a (cat:1.3)"])
    assert conditioning.states.dtype == torch.bfloat16
    assert conditioning.pooled is None or conditioning.pooled.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_released_encoders_come_back_as_they_were(tiny_models: Find, family: str) -> None:
    model = load(inspect(str(tiny_models(family))), with_vae=False, dtype=torch.bfloat16)
    model.enable_gradient_checkpointing()
    before, identity = model.encode_prompts(["a cat"]), model.text_encoder_id()
    model.release_text_encoders()
    assert len(model.text_encoders) == 0
    assert torch.equal(model.encode_prompts(["a cat"]).states, before.states)
    assert model.text_encoder_id() == identity
    encoders, given = model.reload_text_encoders(), model.network_text_encoder
    assert len(encoders) == len(model.text_widths) and all(one.training for one in encoders)
    assert given == list(encoders) if family == "sdxl" else given is encoders[0]


def test_the_id_of_text_encoders_is_of_all_that_makes_states(tiny_sd1: Path, tiny_sdxl: Path) -> None:
    info = inspect(str(tiny_sd1))
    ids = [
        load(info, with_vae=False).text_encoder_id(),
        load(info, with_vae=False, dtype=torch.bfloat16).text_encoder_id(),
        load(info, with_vae=False, clip_skip=2).text_encoder_id(),
        load(info, with_vae=False, max_token_length=150).text_encoder_id(),
        load(info, with_vae=False, weighted=True).text_encoder_id(),
    ]
    other = load(inspect(str(tiny_sdxl)), with_vae=False)
    ids.append(other.text_encoder_id())
    other = load(inspect(str(tiny_sdxl)), with_vae=False)
    other.text_encoders[1].text_projection.weight.data[0, 0] += 1
    ids.append(other.text_encoder_id())
    assert len(set(ids)) == len(ids)
    assert ids[0] == load(info, with_vae=False).text_encoder_id()
