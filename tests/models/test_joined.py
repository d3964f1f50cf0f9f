"""Vectors behind a frozen table: ids, states and gradients against diffusers and transformers, whose tokenizer knows
the tokens and whose table is resized."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.models.inspect import inspect
from library.models.joined import join, token_embedding
from library.models.load import load
from library.models.model import Model
from library.models.prompts import at_end, inner, token_rows
from library.tokenizer import VOCABULARY_SIZE
from library.tokenizer.vocabulary import PLAIN, NewToken, Vocabulary

Find = Callable[[str], Path]
FAMILIES = ("sd1", "sd2", "sdxl")
TOKENS = Vocabulary((NewToken("mycat", 3), NewToken("<blue-toy>")))
CAPTIONS = ["a photo of MyCat on a <blue-toy>", "no new word in this", "mycat, mycat"]
SPELLED = [caption.lower().replace("mycat", "mycat mycat1 mycat2") for caption in CAPTIONS]
COLUMN = [0.3, -1.0, 0.7]


def drawn(widths: Sequence[int], tokens: Vocabulary = TOKENS, seed: int = 0) -> list[list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [nn.Parameter(torch.randn(token.vectors, width, generator=generator) * 0.05) for token in tokens.tokens]
        for width in widths
    ]


def loaded(folder: Path, **flags: Any) -> Model:
    return load(inspect(str(folder)), **{"with_unet": False, "with_vae": False, **flags})


def with_vectors(folder: Path, **flags: Any) -> tuple[Model, list[list[nn.Parameter]]]:
    model = loaded(folder, **flags)
    vectors = drawn(model.text_widths)
    model.join_embeddings(TOKENS, vectors)
    return model, vectors


def resized(folder: Path, vectors: Sequence[Sequence[Tensor]], dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline whose tokenizers and tables have the tokens; its tables have gradients."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=dtype)
    parts = [part for token in TOKENS.tokens for part in token.parts]
    for tokenizer, encoder, each in zip(*sides(pipe), vectors, strict=True):
        assert tokenizer.add_tokens(parts) == len(parts)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[VOCABULARY_SIZE:] = torch.cat(list(each))
    return pipe


def sides(pipe: Any) -> tuple[list[Any], list[Any]]:
    """Its tokenizers and text encoders."""
    parts = pipe.components
    found = [[parts.get(name), parts.get(f"{name}_2")] for name in ("tokenizer", "text_encoder")]
    tokenizers, encoders = ([one for one in each if one is not None] for each in found)
    return tokenizers, encoders


def states_of(pipe: Any, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    """What diffusers conditions on."""
    if hasattr(pipe, "tokenizer_2"):
        states, _, pooled, _ = pipe.encode_prompt(captions, captions, "cpu", 1, False)
        return states, pooled
    return pipe.encode_prompt(captions, "cpu", 1, False)[0], None


def loss(states: Tensor, pooled: Tensor | None) -> Tensor:
    """Something that every number has its own share in."""
    total = (states.float() * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum()
    return total if pooled is None else total + (pooled.float() * torch.tensor(COLUMN)[:, None]).square().sum()


def backward(model: Model, captions: Sequence[str] = CAPTIONS) -> None:
    conditioning = model.encode_prompts(captions)
    loss(conditioning.states, conditioning.pooled).backward()


def gradients(vectors: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
    found = [one.grad for each in vectors for one in each]
    assert all(one is not None and one.dtype == torch.float32 and one.abs().max() > 0 for one in found)
    return [one.clone() for one in found if one is not None]


def fingerprints(model: Model) -> list[str]:
    tables = [model.embedding_table(index) for index in range(len(model.text_widths))]
    return [hashlib.sha256(table.contiguous().view(torch.uint8).numpy()).hexdigest() for table in tables]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_states_and_gradients_are_those_of_a_resized_table(tiny_models: Find, family: str) -> None:
    model, vectors = with_vectors(tiny_models(family))
    pipe = resized(tiny_models(family), vectors)
    for index, tokenizer in enumerate(sides(pipe)[0]):
        ids = tokenizer(SPELLED, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        pad_id = model.family.text_encoders[index].pad_id
        assert torch.equal(token_rows(CAPTIONS, pad_id=pad_id, vocabulary=TOKENS)[:, 0], ids)

    conditioning = model.encode_prompts(CAPTIONS)
    states, pooled = states_of(pipe, SPELLED)
    assert (conditioning.states - states).abs().max() <= 1e-6 and states.requires_grad
    assert (conditioning.pooled is None) == (pooled is None)
    if pooled is not None and conditioning.pooled is not None:
        assert (conditioning.pooled - pooled).abs().max() <= 1e-6

    loss(conditioning.states, conditioning.pooled).backward()
    loss(states, pooled).backward()
    for each, encoder in zip(vectors, sides(pipe)[1], strict=True):
        wanted = encoder.get_input_embeddings().weight.grad[VOCABULARY_SIZE:]
        found = torch.cat([one.grad for one in each if one.grad is not None])
        assert wanted.abs().max() > 0 and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert all(one.grad is None and not one.requires_grad for enc in model.text_encoders for one in enc.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_stays_and_the_vectors_are_no_part_of_the_encoder(tiny_models: Find, family: str) -> None:
    plain = loaded(tiny_models(family))
    names = [list(one.state_dict()) for one in plain.text_encoders]
    before, counts = fingerprints(plain), [len(list(one.parameters())) for one in plain.text_encoders]
    model, vectors = with_vectors(tiny_models(family))
    assert [list(one.state_dict()) for one in model.text_encoders] == names
    assert [len(list(one.parameters())) for one in model.text_encoders] == counts
    assert [model.embedding_table(index).shape for index in range(len(vectors))] == [
        (VOCABULARY_SIZE, width) for width in model.text_widths
    ]
    every = [one for each in vectors for one in each]
    optimizer = torch.optim.AdamW(every, lr=0.1, weight_decay=0.5)
    start = [one.detach().clone() for one in every]
    for _ in range(2):
        backward(model)
        optimizer.step()
    assert fingerprints(model) == before and not model.embedding_table(0).requires_grad
    assert all(not torch.equal(one, was) for one, was in zip(every, start, strict=True))
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert kept == TOKENS.vectors * sum(model.text_widths) * 8, "two moments of 4 bytes for each number, no more"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_that_is_a_row_of_the_table_is_that_word(tiny_models: Find, family: str) -> None:
    model = loaded(tiny_models(family), weighted=True, max_token_length=150)
    cat, dog = 2368, 1929
    rows = [model.embedding_table(index)[[cat, dog]].clone() for index in range(len(model.text_widths))]
    for spelled in ("a cat dog, word", "a (cat dog:1.4), word", "word " * 74 + "cat dog " + "word " * 80):
        plain = model.encode_prompts([spelled])
        model.join_embeddings(Vocabulary((NewToken("mypet", 2),)), [[each] for each in rows])
        joined = model.encode_prompts([spelled.replace("cat dog", "mypet")])
        model.join_embeddings(PLAIN, [[] for _ in rows])
        assert torch.equal(joined.states, plain.states)
        assert plain.pooled is None or (joined.pooled is not None and torch.equal(joined.pooled, plain.pooled))


def test_the_pooled_output_is_at_the_end_token_though_new_ids_are_higher(tiny_sdxl: Path) -> None:
    model, _ = with_vectors(tiny_sdxl)
    encoder: Any = model.text_encoders[1]
    before = model.encode_prompts(CAPTIONS).pooled
    rows = token_rows(CAPTIONS, pad_id=0, vocabulary=TOKENS)
    last = inner(encoder)(rows[:, 0]).last_hidden_state
    ends = [row.tolist().index(49407) for row in rows[:, 0]]
    wanted = encoder.text_projection(torch.stack([states[end] for states, end in zip(last, ends, strict=True)]))
    assert before is not None and torch.allclose(before, wanted, atol=1e-6) and int(rows.max()) > 49407
    assert torch.equal(at_end(last, rows), torch.stack([states[end] for states, end in zip(last, ends, strict=True)]))
    encoder.text_model.eos_token_id = 2
    after = model.encode_prompts(CAPTIONS).pooled
    assert after is not None and torch.equal(after, before), "configs of older files say 2: then the highest id counts"


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_encoders_compute_as_with_rounded_rows(tiny_models: Find, family: str) -> None:
    model, vectors = with_vectors(tiny_models(family), dtype=torch.bfloat16)
    pipe = resized(tiny_models(family), vectors, torch.bfloat16)
    conditioning = model.encode_prompts(CAPTIONS)
    states, pooled = states_of(pipe, SPELLED)
    assert conditioning.states.dtype == torch.bfloat16 and torch.equal(conditioning.states, states)
    assert pooled is None or (conditioning.pooled is not None and torch.equal(conditioning.pooled, pooled))
    loss(conditioning.states, conditioning.pooled).backward()
    loss(states, pooled).backward()
    for each, encoder in zip(vectors, sides(pipe)[1], strict=True):
        wanted = encoder.get_input_embeddings().weight.grad[VOCABULARY_SIZE:].float()
        found = torch.cat(gradients([each]))
        assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_all_places_are_added_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Embedding(VOCABULARY_SIZE, 4, dtype=dtype).requires_grad_(False)
    holder = nn.Module()
    holder.embeddings = nn.Module()
    holder.embeddings.token_embedding = embedding
    vectors = [
        nn.Parameter(torch.randn(2, 4, generator=generator)),
        nn.Parameter(torch.randn(1, 4, generator=generator)),
    ]
    join(holder, vectors)
    ids = torch.tensor([[0, 49407, 49408, 49409, 49410, 5] * 300])
    upstream = torch.randn(1, 1800, 4, generator=generator).to(dtype)
    out = embedding(ids)
    table = torch.cat([embedding.weight, torch.cat(vectors).detach().to(dtype)])
    assert out.dtype == dtype and torch.equal(out, table[ids])
    out.backward(upstream)
    wanted = torch.stack([upstream[ids == one].double().sum(0) for one in (49408, 49409, 49410)])
    found = torch.cat([one.grad for one in vectors if one.grad is not None])
    assert found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert embedding.weight.grad is None


def test_vectors_on_another_device_than_the_table_are_taken_there() -> None:
    embedding = nn.Embedding(VOCABULARY_SIZE, 4, device="meta").requires_grad_(False)
    holder = nn.Module()
    holder.embeddings = nn.Module()
    holder.embeddings.token_embedding = embedding
    vector = nn.Parameter(torch.ones(1, 4))
    join(holder, [vector])
    out = embedding(torch.zeros(2, 77, dtype=torch.int64, device="meta"))
    assert out.device.type == "meta" and out.shape == (2, 77, 4) and out.requires_grad


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_checkpointing_8_bits_and_encoders_in_ram(tiny_models: Find, family: str) -> None:
    def run(change: Callable[[Model], object]) -> tuple[Tensor, list[Tensor]]:
        model, vectors = with_vectors(tiny_models(family), with_unet=True)
        change(model)
        backward(model)
        return model.encode_prompts(CAPTIONS).states.detach(), gradients(vectors)

    def rounded(model: Model) -> None:
        for encoder in model.text_encoders:
            for one in encoder.modules():
                if type(one) is nn.Linear:
                    one.weight.data = one.weight.data.to(torch.float8_e4m3fn).float()

    states, wanted = run(lambda model: None)
    for change in (
        lambda model: model.enable_gradient_checkpointing(),
        lambda model: model.keep_text_encoders_in_ram(),
        lambda model: (model.enable_gradient_checkpointing(2), model.release_text_encoders()),
    ):
        found_states, found = run(change)
        assert torch.equal(found_states, states)
        assert all(torch.allclose(one, two, rtol=1e-5, atol=1e-6) for one, two in zip(found, wanted, strict=True))
    in_8, gradients_in_8 = run(lambda model: model.store_in_fp8(unet=False, text_encoders=True))
    as_8, wanted_in_8 = run(rounded)
    assert torch.allclose(in_8, as_8, rtol=1e-4, atol=1e-5) and not torch.equal(in_8, states)
    for one, two in zip(gradients_in_8, wanted_in_8, strict=True):
        assert float((one - two).norm() / two.norm()) < 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_joining_again_and_reading_encoders_again(tiny_models: Find, family: str) -> None:
    model = loaded(tiny_models(family))
    plain, identity = model.encode_prompts(CAPTIONS).states, model.text_encoder_id()
    vectors = drawn(model.text_widths)
    model.release_text_encoders()
    model.join_embeddings(TOKENS, vectors)
    assert len(model.text_encoders) == 0, "nothing is read for it"
    joined = model.encode_prompts(CAPTIONS).states
    assert not torch.equal(joined[0], plain[0]) and torch.equal(joined[1], plain[1])
    model.release_text_encoders()
    assert torch.equal(model.encode_prompts(CAPTIONS).states, joined)
    with torch.no_grad():
        vectors[0][0] += 1
    assert not torch.equal(model.encode_prompts(CAPTIONS).states, joined), "what changes counts at once"
    one = Vocabulary((NewToken("mycat"),))
    model.join_embeddings(one, drawn(model.text_widths, one))
    assert model.vocabulary == one and not torch.equal(model.encode_prompts(CAPTIONS).states, joined)
    model.join_embeddings(PLAIN, [[] for _ in model.text_widths])
    assert torch.equal(model.encode_prompts(CAPTIONS).states, plain) and model.text_encoder_id() == identity
    assert all(type(token_embedding(encoder)) is nn.Embedding for encoder in model.reload_text_encoders())


def test_the_id_of_text_encoders_covers_tokens_and_vectors(tiny_sdxl: Path) -> None:
    model = loaded(tiny_sdxl)
    vectors = drawn(model.text_widths)
    turned = Vocabulary(TOKENS.tokens[::-1])
    other = Vocabulary((NewToken("mydog", 3), NewToken("<blue-toy>")))
    changed = [list(each) for each in vectors]
    changed[1][1] = nn.Parameter(changed[1][1].detach() + 1e-3)

    def identity(vocabulary: Vocabulary, each: Sequence[Sequence[Tensor]]) -> str:
        model.join_embeddings(vocabulary, each)
        return model.text_encoder_id()

    ids = [model.text_encoder_id(), identity(TOKENS, vectors), identity(other, vectors), identity(TOKENS, changed)]
    assert len(set(ids)) == 4
    states = model.encode_prompts(CAPTIONS).states
    assert identity(turned, [each[::-1] for each in changed]) == ids[3], "the order of tokens makes no state"
    assert torch.equal(model.encode_prompts(CAPTIONS).states, states)
    model.release_text_encoders()
    assert model.text_encoder_id() == ids[3] and identity(TOKENS, vectors) == ids[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_previews_know_the_tokens(tiny_models: Find, family: str) -> None:
    model = loaded(tiny_models(family), with_unet=True, with_vae=True)
    rows = [model.embedding_table(index)[[2368]].clone() for index in range(len(model.text_widths))]
    pictures = []
    for prompt, vectors in (("a cat", None), ("a mypet", None), ("a mypet", rows)):
        if vectors is not None:
            model.join_embeddings(Vocabulary((NewToken("mypet"),)), [[each] for each in vectors])
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        text = {"prompt": prompt, "negative_prompt": f"{prompt} badly", "guidance_scale": 30.0}
        drawn_now = model.pipeline("ddim")(**text, width=64, height=64, num_inference_steps=2, latents=noise)
        pictures.append(drawn_now.images[0].tobytes())
    assert pictures[2] == pictures[0] != pictures[1]


def test_tokens_without_ids_of_their_own(tiny_sd2: Path) -> None:
    model = loaded(tiny_sd2)
    for text in ("chri", "cat", "wow!"):
        tokens = Vocabulary((NewToken("mycat"), NewToken(text)))
        with pytest.raises(ValueError, match=rf"no ids of their own for \['{text}'"):
            model.join_embeddings(tokens, drawn(model.text_widths, tokens))


@pytest.mark.parametrize("wrong", ["encoders", "tokens", "width", "count", "dtype", "shape"])
def test_vectors_that_do_not_fit(tiny_sdxl: Path, wrong: str) -> None:
    model = loaded(tiny_sdxl)
    vectors: list[list[Tensor]] = [list(each) for each in drawn(model.text_widths)]
    states = model.encode_prompts(["mycat"]).states
    if wrong == "encoders":
        vectors.pop()
    elif wrong == "tokens":
        vectors[1].pop()
    else:
        vectors[1][0] = {
            "width": torch.zeros(3, 32),
            "count": torch.zeros(2, 64),
            "dtype": torch.zeros(3, 64, dtype=torch.bfloat16),
            "shape": torch.zeros(192),
        }[wrong]
    with pytest.raises(ValueError, match="text encoders" if wrong == "encoders" else "tokens need"):
        model.join_embeddings(TOKENS, vectors)
    assert model.vocabulary == PLAIN and torch.equal(model.encode_prompts(["mycat"]).states, states)
