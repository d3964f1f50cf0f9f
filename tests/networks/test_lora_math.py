"""One LoRA on one layer against the formula in float64, against peft, and what it costs."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from library.models.lora_targets import LoraTarget
from networks.lora_args import LoraArgs
from networks.lora_layers import LoraLayer, RandomContext
from networks.lora_math import FrozenLinearWithLora

RANK, ALPHA = 3, 2.0
CASES: dict[str, Any] = {
    "linear": (lambda: nn.Linear(6, 10), "linear", (2, 5, 6)),
    "linear of vectors": (lambda: nn.Linear(6, 10, bias=False), "linear", (4, 6)),
    "1x1": (lambda: nn.Conv2d(6, 10, 1), "1x1", (2, 6, 4, 5)),
    "3x3": (lambda: nn.Conv2d(6, 10, 3, padding=1), "3x3", (2, 6, 4, 5)),
    "3x3 stride 2": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), "3x3", (2, 6, 7, 6)),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def make(case: str, **args: Any) -> tuple[nn.Module, LoraLayer, torch.Tensor]:
    """A frozen module, an attached LoRA with weights that do something, and an input."""
    torch.manual_seed(1)
    build, kernel, shape = CASES[case]
    base = build().requires_grad_(False)
    target = LoraTarget("a_module", "unet", "a", 6, 10, kernel)
    layer = LoraLayer(target, base, RANK, ALPHA, LoraArgs(RANK, ALPHA, **args), RandomContext())
    nn.init.normal_(layer.lora_up.weight)
    layer.attach()
    return base, layer, torch.randn(shape)


def merged(base: nn.Module, layer: LoraLayer) -> nn.Module:
    """The frozen module with up @ down * alpha / rank added to its weight, in float64, differentiable."""
    plain = copy.deepcopy(base)
    plain.__dict__.pop("forward", None)
    plain = plain.double()
    down, up = layer.lora_down.weight.double(), layer.lora_up.weight.double()
    product = torch.einsum("or,r...->o...", up.flatten(1), down) * (ALPHA / RANK)
    weight = plain.weight + product
    del plain.weight
    plain.weight = weight
    return plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_the_formula(case: str, layout: torch.memory_format) -> None:
    base, layer, x = make(case)
    if x.dim() == 4:
        x = x.to(memory_format=layout)
        base.to(memory_format=layout)
    x.requires_grad_()
    out = base(x)
    weights = torch.randn_like(out)
    factors = [x, layer.lora_down.weight, layer.lora_up.weight]
    found = torch.autograd.grad((out * weights).sum(), factors)
    exact = merged(base, layer)(x.double())
    expected = torch.autograd.grad((exact * weights.double()).sum(), factors)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-4)


def test_gradients_of_the_fused_step_are_numerically_right() -> None:
    x, down, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (2, 4), (5, 2)))
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    mask = (torch.rand(2, 3, 2) > 0.4).double()

    def step(*inputs: torch.Tensor) -> torch.Tensor:
        return FrozenLinearWithLora.apply(inputs[0], weight, bias, inputs[1], inputs[2], 0.7, mask)

    assert torch.autograd.gradcheck(step, (x, down, up))


@pytest.mark.parametrize("case", CASES)
def test_same_as_peft_on_the_same_weights(case: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    base, layer, x = make(case)
    other = nn.Sequential(CASES[case][0]())
    other[0].load_state_dict(base.state_dict())
    other = inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=False), other
    )
    with torch.no_grad():
        other[0].lora_A["default"].weight.copy_(layer.lora_down.weight)
        other[0].lora_B["default"].weight.copy_(layer.lora_up.weight)
    x.requires_grad_()
    out, expected = base(x), other(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(out.square().sum(), [x, layer.lora_down.weight, layer.lora_up.weight])
    theirs = torch.autograd.grad(
        expected.square().sum(), [x, other[0].lora_A["default"].weight, other[0].lora_B["default"].weight]
    )
    for one, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, reference, rtol=1e-4, atol=1e-4)


FREE = {"t", "view", "reshape", "permute", "transpose", "flatten", "unsqueeze", "expand", "detach", "to", "result_type"}


def outermost(event: FunctionEvent) -> FunctionEvent:
    """The aten operator, itself perhaps, that was called from outside of aten."""
    while event.cpu_parent and event.cpu_parent.name.startswith("aten::"):
        event = event.cpu_parent
    return event


def kernels(call: nn.Module, x: torch.Tensor) -> list[str]:
    """Outermost aten operators of one forward, views left out (a convolution counts as one, whatever is inside)."""
    call(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call(x)
    events = [event for event in profiler.events() if event.name.startswith("aten::")]
    copies = [event for event in events if event.name in ("aten::clone", "aten::_to_copy")]
    assert all(outermost(event).name == "aten::conv2d" for event in copies), "a tensor was copied"
    outer = [event.name.removeprefix("aten::") for event in events if outermost(event) is event]
    return [name for name in outer if name not in FREE]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_lora_adds_two_kernels(case: str, layout: torch.memory_format) -> None:
    base, layer, x = make(case)
    if x.dim() == 4:
        x = x.to(memory_format=layout)
        base.to(memory_format=layout)
    ours = kernels(base, x)
    layer.detach()
    assert len(kernels(base, x)) == 1
    assert len(ours) == 3, ours


@pytest.mark.parametrize("case", CASES)
def test_low_precision_base_keeps_its_dtype_and_fp32_adapters(case: str) -> None:
    base, layer, x = make(case)
    exact = base(x).detach()
    base.to(torch.bfloat16)
    out = base(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.1)
    out.sum().backward()
    assert layer.lora_down.weight.grad.dtype == layer.lora_up.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_autocast_computes_in_its_own_dtype(case: str) -> None:
    base, layer, x = make(case)
    exact = base(x).detach()
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = base(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.1)
    assert layer.lora_up.weight.grad.dtype == x.grad.dtype == torch.float32


def test_only_the_input_and_the_rank_wide_product_are_kept_for_backward() -> None:
    base, _, _ = make("linear")
    x = torch.randn(64, 6, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base(x)
    assert sorted(kept)[-2:] == [64 * RANK, 64 * 6]
