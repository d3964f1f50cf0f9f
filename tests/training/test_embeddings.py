"""The vectors of new tokens: where they start, what alone is trained, and that all else stays bit for bit."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.families import SDXL
from library.models.model import Model
from library.rng import rng
from library.training.coordinates import Coordinates
from library.training.embedding_vectors import JoinedVectors, hold_norms, make_vectors, norm_bounds, table_spread
from library.training.embeddings import EmbeddingTrainable
from tests.training.embedding_models import (
    CAPTIONS,
    SEED,
    copies,
    frozen_hash,
    loss_of,
    make,
    plan_of,
    planned,
    resized,
    row_gradients,
    tables,
    the_same,
)

Models = Callable[[str], Path]
FAMILIES = ("sd1", "sd2", "sdxl")
PARTS = {"sd1": ["text_encoder"], "sd2": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}
AT = Coordinates(SEED, 1, 0, (0, 1))


def gradients(trainable: EmbeddingTrainable) -> list[Tensor]:
    return [cast(Tensor, parameter.grad) for parameter in trainable.parameters()]


def step(made: Any, optimizer: torch.optim.Optimizer) -> None:
    made.trainable.before_epoch()
    made.trainable.before_micro_step(AT)
    loss_of(made.model).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    made.trainable.after_update()


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_vectors_have_the_mean_and_deviation_of_the_vocabulary(family: str, tiny_models: Models) -> None:
    made = make(tiny_models(family))
    for place, table in enumerate(tables(made.model)):
        rows = table.double().numpy()
        for one in made.plan.trained:
            token = one.token
            draws = rng(SEED, "init", "embedding", token.text, place).standard_normal((token.vectors, rows.shape[1]))
            expected = rows.mean(0) + rows.std(0) * draws
            found = made.trainable.vectors_of(token.text)[place]
            assert found.dtype == torch.float32 and not found.requires_grad
            assert np.abs(found.double().numpy() - expected).max() < 1e-8


def test_draws_depend_on_seed_token_and_encoder_alone(tiny_sdxl: Path) -> None:
    one, alone = make(tiny_sdxl), make(tiny_sdxl, plan_of(planned("blorp")))
    assert the_same(one.trainable.vectors_of("blorp"), alone.trainable.vectors_of("blorp"))
    other = make(tiny_sdxl, seed=SEED + 1)
    first, second = one.trainable.vectors_of("blorp")
    assert not torch.equal(first, other.trainable.vectors_of("blorp")[0])
    spreads = [table_spread(table) for table in tables(one.model)]
    draws = [(v.double() - m) / d for v, (m, d) in zip((first, second), spreads, strict=True)]
    assert not torch.allclose(draws[0], draws[1][:, : draws[0].shape[1]], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_that_start_from_words_are_copies_of_their_rows(dtype: torch.dtype, tiny_sdxl: Path) -> None:
    ids = (2368, 320, 2368)
    made = make(tiny_sdxl, plan_of(planned("mycat", 3, ids)), dtype=dtype)
    for vectors, table in zip(made.trainable.vectors_of("mycat"), tables(made.model), strict=True):
        assert vectors.dtype == torch.float32
        assert torch.equal(vectors, table[list(ids)].float())
    before = frozen_hash(made.model)
    with torch.no_grad():
        for parameter in made.trainable.parameters():
            parameter.add_(1)
    assert frozen_hash(made.model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_start_from_files_and_frozen_ones_are_no_parameters(
    family: str, tiny_models: Models, tmp_path: Path
) -> None:
    widths = {"sd1": (32,), "sd2": (64,), "sdxl": (32, 64)}[family]
    held = [torch.randn((2, width), generator=torch.Generator().manual_seed(width)) for width in widths]
    keys = ("emb_params",) if len(widths) == 1 else ("clip_l", "clip_g")
    file = tmp_path / "one.safetensors"
    save_file(dict(zip(keys, held, strict=True)), file)
    plan = plan_of(planned("mycat", 2, file=file), base=[planned("blorp", 2, file=file)])
    made = make(tiny_models(family), plan)
    assert the_same(made.trainable.vectors_of("mycat"), held) and the_same(made.trainable.vectors_of("blorp"), held)
    assert made.trainable.state_dict().keys() == {f"embedding.{part}.mycat" for part in PARTS[family]}
    loss_of(made.model).backward()
    assert all(not one.requires_grad and one.grad is None for one in made.vectors.of("blorp"))
    assert all(bool(one.abs().sum() > 0) for one in gradients(made.trainable))


def test_a_file_that_changed_since_the_plan_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file({"emb_params": torch.randn(3, 32)}, file)
    with pytest.raises(UserError, match=r"--weights: .*one.safetensors holds vectors of shape 3 x 32, but 2 x 32"):
        make(tiny_sd1, plan_of(planned("mycat", 2, file=file)))


def test_the_spread_of_a_table_in_float64() -> None:
    rows = np.random.default_rng(0).normal(3.0, 2.0, (9000, 5)).astype(np.float32)
    mean, deviation = table_spread(torch.from_numpy(rows))
    assert np.allclose(mean.numpy(), rows.astype(np.float64).mean(0), rtol=1e-13, atol=0)
    assert np.allclose(deviation.numpy(), rows.astype(np.float64).std(0), rtol=1e-13, atol=0)


def test_norm_bounds_are_percentiles_of_rows_norms() -> None:
    rows = np.random.default_rng(0).normal(0.0, 1.0, (9001, 5)).astype(np.float32)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    table = torch.from_numpy(rows)
    assert norm_bounds(table, "off") is None
    assert norm_bounds(table, "clamp") == pytest.approx(tuple(np.percentile(norms, (1, 99))), rel=1e-12)
    assert norm_bounds(table, "median") == pytest.approx((np.median(norms),) * 2, rel=1e-12)


def test_norms_outside_are_moved_to_the_bound_and_nothing_else_changes() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.06, 0.08], [0.0, 0.0]])
    start = vectors.clone()
    hold_norms(vectors, (0.2, 1.0))
    assert torch.equal(vectors[1], start[1]) and torch.equal(vectors[3], start[3])
    assert torch.allclose(vectors[0], torch.tensor([0.6, 0.8])) and torch.allclose(
        vectors[2], torch.tensor([0.12, 0.16])
    )
    again = vectors.clone()
    hold_norms(again, (0.2, 1.0))
    assert torch.allclose(again, vectors, rtol=2e-7, atol=0)


@pytest.mark.parametrize("rule", ["clamp", "median"])
def test_a_norm_rule_holds_after_each_update_for_each_encoder(rule: Any, tiny_sdxl: Path) -> None:
    made = make(tiny_sdxl, plan_of(rate=1.0, norm=rule))
    optimizer = torch.optim.AdamW(made.trainable.groups)
    for _ in range(2):
        step(made, optimizer)
        for place, table in enumerate(tables(made.model)):
            norms = np.linalg.norm(table.double().numpy(), axis=1)
            low, high = np.percentile(norms, (1, 99)) if rule == "clamp" else (np.median(norms),) * 2
            for parameter in made.vectors.trained(place).values():
                found = np.linalg.norm(parameter.detach().double().numpy(), axis=1)
                assert found.min() >= low * (1 - 1e-6) and found.max() <= high * (1 + 1e-6)


def test_without_a_rule_norms_grow(tiny_sd1: Path) -> None:
    made = make(tiny_sd1, plan_of(rate=1.0))
    before = float(made.trainable.block_norms("weight")["norm/weight/embedding"])
    step(made, torch.optim.AdamW(made.trainable.groups))
    assert float(made.trainable.block_norms("weight")["norm/weight/embedding"]) > 2 * before


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_table_that_was_made_larger(family: str, tiny_models: Models) -> None:
    folder = tiny_models(family)
    made = make(folder)
    other, found = resized(folder, made)
    mine, theirs = loss_of(made.model), loss_of(other)
    assert torch.allclose(mine, theirs, rtol=1e-6)
    mine.backward()
    theirs.backward()
    for own, expected in zip(gradients(made.trainable), row_gradients(found, made), strict=True):
        assert own.dtype == torch.float32 and float(expected.abs().max()) > 0
        assert torch.allclose(own, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert all(
        parameter.grad is None
        for part in (*made.model.text_encoders, made.model.unet)
        for parameter in part.parameters()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_change_the_vectors_only_and_as_adamw_does(family: str, tiny_models: Models) -> None:
    made = make(tiny_models(family))
    before = frozen_hash(made.model)
    hashes = [table.clone() for table in tables(made.model)]
    decay, rate, most = 0.1, made.plan.rate, 1e-3
    optimizer = torch.optim.AdamW(made.trainable.groups, weight_decay=decay)
    values = [parameter.detach().double() for parameter in made.trainable.parameters()]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    for number in (1, 2, 3):
        loss_of(made.model).backward()
        plain = [gradient.double() for gradient in gradients(made.trainable)]
        length = torch.sqrt(sum((gradient.square().sum() for gradient in plain), torch.zeros((), dtype=torch.float64)))
        norm = nn.utils.clip_grad_norm_(made.trainable.parameters(), most)
        assert float(norm) == pytest.approx(float(length), rel=1e-5) and float(length) > most
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for place, gradient in enumerate(plain):
            gradient = gradient * (most / (length + 1e-6))
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.999 * second[place] + 0.001 * gradient.square()
            shrunk = values[place] * (1 - rate * decay)
            root = (second[place] / (1 - 0.999**number)).sqrt() + 1e-8
            values[place] = shrunk - rate * first[place] / (1 - 0.9**number) / root
    for parameter, value in zip(made.trainable.parameters(), values, strict=True):
        assert torch.allclose(parameter.detach().double(), value, rtol=0, atol=1e-5)
    assert frozen_hash(made.model) == before and the_same(tables(made.model), hashes)


def test_optimizer_state_of_eight_vectors_at_the_widths_of_sdxl_is_131072_bytes() -> None:
    widths = (768, 1280)
    rows = [torch.linspace(-1, 1, width).repeat(3, 1) for width in widths]
    joined: list[JoinedVectors] = []
    stand_in = SimpleNamespace(
        text_widths=widths,
        device=torch.device("cpu"),
        family=SDXL,
        embedding_table=lambda place: rows[place],
        join_embeddings=lambda vocabulary, vectors: joined.append(JoinedVectors(vocabulary, vectors)),
    )
    model, plan = cast(Model, stand_in), plan_of(planned("mycat", 8))
    vectors = make_vectors(plan, model, SEED)
    assert joined == [vectors]
    trainable = EmbeddingTrainable(model, plan, vectors)
    assert [tuple(parameter.shape) for parameter in trainable.parameters()] == [(8, 768), (8, 1280)]
    optimizer = torch.optim.AdamW(trainable.groups)
    for parameter in trainable.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.numel() * moment.element_size() for moment in moments) == 131_072


def test_a_caption_without_the_token_gives_zeros_and_not_nothing(tiny_sdxl: Path) -> None:
    """Processes sum their gradients, and one whose captions lack a token must have something to add."""
    made = make(tiny_sdxl)
    loss_of(made.model, ("a hill", "")).backward()
    assert all(not bool(one.any()) for one in gradients(made.trainable))
    made.trainable.parameters()[0].grad = None
    loss_of(made.model, ("blorp", "a hill")).backward()
    first, second = gradients(made.trainable)[:2]
    assert not bool(first.any()) and bool(second.any())


@pytest.mark.parametrize("rule", ["off", "median"])
def test_frozen_vectors_stay_bit_for_bit(rule: Any, tiny_sd1: Path) -> None:
    made = make(tiny_sd1, plan_of(norm=rule))
    trainable = made.trainable
    optimizer = torch.optim.AdamW(trainable.groups, weight_decay=0.5)
    step(made, optimizer)
    assert trainable.trains_text_encoder and not trainable.frozen_groups
    loss_of(made.model).backward()
    trainable.freeze_embeddings()
    kept = copies(trainable.parameters())
    assert not trainable.trains_text_encoder and trainable.frozen_groups == {"embedding"}
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trainable.parameters())
    assert not loss_of(made.model).requires_grad
    for _ in range(2):
        trainable.before_micro_step(AT)
        optimizer.step()
        trainable.after_update()
    assert the_same(trainable.parameters(), kept)


def test_one_group_with_its_own_rate(tiny_sdxl: Path) -> None:
    made = make(tiny_sdxl)
    (group,) = made.trainable.groups
    assert made.trainable.descriptions == ["embedding"] and group["lr"] == made.plan.rate
    shapes = [tuple(parameter.shape) for parameter in made.trainable.parameters()]
    assert shapes == [(2, 32), (1, 32), (2, 64), (1, 64)]
    assert all(one is other for one, other in zip(group["params"], made.trainable.parameters(), strict=True))
    inside = {id(one) for part in (*made.model.text_encoders, made.model.unet) for one in part.parameters()}
    assert not inside & {id(one) for one in made.trainable.parameters()}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_state_goes_on_bit_for_bit(family: str, tiny_models: Models) -> None:
    straight, stopped, resumed = (make(tiny_models(family), plan_of(norm="clamp"), seed) for seed in (1, 1, 2))
    names = [f"embedding.{part}.{token}" for part in PARTS[family] for token in ("mycat", "blorp")]
    optimizers = [torch.optim.AdamW(made.trainable.groups) for made in (straight, stopped, resumed)]
    for _ in range(3):
        step(straight, optimizers[0])
    step(stopped, optimizers[1])
    state = {name: tensor.clone() for name, tensor in stopped.trainable.state_dict().items()}
    assert list(state) == names
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    resumed.trainable.load_state_dict(state)
    for _ in range(2):
        step(resumed, optimizers[2])
    assert the_same(straight.trainable.parameters(), resumed.trainable.parameters())


def test_states_of_other_runs_are_refused_and_change_nothing(tiny_sd1: Path) -> None:
    trainable = make(tiny_sd1).trainable
    kept = copies(trainable.parameters())
    state = {name: tensor + 1 for name, tensor in trainable.state_dict().items()}
    first, second = state
    with pytest.raises(ValueError, match=f"no {second}"):
        trainable.load_state_dict({first: state[first]})
    with pytest.raises(ValueError, match=r"holds embedding\.text_encoder\.other, which this run doesn't train"):
        trainable.load_state_dict({**state, "embedding.text_encoder.other": state[first]})
    with pytest.raises(ValueError, match=rf"{second} is \(2, 32\) in the state, here \(1, 32\)"):
        trainable.load_state_dict({**state, second: state[first]})
    assert the_same(trainable.parameters(), kept)


def test_vectors_have_no_strength_but_one(tiny_sd1: Path) -> None:
    trainable = make(tiny_sd1).trainable
    trainable.set_multiplier(1.0)
    assert trainable.multiplier == 1.0
    for strength in (0.0, 0.5):
        with pytest.raises(UserError, match="embeddings have no strength"):
            trainable.set_multiplier(strength)
    trainable.train(False)
    assert not trainable.is_training
    trainable.train(True)
    assert trainable.is_training


def test_logged_norms(tiny_sdxl: Path) -> None:
    made = make(tiny_sdxl)
    trainable = made.trainable
    assert trainable.block_norms("gradient") == {}
    loss_of(made.model).backward()
    shown = {"weight": trainable.parameters(), "gradient": gradients(trainable)}
    means = {"weight": "norm/avg_embedding_norm", "gradient": "norm/avg_embedding_grad_norm"}
    for kind, tensors in shown.items():
        norms = np.concatenate([np.linalg.norm(one.detach().double().numpy(), axis=1) for one in tensors])
        found = trainable.block_norms(cast(Any, kind))
        assert found.keys() == {f"norm/{kind}/embedding", means[kind]} and len(norms) == 6
        assert float(found[f"norm/{kind}/embedding"]) == pytest.approx(float(np.linalg.norm(norms)), rel=1e-5)
        assert float(found[means[kind]]) == pytest.approx(float(norms.mean()), rel=1e-5)
        assert not any(one.requires_grad for one in found.values())
    kept = copies(trainable.parameters())
    assert trainable.limit_norms(1e-6, torch.device("cpu")) == {} and the_same(trainable.parameters(), kept)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_gradients_do_not_change_with_checkpointing_or_text_encoders_read_again(
    family: str, tiny_models: Models
) -> None:
    made = make(tiny_models(family))
    loss_of(made.model).backward()
    expected = copies(gradients(made.trainable))
    for change in (made.model.release_text_encoders, made.model.enable_gradient_checkpointing):
        change()
        for parameter in made.trainable.parameters():
            parameter.grad = None
        loss_of(made.model).backward()
        for found, wanted in zip(gradients(made.trainable), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_in_16_bits_vectors_and_their_gradients_are_float32(tiny_sdxl: Path) -> None:
    made, exact = make(tiny_sdxl, dtype=torch.bfloat16), make(tiny_sdxl)
    loss_of(made.model, CAPTIONS).backward()
    loss_of(exact.model, CAPTIONS).backward()
    for parameter, wanted in zip(made.trainable.parameters(), gradients(exact.trainable), strict=True):
        found = cast(Tensor, parameter.grad)
        assert parameter.dtype == found.dtype == torch.float32
        cosine = nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
        assert float(cosine) > 0.97, "the same direction as in float32, but for the rounding"
