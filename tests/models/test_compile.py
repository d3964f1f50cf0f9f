"""Compiled blocks: the same results and names, graphs made once, and nothing compiled that runs without gradients."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch._dynamo.utils import counters

from library.errors import UserError
from library.models.compiling import CompileTimes, check_backend
from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model
from networks import lora

BLOCKS = 18


@pytest.fixture(autouse=True)
def own_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


class Trained:
    """A tiny model with a LoRA on its U-Net, which has few blocks."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.model: Model = load(inspect(str(folder)), with_vae=False, with_unet=False)
        torch.manual_seed(0)
        self.model.unet = UNet2DConditionModel(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            norm_num_groups=8,
            attention_head_dim=2,
            cross_attention_dim=32,
        ).requires_grad_(False)
        self.states = self.model.encode_prompts(["a cat", "a dog"])
        encoder = self.model.network_text_encoder
        self.network = lora.create_network(1.0, 4, 2.0, None, encoder, self.model.unet, seed=1, **settings)
        self.network.apply_to(encoder, self.model.unet, train_text_encoder=False)
        self.network.train()
        for parameter in self.network.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))

    def predict(self) -> torch.Tensor:
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        return self.model.predict(noisy, torch.tensor([5, 900]), self.states)

    def step(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.network.zero_grad()
        self.network.set_random_context(1, 1, index, (0, 1))
        out = self.predict()
        out.square().mean().backward()
        return out.detach(), {name: one.grad for name, one in self.network.named_parameters()}


def same(one: Any, two: Any, tolerance: float = 0.0) -> bool:
    pairs = [(one[0], two[0]), *((one[1][name], two[1][name]) for name in one[1])]
    return all(float((left - right).norm()) <= tolerance * float(right.norm()) for left, right in pairs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_steps_are_the_same_and_compile_once(tiny_sd1: Path, checkpointing: bool) -> None:
    trained = Trained(tiny_sd1)
    if checkpointing:
        trained.model.enable_gradient_checkpointing()
    names = list(trained.model.unet.state_dict()), list(trained.network.state_dict())
    expected = trained.step(0)
    times = CompileTimes()
    assert times.news() is None
    assert trained.model.compile_unet("eager") == BLOCKS
    assert graphs() == 0
    assert same(trained.step(0), expected)
    made = graphs()
    assert 0 < made < BLOCKS, "blocks of one shape share a graph"
    news = times.news()
    assert news is not None and news.startswith(f"compiled {times.count} graphs in ") and times.seconds > 0
    assert same(trained.step(1), expected) and graphs() == made and times.news() is None
    times.close()
    assert (list(trained.model.unet.state_dict()), list(trained.network.state_dict())) == names


def test_what_runs_without_gradients_is_not_compiled(tiny_sd1: Path) -> None:
    trained = Trained(tiny_sd1)
    trained.model.compile_unet("eager")
    with torch.no_grad():
        first = trained.predict()
        trained.network.set_multiplier(0.0)
        assert not torch.equal(trained.predict(), first)
    assert graphs() == 0


def test_dropout_masks_are_new_at_each_compiled_step(tiny_sd1: Path) -> None:
    trained = Trained(tiny_sd1, rank_dropout=0.5)
    expected = [trained.step(index) for index in range(3)]
    trained.model.compile_unet("eager")
    found = [trained.step(0)]
    made = graphs()
    found += [trained.step(index) for index in (1, 2)]
    assert graphs() == made
    assert all(same(one, two) for one, two in zip(found, expected, strict=True))
    assert not same(found[0], found[1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_that_change_the_arithmetic_stay_close(tiny_sd1: Path, backend: str) -> None:
    trained = Trained(tiny_sd1)
    expected = trained.step(0)
    trained.model.compile_unet(backend)
    assert same(trained.step(0), expected, tolerance=1e-4)


@pytest.mark.parametrize(
    ("backend", "message"),
    [("inductr", "has no compiler inductr here; did you mean inductor"), ("cudagraphs", "cudagraphs needs CUDA")],
)
def test_a_compiler_that_is_not_here_is_told(backend: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_backend(backend, torch.device("cpu"))
    check_backend("aot_eager", torch.device("cpu"))


def test_inductor_without_a_c_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler here; install g\+\+"):
        check_backend("inductor", torch.device("cpu"))
