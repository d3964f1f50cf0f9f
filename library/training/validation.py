"""The loss on held-out pictures: always the same captions, crops, noise and timesteps, so that passes can be compared.

What is done about it (stopping early, keeping the best) is not decided here, but in library.training.watch.
"""

import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from library.console import track
from library.data.loader import Batch
from library.data.plan import Plan
from library.training.coordinates import Coordinates
from library.training.denoising import Denoising
from library.training.noise import NoiseSettings
from library.training.steps import VALIDATION_TIMESTEPS

_Losses = dict[tuple[int, int], float]
"""The loss of a picture at a timestep, by (number of its record in the plan, timestep)."""


class HeldOut(Protocol):
    """What gives the batches of held-out pictures, as data.loader does."""

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]: ...


@dataclass(frozen=True)
class ValidationResult:
    """Mean losses of one pass: over everything, over each subset's pictures, and over each timestep ("t200").

    A subset without pictures in the pass is absent.
    """

    loss: float
    by_subset: dict[str, float]
    by_band: dict[str, float]


def fixed_timesteps(noise: NoiseSettings) -> list[int]:
    """Four timesteps evenly inside the range that is trained: 200, 400, 600, 800 of the whole one."""
    spread = np.linspace(noise.min_timestep, noise.max_timestep, VALIDATION_TIMESTEPS + 2)
    return [int(t) for t in spread[1:-1]]


def subset_titles(plan: Plan) -> dict[tuple[int, int], str]:
    """What to call each subset, by (dataset, subset): its name, with the dataset's size where that leaves two alike.

    Those that are alike even so, because they list the same folder twice, share a title.
    """
    names = {
        (number, index): subset.name
        for number, dataset in enumerate(plan.datasets)
        for index, subset in enumerate(dataset.spec.subsets)
    }
    wearers: Mapping[str, list[tuple[int, int]]] = defaultdict(list)
    for key, name in names.items():
        wearers[name].append(key)
    titles = {}
    for (number, index), name in names.items():
        width, height = plan.datasets[number].spec.resolution
        folder = plan.datasets[number].spec.subsets[index].image_dir
        others = [plan.datasets[n].spec.subsets[i].image_dir for n, i in wearers[name]]
        sizes = {plan.datasets[n].spec.resolution for n, _ in wearers[name]}
        title = f"{folder.parent.name}_{name}" if len(set(others)) > 1 and folder.parent.name else name
        titles[number, index] = f"{title}_{width}x{height}" if len(sizes) > 1 else title
    return titles


class Validation:
    """Looks at every held-out picture, at four timesteps each.

    Noise belongs to the picture, so a pass gives the same numbers whatever the number of processes and the batch size,
    but for the rounding of other kernels; every process gets the same bits.

    Args:
        loader: makes the batches of `plan`, for this process, with the same `seed`.
        seed: of the noise and of the order, whatever that of the training is.
        max_batches: batches of a pass at most; None for all.
    """

    def __init__(
        self, denoising: Denoising, loader: HeldOut, plan: Plan, *, seed: int, max_batches: int | None = None
    ) -> None:
        self._denoising, self._loader, self._plan, self._seed = denoising, loader, plan, seed
        self._wanted = min(plan.batches_per_epoch, max_batches or plan.batches_per_epoch)
        self._batches = plan.epoch(seed, 1)[: self._wanted]
        self._titles = subset_titles(plan)

    def run(self) -> ValidationResult:
        """The mean losses of all processes together; all of them must call it. Nothing is changed by it."""
        denoising = self._denoising
        numbers: list[int] = []
        rows: list[torch.Tensor] = []
        timesteps = fixed_timesteps(denoising.noise)
        denoising.trainable.train(False)
        try:
            with torch.no_grad():
                epoch = self._loader.epoch(1)
                for batch in track(epoch, "validation", self._wanted):
                    if batch.positions:
                        samples = self._batches[batch.index].samples
                        chosen = tuple(samples[position].record for position in batch.positions)
                        numbers += chosen
                        rows.append(self._losses(batch, chosen, timesteps))
                    if batch.index + 1 >= self._wanted:
                        break
                epoch.close()
        finally:
            denoising.trainable.train(True)
        values = torch.cat(rows).cpu().tolist() if rows else []
        mine = {
            (number, timestep): loss
            for number, losses in zip(numbers, values, strict=True)
            for timestep, loss in zip(timesteps, losses, strict=True)
        }
        return self._means(denoising.processes.exchange(mine))

    def _losses(self, batch: Batch, numbers: Sequence[int], timesteps: Sequence[int]) -> torch.Tensor:
        """Losses (b, timesteps), on the device, which isn't waited for."""
        at = Coordinates(self._seed, 1, 0, tuple(numbers), "validation")
        columns = [
            self._denoising.losses(batch, at, torch.full((len(numbers),), timestep, dtype=torch.int64))
            for timestep in timesteps
        ]
        return torch.stack(columns, dim=1)

    def _means(self, shares: Iterable[_Losses]) -> ValidationResult:
        """Sums are exact, so that they don't depend on which process had what."""
        subsets: dict[str, list[float]] = defaultdict(list)
        bands: dict[str, list[float]] = defaultdict(list)
        found = {key: loss for share in shares for key, loss in share.items()}
        for number, timestep in sorted(found):
            record = self._plan.records[number]
            subsets[self._titles[record.dataset, record.subset]].append(found[number, timestep])
            bands[f"t{timestep}"].append(found[number, timestep])
        return ValidationResult(_mean(found.values()), _each_mean(subsets), _each_mean(bands))


def _each_mean(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: _mean(values) for key, values in groups.items()}


def _mean(values: Iterable[float]) -> float:
    """The mean, rounded once; NaN of nothing."""
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan
