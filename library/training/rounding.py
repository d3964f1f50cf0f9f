"""Training weights that stand in 16 bits (`--full_bf16`, `--full_fp16`) without losing small updates.

The model computes with 16-bit parameters; the optimizer steps float32 copies of them, and what it makes of them is
rounded up or down by chance, so that its mean is the exact value and updates far below a unit in the last place still
add up. The 16-bit weights are all there is to store: the copies are made anew before each step. Weights in float32
need nothing of this.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from library.rng import rng
from library.training.optimizers import BuiltOptimizer

Half = Literal["fp16", "bf16"]
DTYPES: dict[Half, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def round_by_chance(values: torch.Tensor, dtype: torch.dtype, draws: torch.Tensor) -> torch.Tensor:
    """`values` (n,) float32 in a 16-bit `dtype`, rounded away from zero where `draws` (n,), uniform in [0, 1), are
    below the share of the way to the next value; values that `dtype` holds, infinities and NaN stay as they are.

    Beyond the largest finite value of `dtype` the nearest one counts.
    """
    nearest = values.to(dtype)
    bits = nearest.view(torch.int16)
    below = bits - (nearest.float().abs() > values.abs()).to(torch.int16)
    low, high = below.view(dtype), (below + 1).view(dtype)
    start, size = low.float().abs(), values.abs()
    share = (size - start) / (high.float().abs() - start)
    rounded = torch.where(draws < share, high, low)
    return torch.where(nearest.isfinite() & high.isfinite(), rounded, nearest)


class RoundedParameters:
    """16-bit parameters of a model with the float32 `masters` that an optimizer is built over.

    A step goes: `before_step`, (unscale, clip,) the optimizer's step, `after_step`. Gradients are added up in float32
    by `accumulate`, which `before_step` calls for those that are left.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], dtype: torch.dtype, seed: int, device: torch.device
    ) -> None:
        """Cast `parameters` in place to `dtype` (on `device`, where they stand).

        Raises:
            ValueError: `dtype` isn't one of 16 bits.
        """
        if dtype not in DTYPES.values():
            raise ValueError(f"{dtype} is no 16-bit type")
        self._parameters, self._dtype, self._seed = list(parameters), dtype, seed
        self._device = torch.device(device)
        for parameter in self._parameters:
            parameter.data = parameter.data.to(device=self._device, dtype=dtype)
        self.masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in self._parameters]

    def groups(self, groups: Sequence[dict]) -> list[dict]:
        """`groups` of an optimizer with each parameter replaced by its master."""
        mine = {id(parameter): master for parameter, master in zip(self._parameters, self.masters, strict=True)}
        return [{**group, "params": [mine[id(parameter)] for parameter in group["params"]]} for group in groups]

    def accumulate(self) -> None:
        """Move the gradients of the 16-bit parameters to the masters, added to those that are there."""
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def before_step(self) -> None:
        """The masters become the 16-bit weights, exactly; all gradients are theirs."""
        self.accumulate()
        torch._foreach_copy_(self.masters, self._parameters)

    @torch.no_grad()
    def after_step(self, updates_done: int) -> None:
        """Round the masters into the 16-bit weights, by draws of this update (`updates_done` of them came before)."""
        self.zero_grad()
        values = torch.cat([master.reshape(-1) for master in self.masters])
        rounded = round_by_chance(values, self._dtype, self._draws(updates_done))
        self._write(rounded)

    @contextmanager
    def showing_gradients(self) -> Iterator[None]:
        """While it lasts, the 16-bit parameters have the masters' gradients, in 16 bits, for whoever looks there."""
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            parameter.grad = None if master.grad is None else master.grad.to(self._dtype)
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.grad = None

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.masters, *self._parameters):
            tensor.grad = None

    @contextmanager
    def evaluating(self, built: BuiltOptimizer) -> Iterator[None]:
        """While it lasts, the 16-bit weights are those to look at and to save (`BuiltOptimizer.evaluating`), rounded to
        the nearest; afterwards they are bit for bit as before."""
        if not built.info.schedule_free:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self._parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.masters, self._parameters)
        try:
            with built.evaluating():
                with torch.no_grad():
                    torch._foreach_copy_(self._parameters, self.masters)
                yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, kept)

    @torch.no_grad()
    def freeze(self, built: BuiltOptimizer, parameters: Sequence[torch.Tensor]) -> None:
        """As `BuiltOptimizer.freeze`, of 16-bit parameters: what is shown of them, rounded to the nearest."""
        pairs = [
            pair for pair in zip(self._parameters, self.masters, strict=True) if any(pair[0] is p for p in parameters)
        ]
        with self.evaluating(built):
            shown = [parameter.detach().clone() for parameter, _ in pairs]
        for (parameter, master), values in zip(pairs, shown, strict=True):
            parameter.copy_(values)
            master.copy_(values)
            if "z" in (state := built.optimizer.state.get(master, {})):
                state["z"].copy_(values)

    def _write(self, flat: torch.Tensor) -> None:
        parts = flat.split([parameter.numel() for parameter in self._parameters])
        shaped = [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]
        torch._foreach_copy_(self._parameters, shaped)

    def _draws(self, updates_done: int) -> torch.Tensor:
        """Uniform draws in [0, 1), float32, one for each number: by parameter on the CPU; a GPU draws them itself, from
        one generator for each update."""
        sizes = [parameter.numel() for parameter in self._parameters]
        if self._device.type != "cpu":
            generator = torch.Generator(self._device)
            generator.manual_seed(int(rng(self._seed, "rounding", updates_done).integers(2**63)))
            return torch.rand(sum(sizes), generator=generator, device=self._device)
        draws = torch.empty(sum(sizes), dtype=torch.float32)
        for number, part in enumerate(draws.split(sizes)):
            rng(self._seed, "rounding", updates_done, number).random(out=part.numpy(), dtype="float32")
        return draws
