"""`--network_dim`, `--network_alpha` and `--network_args` as one record, whoever calls: a trainer or another program.

The names are those of library.options.modules, where a dry run checks them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import Problem, UserError, nearest
from library.options.modules import LORA_ARGS, LORA_REFUSED

KNOWN = tuple(LORA_ARGS)
_DEFAULT_DIM = 4
_UNSET = (None, "", "None")


@dataclass(frozen=True)
class LoraArgs:
    """The shape and the dropouts of a LoRA. `conv_dim` None is LoRA-LierLa, a number LoRA-C3Lier."""

    dim: int
    alpha: float
    conv_dim: int | None = None
    conv_alpha: float = 1.0
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    seed: int = 0


def parse(
    dim: object,
    alpha: object,
    network_args: Mapping[str, Any],
    *,
    neuron_dropout: object = None,
    from_file: bool = False,
) -> LoraArgs:
    """`--network_dim`, `--network_alpha`, `--network_dropout` and `--network_args` as one record.

    Values may be text. No dim means 4; no alpha, or 0, means the rank, as does a `conv_alpha` of 0, whose default is 1.
    `conv_dim` 0 or "None" means none. `from_file`: ranks and alphas come from a weight file and may not be given.
    Raises UserError with every problem: names that are unknown or not supported, and values out of range.
    """
    reader = _Reader(network_args)
    if from_file:
        for name in ("conv_dim", "conv_alpha"):
            if network_args.get(name) not in _UNSET:
                reader.add(
                    name, "can't be combined with --dim_from_weights", "the weight file decides ranks and alphas"
                )
    rank = reader.number("--network_dim", dim, _DEFAULT_DIM, low=1, whole=True)
    conv_dim = reader.number("conv_dim", network_args.get("conv_dim"), 0, low=0, whole=True)
    conv_alpha = reader.number("conv_alpha", network_args.get("conv_alpha"), 1.0, low=0)
    plain_alpha = reader.number("--network_alpha", alpha, 0.0, low=0)
    dropout = neuron_dropout if neuron_dropout not in _UNSET else network_args.get("dropout")
    found = LoraArgs(
        dim=int(rank),
        alpha=plain_alpha or rank,
        conv_dim=int(conv_dim) or None,
        conv_alpha=conv_alpha or conv_dim,
        dropout=reader.number("dropout", dropout, 0.0, low=0, below=1),
        rank_dropout=reader.number("rank_dropout", network_args.get("rank_dropout"), 0.0, low=0, below=1),
        module_dropout=reader.number("module_dropout", network_args.get("module_dropout"), 0.0, low=0, below=1),
        seed=int(reader.number("seed", network_args.get("seed"), 0, low=float("-inf"), whole=True)),
    )
    reader.done()
    return found


class _Reader:
    """Reads values and keeps every problem, so that a user mends them in one go."""

    def __init__(self, network_args: Mapping[str, Any]) -> None:
        self.problems: list[Problem] = []
        for name in network_args:
            if name in LORA_REFUSED:
                self.add(name, LORA_REFUSED[name])
            elif name not in (*KNOWN, "seed"):
                self.add(
                    name, "networks.lora has no such argument", nearest(name, KNOWN) or f"it has {', '.join(KNOWN)}"
                )

    def add(self, name: str, wrong: str, advice: str = "") -> None:
        where = name if name.startswith("--") else f"--network_args {name}"
        self.problems.append(Problem(where, wrong, advice))

    def number(
        self, name: str, value: object, default: float, *, low: float, below: float | None = None, whole: bool = False
    ) -> float:
        """`value` as a number of at least `low` and less than `below`, or a problem and the default."""
        if value in _UNSET:
            return default
        try:
            number = float(str(value))
        except ValueError:
            number = float("nan")
        in_range = low <= number < (below if below is not None else float("inf"))
        if in_range and (not whole or number == int(number)):
            return int(str(value)) if whole and str(value).isdigit() else number
        allowed = (
            ("a whole number" if whole else "a number") + f" from {low:g}" + (f" to below {below:g}" if below else "")
        )
        self.add(name, f"{value!r} is not {allowed}")
        return default

    def done(self) -> None:
        if self.problems:
            raise UserError(self.problems)
