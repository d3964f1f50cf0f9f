"""What must hold between flags for networks.dylora and networks.oft."""

from typing import Any

import pytest

from library.options import module_checks
from library.options.model import Model
from library.options.network import Network
from library.options.optimizer import Optimizer
from library.options.registry import Options
from library.options.reporting import Logging


def options(module: str, args: tuple[str, ...] = (), *, text_encoder_lr: Any = None, **flags: Any) -> Options:
    """Options of which only these flags were set."""
    return Options(
        network=Network(network_module=module, network_args=args or None, **flags),
        optimizer=Optimizer(text_encoder_lr=text_encoder_lr),
    )


@pytest.mark.parametrize(
    ("args", "flags", "told"),
    [
        (("unit=2", "conv_dim=8"), {"network_dim": 8}, []),
        (("unit=4",), {}, []),
        (("unit=3",), {"network_dim": 8}, ["unit=3 doesn't divide the rank 8"]),
        (("unit=3", "conv_dim=8"), {}, ["unit=3 doesn't divide the rank 4", "conv_dim=8 is not --network_dim, 4"]),
        (("unit=3",), {"dim_from_weights": True}, []),
        (("unit=x",), {}, []),
    ],
)
def test_dylora_needs_ranks_that_fit(args: tuple[str, ...], flags: dict[str, Any], told: list[str]) -> None:
    found = [problem.wrong for problem in module_checks.problems(options("networks.dylora", args, **flags))]
    assert found == told
    assert not list(module_checks.problems(options("networks.lora", (), **flags)))


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"network_alpha": 1e-3}, []),
        ({"network_alpha": 0.0}, ["--network_alpha"]),
        ({"network_alpha": 0.0, "dim_from_weights": True}, []),
        ({"network_dropout": 0.1}, ["--network_dropout"]),
        ({"scale_weight_norms": 1.0}, ["--scale_weight_norms"]),
        ({"text_encoder_lr": (1e-5,)}, ["--text_encoder_lr"]),
        ({"text_encoder_lr": (0.0,)}, []),
        ({"network_train_text_encoder_only": True}, ["--network_train_text_encoder_only"]),
    ],
)
def test_oft_trains_the_unet_without_dropout(flags: dict[str, Any], where: list[str]) -> None:
    assert [problem.where for problem in module_checks.problems(options("networks.oft", **flags))] == where


def test_what_does_little_for_oft_is_mentioned() -> None:
    assert not list(module_checks.notices(options("networks.oft", network_alpha=1e-3)))
    (line,) = module_checks.notices(options("networks.oft"))
    assert "1e-3 is usual" in line
    lines = list(module_checks.notices(options("networks.oft", network_alpha=0.1, network_train_unet_only=True)))
    assert len(lines) == 1
    assert not list(module_checks.notices(options("networks.lora", network_train_unet_only=True)))


@pytest.mark.parametrize("module", ["networks.lora", "networks.oft", "lycoris.kohya", "tests.greedy_lora"])
def test_norms_of_blocks_that_no_module_tells_are_mentioned(module: str) -> None:
    logged = Options(network=Network(network_module=module, network_alpha=1e-3), logging=Logging(log_norms=True))
    told = [line for line in module_checks.notices(logged) if line.startswith("--log_norms")]
    assert bool(told) == (not module.startswith("networks."))


@pytest.mark.parametrize(
    ("args", "flags", "algo"),
    [
        (("algo=GLoRA",), {}, "glora"),
        (("algo=ia3",), {}, "ia3"),
        (("algo=full",), {}, "full"),
        (("algo=dylora",), {}, "dylora"),
        (("algo=lokr",), {}, None),
        ((), {}, None),
        (("algo=ia3",), {"dim_from_weights": True}, None),
    ],
)
def test_norms_that_lycoris_does_not_bound_are_mentioned(
    args: tuple[str, ...], flags: dict[str, Any], algo: str | None
) -> None:
    bounded = options("lycoris.kohya", args, scale_weight_norms=1.0, **flags)
    told = [line for line in module_checks.notices(bounded) if line.startswith("--scale_weight_norms")]
    assert [f"algo={algo}," in line for line in told] == ([True] if algo else [])
    assert not list(module_checks.notices(options("lycoris.kohya", args, **flags)))


def test_dylora_is_not_compiled() -> None:
    compiled = Options(network=Network(network_module="networks.dylora"), model=Model(torch_compile=True))
    assert [problem.where for problem in module_checks.problems(compiled)] == ["--torch_compile"]
