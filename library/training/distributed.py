"""The processes of a run: one flat all-reduce of the gradients a step, which also carries the wish to stop."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
        """
        if self.count == 1:
            return extra
        present = [torch.zeros_like(p) if g is None else g for g, p in zip(tensors, like, strict=True)]
        numbers = torch.tensor(extra, dtype=torch.float32, device=self.device)
        flat = torch.cat([*(g.reshape(-1).float() for g in present), numbers])
        torch.distributed.all_reduce(flat)
        offset = 0
        for parameter, gradient in zip(like, present, strict=True):
            piece = flat[offset : offset + gradient.numel()].view_as(gradient)
            parameter.grad = piece.to(gradient.dtype).clone()
            offset += gradient.numel()
        return flat[offset:].tolist()

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
