"""The registry on an NVIDIA GPU: every optimizer steps there and goes on from its state, 16-bit weights are rounded."""

import pytest
import torch

from library.options.optimizer_names import OPTIMIZERS
from library.training.optimizers import build_optimizer
from library.training.rounding import RoundedParameters
from tests.training.test_optimizers import STEPS, Problem, built_over, rate_of, through_a_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [info.name for info in OPTIMIZERS])
def test_trains_three_steps_and_goes_on_bit_for_bit(name: str) -> None:
    problem, again = Problem(name, "cuda"), Problem(name, "cuda")
    built, resumed = built_over(name, problem), built_over(name, again)
    losses = [problem.step(built) for _ in range(STEPS.get(name, 3))]
    assert losses[-1] <= losses[0]
    state = through_a_file(built.state_dict())
    for parameter, there in zip(again.parameters, problem.parameters, strict=True):
        parameter.data.copy_(there.detach())
    resumed.load_state_dict(state)
    for _ in range(3):
        problem.step(built)
        again.step(resumed)
    assert all(torch.equal(one, two) for one, two in zip(again.parameters, problem.parameters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_right_on_average_and_repeatable(dtype: torch.dtype) -> None:
    def after(update: int) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.ones(1_000_000, device="cuda"))
        rounded = RoundedParameters([parameter], dtype, 7, torch.device("cuda"))
        rounded.before_step()
        rounded.masters[0].data -= 1e-4
        rounded.after_step(update)
        return parameter.detach()

    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))
    assert after(1).double().mean().item() == pytest.approx(1 - 1e-4, abs=1e-5)


def test_16_bit_weights_train_on_the_gpu() -> None:
    problem = Problem("AdamW", "cuda")
    groups = problem.groups(rate_of("AdamW"))
    rounded = RoundedParameters(problem.parameters, torch.bfloat16, 7, torch.device("cuda"))
    built = build_optimizer("AdamW", rounded.groups(groups), {})
    first = float(problem.loss().detach())
    for number in range(20):
        problem.loss().backward()
        rounded.before_step()
        built.optimizer.step()
        rounded.after_step(number)
    assert float(problem.loss().detach()) < first
