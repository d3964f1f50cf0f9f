"""Masks that are drawn inside compiled code: new at each step, drawn anew by the same graph."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from library.rng import rng
from networks.opaque_draws import drawn, handle


class Dropping(nn.Module):
    """A Linear behind a mask that depends on `step` and on the layer's name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.step = name, 0
        self.linear = nn.Linear(4, 4)
        self.handle = handle(self)

    def draw_mask(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        draws = rng(1, "dropout", self.step, self.name).random(shape)
        return torch.from_numpy((draws > 0.5).astype("float32")).to(device)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * drawn(self.handle, x, tuple(y.shape))


@pytest.fixture(autouse=True)
def own_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_two_layers_share_a_graph_and_draw_their_own_masks_at_each_step(backend: str) -> None:
    layers = [Dropping("one"), Dropping("two")]
    x = torch.ones(16, 4, requires_grad=True)
    results: list[tuple[Tensor, ...]] = []
    for compiled in (False, True):
        if compiled:
            for layer in layers:
                layer.compile(backend=backend, dynamic=False, fullgraph=True)
        for step in range(3):
            for layer in layers:
                layer.step = step
                y = layer(x)
                mask = layer.draw_mask((16, 4), torch.device("cpu"))
                assert torch.allclose(y.detach(), layer.linear(x).detach() * mask)
                results.append((y.detach(), *torch.autograd.grad(y.sum(), [x, layer.linear.weight])))
    plain, traced = results[:6], results[6:]
    for one, two in zip(plain, traced, strict=True):
        assert all(torch.allclose(left, right) for left, right in zip(one, two, strict=True))
    assert len({y.numpy().tobytes() for y, *_ in plain}) == 6
    assert counters["stats"]["unique_graphs"] == 1


def test_a_layer_that_is_gone_has_no_handle() -> None:
    layer = Dropping("x")
    name = layer.handle
    del layer
    with pytest.raises(KeyError):
        drawn(name, torch.ones(1), (1,))
