"""Batches of a dataset of the user's own (`--dataset_class`), checked and put into the shape of data.loader's."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from library.data.ahead import ahead
from library.data.custom import CustomPlan
from library.data.loader import Batch
from library.errors import UserError


class CustomLoader:
    """Makes the batches of any epoch for one of `world_size` processes.

    An item is a mapping as sd-scripts' datasets give it. It holds `captions`, a list of texts, and either `images`,
    float (b, 3, H, W) in [-1, 1], or `latents`, float (b, c, h, w), unscaled. It may hold `loss_weights` (b,),
    `alpha_masks` (b, H, W) in [0, 1], `original_sizes_hw`, `crop_top_lefts` and `target_sizes_hw` (b, 2) for SDXL,
    `network_multipliers` (one number for all) and `custom_attributes`, a list of mappings.

    Items are made by one thread ahead, since nothing is known about the class. `set_current_epoch` is called if the
    dataset has it.
    """

    def __init__(self, plan: CustomPlan, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.plan, self.seed, self.rank, self.world_size = plan, seed, rank, world_size

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch (counted from 1) from item number `start` on; close it to end early.

        Raises:
            UserError: an item lacks something, or its parts don't fit each other.
        """
        order = self.plan.order(self.seed, epoch)
        if hasattr(self.plan.items, "set_current_epoch"):
            self.plan.items.set_current_epoch(epoch)

        def make(index: int) -> Batch:
            return self._make(epoch, index, int(order[index]))

        return ahead(make, range(start, len(order)), threads=1, depth=2)

    def close(self) -> None:
        """Nothing is kept between epochs."""

    def _make(self, epoch: int, index: int, number: int) -> Batch:
        item = self.plan.items[number]
        place = f"{self.plan.name}[{number}]"
        if not isinstance(item, Mapping) or not item.get("captions"):
            raise UserError.single(place, "is no mapping with captions", "give `captions`, one text for each picture")
        captions = tuple(map(str, item["captions"]))
        latents, pixels = _tensor(item, "latents"), _tensor(item, "images")
        shown = latents if latents is not None else pixels
        if shown is None or shown.ndim != 4 or len(shown) != len(captions):
            wrong = f"needs images (b, 3, H, W) or latents (b, c, h, w) for its {len(captions)} captions"
            raise UserError.single(place, wrong)
        factor = self.plan.vae_factor
        height, width = (side * (factor if latents is not None else 1) for side in shown.shape[2:])
        mine = list(range(self.rank, len(captions), self.world_size))
        attributes: Sequence[Mapping[str, Any]] = item.get("custom_attributes") or [{}] * len(captions)
        weights = _tensor(item, "loss_weights")
        multiplier = _tensor(item, "network_multipliers")
        return Batch(
            epoch=epoch,
            index=index,
            bucket=(width, height),
            positions=tuple(mine),
            global_size=len(captions),
            names=tuple(f"{place} picture {i}" for i in mine),
            captions=tuple(captions[i] for i in mine),
            loss_weights=torch.ones(len(mine)) if weights is None else weights[mine],
            sizes=self._sizes(item, len(captions), (height, width))[mine],
            latents=None if latents is None else latents[mine],
            pixels=None if latents is not None or pixels is None else pixels[mine],
            masks=_masks(item, (height // factor, width // factor), mine),
            multiplier=1.0 if multiplier is None else float(multiplier.flatten()[0]),
            custom_attributes=tuple(attributes[i] for i in mine),
        )

    @staticmethod
    def _sizes(item: Mapping[str, Any], count: int, size: tuple[int, int]) -> torch.Tensor:
        """(b, 6) as of data.sizes; what isn't given is that of pictures that were neither resized nor cut."""
        plain = {"original_sizes_hw": size, "crop_top_lefts": (0, 0), "target_sizes_hw": size}
        columns = []
        for name, pair in plain.items():
            given = _tensor(item, name)
            columns.append(torch.tensor([pair] * count, dtype=torch.float32) if given is None else given)
        return torch.cat(columns, dim=1)


def _tensor(item: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """An entry as float32; None where it is missing or None."""
    value = item.get(name)
    return None if value is None else torch.as_tensor(np.asarray(value), dtype=torch.float32)


def _masks(item: Mapping[str, Any], size: tuple[int, int], mine: Sequence[int]) -> torch.Tensor | None:
    """Masks (b, 1, h, w) by area means."""
    masks = _tensor(item, "alpha_masks")
    if masks is None:
        return None
    return torch.nn.functional.interpolate(masks[list(mine)][:, None], size=size, mode="area")
