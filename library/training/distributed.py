"""The processes of a run: one flat all-reduce of the gradients a step, which also carries the wish to stop."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_with_flags(
        self, tensors: Iterable[torch.Tensor | None], like: Sequence[torch.Tensor], extra: list[float]
    ) -> list[float]:
        """Sum gradients over the processes in place, together with a few numbers; returns the summed numbers.

        A rank that had no samples passes None for its gradients: they count as zero, and it gets the sums all the same.
        What no rank has a gradient for keeps none, so that an optimizer passes it over as with one process.
        """
        if self.count == 1:
            return extra
        given = list(tensors)
        present = [torch.zeros_like(p) if g is None else g for g, p in zip(given, like, strict=True)]
        numbers = torch.tensor([*extra, *(float(g is not None) for g in given)], device=self.device)
        flat = torch.cat([*(g.reshape(-1).float() for g in present), numbers])
        torch.distributed.all_reduce(flat)
        *pieces, summed = flat.split([*(g.numel() for g in present), len(numbers)])
        told = summed.tolist()
        for parameter, gradient, piece, count in zip(like, present, pieces, told[len(extra) :], strict=True):
            parameter.grad = piece.view_as(gradient).to(gradient.dtype).clone() if count else None
        return told[: len(extra)]

    def sum_numbers(self, numbers: list[float]) -> list[float]:
        """The sums of a few numbers over the processes."""
        return self.sum_with_flags([], [], numbers)

    def exchange(self, share: Any) -> list[Any]:
        """What every process gives, in the order of ranks."""
        if self.count == 1:
            return [share]
        shares: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(shares, share)
        return shares

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            torch.distributed.barrier()


def join_processes() -> Processes:
    """Join the process group that the launcher describes in the environment; without an accelerator, on the CPU."""
    from accelerate.state import PartialState
    from accelerate.utils.environment import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    return Processes(state.process_index, state.num_processes, state.device)
