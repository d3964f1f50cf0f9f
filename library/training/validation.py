"""The loss on held-out pictures: always the same captions, crops, noise and timesteps, so that passes can be compared.

What is done about it (stopping early, keeping the best) is not decided here.
"""

import numpy as np
import torch

from library.console import track
from library.training.denoising import Denoising
from library.training.loop import Batches
from library.training.objective import Coordinates, NoiseSettings
from library.training.steps import VALIDATION_TIMESTEPS


def fixed_timesteps(noise: NoiseSettings) -> list[int]:
    """Four timesteps evenly inside the range that is trained: 200, 400, 600, 800 of the whole one."""
    spread = np.linspace(noise.min_timestep, noise.max_timestep, VALIDATION_TIMESTEPS + 2)
    return [int(t) for t in spread[1:-1]]


class Validation:
    """Looks at every held-out picture, at four timesteps each.

    Args:
        loader: of the held-out pictures; batches: how many it makes.
        seed: of the noise, whatever that of the training is.
        max_batches: batches of a pass at most; None for all.
    """

    def __init__(
        self, denoising: Denoising, loader: Batches, batches: int, *, seed: int, max_batches: int | None = None
    ) -> None:
        self._denoising, self._loader, self._seed = denoising, loader, seed
        self._wanted = min(batches, max_batches or batches)

    def run(self) -> float:
        """The mean loss over samples and timesteps, of all processes together. Nothing is changed by it."""
        sums: list[torch.Tensor] = []
        count = 0
        denoising = self._denoising
        denoising.trainable.train(False)
        try:
            with torch.no_grad():
                epoch = self._loader.epoch(1)
                for batch in track(epoch, "validation", self._wanted):
                    if batch.positions:
                        at = Coordinates(self._seed, 1, batch.index, batch.positions, "validation")
                        for timestep in fixed_timesteps(denoising.noise):
                            chosen = torch.full((len(batch.positions),), timestep)
                            sums.append(denoising.losses(batch, at, chosen).sum())
                            count += len(batch.positions)
                    if batch.index + 1 >= self._wanted:
                        break
                epoch.close()
        finally:
            denoising.trainable.train(True)
        mine = float(torch.stack(sums).cpu().double().sum()) if sums else 0.0
        total, number = denoising.processes.sum_numbers([mine, float(count)])
        return total / max(1.0, number)
