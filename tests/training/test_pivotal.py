"""A network and new tokens' vectors trained at once: each by its own rate, frozen apart, stored together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model
from library.training.coordinates import Coordinates
from library.training.embedding_plan import EmbeddingPlan
from library.training.embeddings import EmbeddingTrainable
from library.training.learning_rates import LearningRates
from library.training.pivotal import PivotalTrainable, attach_embeddings
from library.training.trainable import NetworkTrainable, Trainable
from networks import lora
from tests.training.embedding_models import (
    SEED,
    Made,
    copies,
    loss_of,
    make,
    plan_of,
    planned,
    resized,
    row_gradients,
    the_same,
)

Models = Callable[[str], Path]
FAMILIES = ("sd1", "sd2", "sdxl")
CPU = torch.device("cpu")
AT = Coordinates(SEED, 1, 0, (0, 1))
RATES = {family: LearningRates(1e-3, (2e-3,) * (2 if family == "sdxl" else 1), 1e-2) for family in FAMILIES}


def network_on(model: Model, rates: LearningRates) -> NetworkTrainable:
    """A LoRA that does something from the start, as up-factors of zero would have no effect on anything else."""
    network = lora.create_network(1.0, 2, 1.0, None, model.network_text_encoder, model.unet, seed=1)
    trainable = NetworkTrainable(network, model.unet, model.network_text_encoder, rates, 1e-3)
    trainable.to(CPU)
    trainable.prepare()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trainable


@dataclass(frozen=True)
class Both:
    made: Made
    network: NetworkTrainable
    trainable: PivotalTrainable

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.trainable.before_epoch()
        self.trainable.before_micro_step(AT)
        loss_of(self.made.model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.trainable.after_update()

    @property
    def vectors(self) -> list[Tensor]:
        return list(self.made.trainable.parameters())


def both(folder: Path, plan: EmbeddingPlan | None = None, *, text: bool = True, seed: int = SEED) -> Both:
    made = make(folder, plan, seed)
    rates = RATES[made.model.family.name]
    network = network_on(made.model, rates if text else LearningRates(1e-3, (0.0,) * len(rates.text_encoders), 1e-2))
    return Both(made, network, PivotalTrainable(network, made.trainable))


def states(made: Made) -> Tensor:
    with torch.no_grad():
        return made.model.encode_prompts(["mycat on a hill"]).states


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_both_with_rates_of_their_own(family: str, tiny_models: Models) -> None:
    one = both(tiny_models(family))
    text = ["textencoder"] if family != "sdxl" else ["textencoder1", "textencoder2"]
    assert one.trainable.descriptions == [*text, "unet", "embedding"]
    assert [group["lr"] for group in one.trainable.groups] == [2e-3] * len(text) + [1e-3, 1e-2]
    listed = [*one.network.parameters(), *one.made.trainable.parameters()]
    assert [id(parameter) for parameter in one.trainable.parameters()] == [id(parameter) for parameter in listed]
    optimizer = torch.optim.AdamW(one.trainable.groups)
    before, hashed = copies(listed), frozen_weights(one)
    one.step(optimizer)
    stayed = [old.shape for old, new in zip(before, listed, strict=True) if torch.equal(old, new)]
    assert len(stayed) == (12 if family == "sdxl" else 0), "SDXL doesn't use its first text encoder's last layer"
    assert frozen_weights(one) == hashed


def frozen_weights(one: Both) -> dict[str, bytes]:
    """The base model's own weights; LoRAs stand outside of it."""
    parts = (*one.made.model.text_encoders, one.made.model.unet)
    trained = {id(parameter) for parameter in one.trainable.parameters()}
    return {
        f"{number}.{name}": parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for number, part in enumerate(parts)
        for name, parameter in part.named_parameters()
        if id(parameter) not in trained
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_a_network_are_those_of_a_table_that_was_made_larger(family: str, tiny_models: Models) -> None:
    folder = tiny_models(family)
    one = both(folder)
    other, found = resized(folder, one.made)
    network = network_on(other, RATES[family])
    for model in (one.made.model, other):
        loss_of(model).backward()
    for table, expected in zip(one.vectors, row_gradients(found, one.made), strict=True):
        assert table.grad is not None
        assert torch.allclose(table.grad, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    for mine, theirs in zip(one.network.parameters(), network.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("text", [True, False])
def test_at_strength_0_the_network_is_off_and_the_vectors_act(text: bool, tiny_sdxl: Path) -> None:
    one, alone, bare = both(tiny_sdxl, text=text), make(tiny_sdxl), make(tiny_sdxl, seed=SEED + 1)
    assert torch.equal(states(one.made), states(alone)) != text
    one.trainable.set_multiplier(0.0)
    assert one.trainable.multiplier == one.network.multiplier == 0.0
    assert torch.equal(states(one.made), states(alone)) and not torch.equal(states(one.made), states(bare))
    assert torch.equal(loss_of(one.made.model), loss_of(alone.model))
    one.trainable.set_multiplier(1.0)
    assert not torch.equal(loss_of(one.made.model), loss_of(alone.model))


@pytest.mark.parametrize("text", [True, False])
def test_frozen_vectors_stay_while_the_network_goes_on(text: bool, tiny_sd1: Path) -> None:
    one = both(tiny_sd1, plan_of(norm="median"), text=text)
    optimizer = torch.optim.AdamW(one.trainable.groups, weight_decay=0.5)
    one.step(optimizer)
    assert one.trainable.trains_text_encoder and not one.trainable.frozen_groups
    one.trainable.freeze_embeddings()
    assert one.trainable.trains_text_encoder == text and one.trainable.frozen_groups == {"embedding"}
    kept, adapters = copies(one.vectors), copies(one.network.parameters())
    for _ in range(2):
        one.step(optimizer)
    assert the_same(one.vectors, kept)
    assert not any(map(torch.equal, adapters, one.network.parameters()))


def test_frozen_text_encoders_stay_while_the_vectors_go_on(tiny_sdxl: Path) -> None:
    one = both(tiny_sdxl)
    optimizer = torch.optim.AdamW(one.trainable.groups, weight_decay=0.5)
    one.trainable.freeze_text_encoders()
    assert one.trainable.frozen_groups == {"textencoder1", "textencoder2"} and one.trainable.trains_text_encoder
    text = [parameter for group in one.trainable.groups[:2] for parameter in group["params"]]
    unet = one.trainable.groups[2]["params"]
    before = [copies(tensors) for tensors in (text, unet, one.vectors)]
    one.step(optimizer)
    assert the_same(text, before[0])
    assert not any(map(torch.equal, before[1], unet)) and not any(map(torch.equal, before[2], one.vectors))
    one.trainable.freeze_embeddings()
    assert one.trainable.frozen_groups == {"textencoder1", "textencoder2", "embedding"}
    assert not one.trainable.trains_text_encoder
    assert not one.made.model.encode_prompts(["mycat"]).states.requires_grad


def test_norms_and_modes_of_both(tiny_sd1: Path) -> None:
    one = both(tiny_sd1)
    loss_of(one.made.model).backward()
    for kind in ("weight", "gradient"):
        found = one.trainable.block_norms(cast(Any, kind))
        assert found == one.network.block_norms(cast(Any, kind)) | one.made.trainable.block_norms(cast(Any, kind))
        assert {f"norm/{kind}/embedding", f"norm/{kind}/unet_block1"} <= found.keys()
    kept = copies(one.vectors)
    done = one.trainable.limit_norms(1e-3, CPU)
    assert float(done["max_norm/keys_scaled"]) > 0 and the_same(one.vectors, kept)
    one.trainable.train(False)
    assert not one.trainable.is_training and not one.made.trainable.is_training
    one.trainable.train(True)
    assert one.trainable.is_training and one.network.is_training


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_state_of_both_goes_on_bit_for_bit(family: str, tiny_models: Models) -> None:
    folder = tiny_models(family)
    straight, stopped, resumed = both(folder), both(folder), both(folder, seed=SEED + 1)
    optimizers = [torch.optim.AdamW(one.trainable.groups) for one in (straight, stopped, resumed)]
    for _ in range(2):
        straight.step(optimizers[0])
    stopped.step(optimizers[1])
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    resumed.trainable.load_state_dict({name: one.clone() for name, one in stopped.trainable.state_dict().items()})
    resumed.step(optimizers[2])
    assert the_same(straight.trainable.parameters(), resumed.trainable.parameters())


def test_states_that_lack_something_are_refused(tiny_sd1: Path) -> None:
    one = both(tiny_sd1)
    state: Mapping[str, Tensor] = one.trainable.state_dict()
    names = [f"embedding.text_encoder.{token}" for token in ("mycat", "blorp")]
    assert list(state) == [*one.network.state_dict(), *names]
    with pytest.raises(ValueError, match=r"no embedding\.text_encoder\.blorp"):
        one.trainable.load_state_dict({name: tensor for name, tensor in state.items() if name != names[1]})
    with pytest.raises(RuntimeError, match="Missing key"):
        one.trainable.load_state_dict({name: state[name] for name in names})
    with pytest.raises(RuntimeError, match=r"embedding\.text_encoder\.other"):
        one.trainable.load_state_dict({**state, "embedding.text_encoder.other": state[names[0]]})


class Prepared(SimpleNamespace):
    """What is asked of a prepared run."""

    def __init__(self, plan: EmbeddingPlan | None, *, checkpointing: bool = False) -> None:
        flags = SimpleNamespace(
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_every=1,
            gradient_checkpointing_attention_only=False,
        )
        super().__init__(embeddings=plan, seed=SEED, options=SimpleNamespace(model=flags))


def attached(plan: EmbeddingPlan | None, model: Model, network: Any = None, **more: Any) -> Trainable:
    return attach_embeddings(cast(Any, Prepared(plan, **more)), model, CPU, network)


def test_what_is_attached_follows_from_the_plan(tiny_sd1: Path) -> None:
    model = load(inspect(tiny_sd1))
    network = network_on(model, RATES["sd1"])
    assert attached(None, model, network) is network
    base = EmbeddingPlan((), (planned("blorp", 2),), 0.0)
    assert attached(base, model, network) is network and model.vocabulary == base.vocabulary
    alone, together = attached(plan_of(), model), attached(plan_of(), model, network)
    assert isinstance(alone, EmbeddingTrainable) and alone.trains_text_encoder
    assert isinstance(together, PivotalTrainable) and together.network is network
    assert model.vocabulary == plan_of().vocabulary
    assert the_same(together.embeddings.vectors_of("mycat"), alone.vectors_of("mycat"))


def test_neither_network_nor_token(tiny_sd1: Path) -> None:
    model = load(inspect(tiny_sd1))
    for plan in (None, EmbeddingPlan((), (planned("blorp"),), 0.0)):
        with pytest.raises(ValueError, match="neither a network nor a token"):
            attached(plan, model)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_without_a_network_checkpointing_is_still_done(checkpointing: bool, tiny_sd1: Path) -> None:
    model = load(inspect(tiny_sd1))
    attached(plan_of(), model, checkpointing=checkpointing)
    assert bool(cast(Any, model.unet).is_gradient_checkpointing) == checkpointing
    assert model.unet.training == model.text_encoders[0].training == checkpointing
