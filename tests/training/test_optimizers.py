"""Every optimizer of the registry trains and goes on exactly; settings, labels and mistakes."""

import inspect
import io
import sys
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from library.errors import UserError
from library.options.optimizer_names import OPTIMIZERS, TORCH_NAMES, TORCH_REFUSED, OptimizerInfo, optimizer_info
from library.training.optimizers import BuiltOptimizer, build_optimizer

DOTTED = (
    *("prodigyplus.ProdigyPlusScheduleFree", "bitsandbytes.optim.AdEMAMix8bit", "pytorch_optimizer.CAME"),
    *("pytorch_optimizer.ScheduleFreeAdamW", "pytorch_optimizer.StableAdamW", "torch.optim.Adam"),
)
EVERY = (*(info.name for info in OPTIMIZERS), *TORCH_NAMES, *DOTTED)
SHAPES = ((64, 80), (80, 64), (4, 8, 3, 3), (3, 5))
FLAT = ((64, 80), (80, 64), (16, 24), (3, 5))
HUNDREDTH = 0.01
STEPS = {"RAdamScheduleFree": 8}
"""Optimizers that don't move in their first three steps."""


class Problem:
    """A small regression with parameters of two groups: linear and convolution shapes, some above 4096 numbers."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        drawn = torch.Generator().manual_seed(5)
        shapes = FLAT if name == "Muon" else SHAPES
        starts = [0.1 * torch.randn(shape, generator=drawn) for shape in shapes]
        self.parameters = [torch.nn.Parameter(start.to(device)) for start in starts]
        self.targets = [torch.randn(shape, generator=drawn).to(device) for shape in shapes]

    def groups(self, rate: float, other: float | None = None) -> list[dict[str, Any]]:
        return [
            {"params": self.parameters[:2], "lr": rate},
            {"params": self.parameters[2:], "lr": rate if other is None else other},
        ]

    def loss(self) -> torch.Tensor:
        pairs = zip(self.parameters, self.targets, strict=True)
        return torch.stack([(parameter - target).square().mean() for parameter, target in pairs]).sum()

    def step(self, built: BuiltOptimizer) -> float:
        loss = self.loss()
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def rate_of(name: str) -> float:
    """A rate at which `name` learns."""
    info = optimizer_info(name)
    return 1.0 if info is not None and (info.has_d or "Prodigy" in name) else HUNDREDTH


def built_over(name: str, problem: Problem, arguments: Mapping[str, Any] | None = None) -> BuiltOptimizer:
    return build_optimizer(name, problem.groups(rate_of(name)), arguments or {})


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What a state is after it was written and read without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_trains_three_steps_and_goes_on_bit_for_bit(name: str) -> None:
    problem = Problem(name)
    built = built_over(name, problem)
    start = [parameter.detach().clone() for parameter in problem.parameters]
    losses = [problem.step(built) for _ in range(STEPS.get(name, 3))]
    assert all(torch.isfinite(parameter).all() for parameter in problem.parameters)
    assert any(not torch.equal(one, two) for one, two in zip(start, problem.parameters, strict=True))
    assert losses[-1] <= losses[0]
    info = optimizer_info(name)
    assert info is not None and info.deterministic

    state = through_a_file(built.state_dict())
    again = Problem(name)
    for parameter, there in zip(again.parameters, problem.parameters, strict=True):
        parameter.data.copy_(there.detach())
    resumed = built_over(name, again)
    resumed.load_state_dict(state)
    for _ in range(4):
        assert again.step(resumed) == problem.step(built)
    for one, two in zip(again.parameters, problem.parameters, strict=True):
        assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.name)
def test_its_class_takes_every_setting_of_its_table(info: OptimizerInfo) -> None:
    problem = Problem(info.name)
    taken = inspect.signature(type(built_over(info.name, problem).optimizer)).parameters
    assert info.settings is not None
    assert set(info.settings) <= set(taken) - {"lr", "params"}


def test_the_table_of_torch_is_complete() -> None:
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    registered = {info.cls for info in OPTIMIZERS if info.module == "torch.optim"} | {"Adafactor"}
    assert classes == set(TORCH_NAMES) | set(TORCH_REFUSED) | registered


@pytest.mark.filterwarnings("ignore")
def test_8_bit_states_stay_in_8_bits_after_a_resume() -> None:
    problem = Problem("AdamW8bit")
    built = built_over("AdamW8bit", problem)
    problem.step(built)
    built.load_state_dict(through_a_file(built.state_dict()))
    state = built.optimizer.state
    assert state[problem.parameters[0]]["state1"].dtype == torch.uint8
    assert state[problem.parameters[3]]["state1"].dtype == torch.float32


def test_labels_name_the_class_and_its_settings() -> None:
    problem = Problem("AdamW")
    assert built_over("", problem).label == "torch.optim.adamw.AdamW"
    given = built_over("adamw", problem, {"weight_decay": 0.1, "betas": (0.9, 0.99)})
    assert given.label == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    assert built_over("sgdnesterov", problem).label == "torch.optim.sgd.SGD(momentum=0.9)"
    assert built_over("Adafactor", problem).label == "transformers.optimization.Adafactor(relative_step=True)"
    preprint = "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint"
    assert built_over("DAdaptation", problem).label == preprint


def test_the_fused_form_is_chosen_unless_the_user_chose_another() -> None:
    problem = Problem("AdamW")
    assert built_over("AdamW", problem).optimizer.param_groups[0]["fused"] is True
    chosen = built_over("AdamW", problem, {"foreach": True}).optimizer.param_groups[0]
    assert (chosen["fused"], chosen["foreach"]) == (None, True)


def test_momentum_is_nesterovs() -> None:
    group = built_over("SGDNesterov", Problem("SGDNesterov")).optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)


def test_a_group_without_a_rate_gets_the_run_s() -> None:
    problem = Problem("AdamW")
    groups: list[dict[str, Any]] = [
        {"params": problem.parameters[:2]},
        {"params": problem.parameters[2:], "lr": 5e-4},
    ]
    built = build_optimizer("AdamW", groups, {}, rate=2e-4)
    assert [group["lr"] for group in built.optimizer.param_groups] == [2e-4, 5e-4]


def test_relative_step_takes_the_rates_away() -> None:
    problem = Problem("Adafactor")
    built = built_over("Adafactor", problem)
    assert built.finds_its_rate and [group["lr"] for group in built.optimizer.param_groups] == [None, None]
    fixed = built_over("Adafactor", problem, {"relative_step": False})
    assert not fixed.finds_its_rate and fixed.optimizer.param_groups[0]["lr"] == HUNDREDTH
    forced = built_over("Adafactor", problem, {"relative_step": False, "warmup_init": True})
    assert forced.finds_its_rate and forced.optimizer.param_groups[0]["relative_step"] is True


@pytest.mark.parametrize("name", [info.name for info in OPTIMIZERS if info.schedule_free] + [DOTTED[0]])
def test_looking_at_schedule_free_weights_changes_no_bit(name: str) -> None:
    problem, undisturbed = Problem(name), Problem(name)
    built, other = built_over(name, problem), built_over(name, undisturbed)
    for _ in range(8):
        problem.step(built)
        undisturbed.step(other)
    kept = [parameter.detach().clone() for parameter in problem.parameters]
    with built.evaluating():
        shown = [parameter.detach().clone() for parameter in problem.parameters]
        with built.evaluating():
            assert torch.equal(problem.parameters[0], shown[0])
        assert torch.equal(problem.parameters[0], shown[0])
    assert all(torch.equal(one, two) for one, two in zip(kept, problem.parameters, strict=True))
    beta = built.optimizer.param_groups[0].get("momentum") or built.optimizer.param_groups[0]["betas"][0]
    for parameter, seen in zip(problem.parameters, shown, strict=True):
        z = built.optimizer.state[parameter]["z"].double()
        average = (parameter.detach().double() - (1 - beta) * z) / beta
        torch.testing.assert_close(seen.double(), average, rtol=1e-4, atol=1e-6)
    for _ in range(2):
        problem.step(built)
        undisturbed.step(other)
    assert all(torch.equal(one, two) for one, two in zip(problem.parameters, undisturbed.parameters, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [info.name for info in OPTIMIZERS if info.schedule_free] + [DOTTED[0]])
def test_frozen_weights_are_what_was_shown_from_then_on(name: str) -> None:
    problem = Problem(name)
    built = built_over(name, problem)
    for _ in range(8):
        problem.step(built)
    frozen = built.parameters()[0]
    with built.evaluating():
        shown = frozen.detach().clone()
    assert not torch.equal(frozen, shown)
    built.freeze([frozen])
    frozen.requires_grad_(False)
    for _ in range(2):
        problem.step(built)
        assert torch.equal(frozen, shown)
        with built.evaluating():
            assert torch.equal(frozen, shown)


def test_weights_are_put_back_where_looking_at_them_fails() -> None:
    problem = Problem("AdamWScheduleFree")
    built = built_over("AdamWScheduleFree", problem)
    problem.step(built)
    kept = problem.parameters[0].detach().clone()
    with pytest.raises(RuntimeError, match="a preview"), built.evaluating():
        raise RuntimeError("a preview failed")
    assert torch.equal(kept, problem.parameters[0])
    problem.step(built)


def test_others_show_the_weights_that_they_train() -> None:
    problem = Problem("AdamW")
    built = built_over("AdamW", problem)
    problem.step(built)
    before = problem.parameters[0].detach().clone()
    with built.evaluating():
        assert torch.equal(before, problem.parameters[0])


@pytest.mark.parametrize("name", [info.name for info in OPTIMIZERS if info.has_d] + [DOTTED[0]])
def test_step_sizes_are_d_times_the_rate(name: str) -> None:
    problem = Problem(name)
    built = build_optimizer(name, problem.groups(1.0), {}, names=("unet", "textencoder"))
    for _ in range(3):
        problem.step(built)
    sizes = built.step_sizes()
    assert sizes is not None and set(sizes) == {"unet", "textencoder"}
    group = built.optimizer.param_groups[0]
    assert sizes["unet"] == pytest.approx(group["d"] * group.get("effective_lr", 1.0))
    assert sizes["unet"] > 0


def test_others_have_no_step_sizes() -> None:
    assert built_over("AdamW", Problem("AdamW")).step_sizes() is None


class _Forgetful(torch.optim.SGD):
    """Its rate falls with a count and a tensor that its own state leaves out; it keeps a whole number per parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.count, self.sum = 0, torch.zeros(())

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.sum += 0.5
        for group in self.param_groups:
            for parameter in group["params"]:
                seen = self.state[parameter].setdefault("seen", torch.zeros((), dtype=torch.int64))
                seen += 1
                parameter.data -= group["lr"] * parameter.grad / (self.count + self.sum + seen)


def test_what_an_optimizer_forgets_to_store_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("forgetful")
    monkeypatch.setattr(module, "Forgetful", _Forgetful, raising=False)
    monkeypatch.setitem(sys.modules, "forgetful", module)
    problem, again = Problem("x"), Problem("x")
    built, resumed = built_over("forgetful.Forgetful", problem), built_over("forgetful.Forgetful", again)
    problem.step(built)
    state = through_a_file(built.state_dict())
    for parameter, there in zip(again.parameters, problem.parameters, strict=True):
        parameter.data.copy_(there.detach())
    resumed.load_state_dict(state)
    assert resumed.optimizer.state[again.parameters[0]]["seen"].dtype == torch.int64
    problem.step(built)
    again.step(resumed)
    assert torch.equal(problem.parameters[0], again.parameters[0])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("AdmW", {}, "'AdmW' is not known; did you mean AdamW"),
        ("AdamW", {"weigt_decay": 1}, "AdamW takes no 'weigt_decay'; did you mean weight_decay?"),
        ("AdamW", {"betas": (2.0, 0.9)}, "AdamW can't train this: Invalid beta"),
        ("Muon", {}, "Muon can't train this: Muon only supports 2D parameters"),
        ("torch.optim.LBFGS", {}, "can't train this"),
        ("torch.optim.SparseAdam", {}, "can't train this"),
        ("torch.optim.Nothing", {}, "torch.optim has no Nothing"),
        ("no_such_package.Adam", {}, "no_such_package.Adam can't be imported: No module named 'no_such_package'"),
        ("torch.nn.Linear", {}, "torch.nn.Linear is no torch.optim.Optimizer"),
    ],
)
def test_what_can_not_work_is_told_when_it_is_built(name: str, arguments: dict[str, Any], message: str) -> None:
    problem = Problem("x")
    with pytest.raises(UserError) as caught:
        build_optimizer(name, problem.groups(HUNDREDTH), arguments, device=torch.device("cpu"))
    assert message in str(caught.value)


@pytest.mark.parametrize("info", [info for info in OPTIMIZERS if info.has_d], ids=lambda info: info.name)
def test_several_rates_are_refused_where_the_class_refuses_them(info: OptimizerInfo) -> None:
    groups = Problem(info.name).groups(1.0, 0.5)
    if info.one_rate:
        with pytest.raises(UserError, match="different lr values"):
            build_optimizer(info.name, groups, {})
    else:
        assert [group["lr"] for group in build_optimizer(info.name, groups, {}).optimizer.param_groups] == [1.0, 0.5]


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(UserError, match=r"Lion can't be imported.*; pip install 'lorasmith\[optimizers\]'"):
        built_over("Lion", Problem("Lion"))


def test_one_that_needs_another_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    record = OptimizerInfo("Fast", "torch.optim", "AdamW", needs="cuda")
    monkeypatch.setattr("library.training.optimizers.optimizer_info", lambda name: record)
    with pytest.raises(UserError, match="Fast can't run on cpu: it needs cuda"):
        built_over("Fast", Problem("x"))


def test_trying_leaves_the_parameters_and_their_gradients_alone() -> None:
    problem = Problem("AdamW")
    before = [parameter.detach().clone() for parameter in problem.parameters]
    built = built_over("AdamW", problem)
    assert all(torch.equal(one, two) for one, two in zip(before, problem.parameters, strict=True))
    assert all(parameter.grad is None for parameter in problem.parameters) and not built.optimizer.state
