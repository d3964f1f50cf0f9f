"""The processes of a run: one flat all-reduce of the gradients a step, which also carries the wish to stop."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from library.to_device import to_device

DEFAULT_TIMEOUT = 30
"""Minutes that processes wait for each other, as in torch."""


class LostProcessError(Exception):
    """Another process of the run has ended, or didn't answer in time: nothing can be summed over processes any more.

    What was trained up to the last update is whole in this one.
    """


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device
    timeout_minutes: int = DEFAULT_TIMEOUT

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_gradients(
        self, parameters: Sequence[torch.Tensor], extra: Sequence[torch.Tensor | float], has_samples: bool = True
    ) -> list[torch.Tensor | float]:
        """Sum the gradients of `parameters` over the processes in place, together with a few numbers; returns the sums.

        A process that had no samples (`has_samples`) gets the sums all the same. What no process has a gradient for
        keeps none, so that an optimizer passes it over as with one process; that follows from the network alone, so
        only a process without samples has to ask, and no other waits for its device. Tensors in `extra` are on the
        device already.

        Raises:
            LostProcessError: another process has ended or doesn't answer; gradients are as they were.
        """
        if self.count == 1:
            return list(extra)
        present = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        known = [0.0 if isinstance(number, torch.Tensor) else number for number in extra]
        known += [float(parameter.grad is not None) for parameter in parameters]
        ours, given = to_device(torch.tensor(known), self.device).split([len(extra), len(parameters)])
        own = [
            number.detach().float().reshape(1) if isinstance(number, torch.Tensor) else mine
            for number, mine in zip(extra, ours.split(1), strict=True)
        ]
        flat = torch.cat([*(gradient.reshape(-1).float() for gradient in present), *own, given])
        *pieces, numbers, counts = flat.split([*(g.numel() for g in present), len(own), len(parameters)])
        with self._together():
            torch.distributed.all_reduce(flat)
            told = counts.tolist() if not has_samples else []
        for index, (parameter, gradient, piece) in enumerate(zip(parameters, present, pieces, strict=True)):
            has_one = bool(told[index]) if told else parameter.grad is not None
            parameter.grad = piece.view_as(gradient).to(gradient.dtype).clone() if has_one else None
        return list(numbers.unbind())

    def exchange(self, share: Any) -> list[Any]:
        """What every process gives, in the order of ranks."""
        if self.count == 1:
            return [share]
        shares: list[Any] = [None] * self.count
        with self._together():
            torch.distributed.all_gather_object(shares, share)
        return shares

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            with self._together():
                torch.distributed.barrier()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What torch raises when a process is gone, whose kinds differ by backend, becomes a `LostProcessError`."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as fault:
            reason = " ".join(str(fault).split())[:160]
            raise LostProcessError(
                f"process {self.rank} of {self.count} lost another one, which has ended or has not answered for "
                f"{self.timeout_minutes} minutes (--ddp_timeout); its own messages say why ({reason})"
            ) from fault


def join_processes(timeout_minutes: int | None = None) -> Processes:
    """Join the process group that the launcher describes in the environment; without an accelerator, on the CPU.

    Args:
        timeout_minutes: how long processes wait for each other (default: 30).
    """
    from accelerate.state import PartialState
    from accelerate.utils.environment import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    minutes = timeout_minutes or DEFAULT_TIMEOUT
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    state = PartialState(cpu=cpu, **({} if alone else {"timeout": timedelta(minutes=minutes)}))
    return Processes(state.process_index, state.num_processes, state.device, minutes)
