"""What text encoders give a U-Net: a plain record that the rooms of data, models and training share.

How captions become states is models' business, how they are kept is data's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.to_device import to_device


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of b captions.

    Attributes:
        states: (b, n, d), the encoders' hidden states side by side along d; n is 77, 152 or 227.
        pooled: (b, p), of families that take a pooled output too (SDXL), else None.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> "Conditioning":
        return Conditioning(self.states[rows], None if self.pooled is None else self.pooled[rows])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        """The same on a device, in a dtype. A GPU isn't waited for."""
        place = torch.device(device)
        pooled = None if self.pooled is None else to_device(self.pooled, place).to(place, dtype)
        return Conditioning(to_device(self.states, place).to(place, dtype), pooled)


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """The captions of all parts in one batch, in order. All have the same n, d and p."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)
