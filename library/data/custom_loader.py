"""Batches of a dataset of the user's own (`--dataset_class`), checked and put into the shape of data.loader's."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from library.data.custom import CustomPlan
from library.data.loader import Batch
from library.errors import UserError
from library.global_draws import seed_global_generators


class CustomLoader:
    """Makes the batches of any epoch for one of `world_size` processes.

    An item is a mapping as sd-scripts' datasets give it. It holds `captions`, a list of texts, and either `images`,
    float (b, 3, H, W) in [-1, 1], or `latents`, float (b, c, h, w), unscaled. It may hold `loss_weights` (b,),
    `alpha_masks` (b, H, W) in [0, 1], `original_sizes_hw`, `crop_top_lefts` and `target_sizes_hw` (b, 2) for SDXL,
    `network_multipliers` (one number for all) and `custom_attributes`, a list of mappings.

    Items are made one after the other in the thread that asks, with the global generators seeded by their place in the
    run, so that the same item comes in every process and after every resume. `set_current_epoch` is called if the
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
        for index in range(start, len(order)):
            seed_global_generators(self.seed, "item", epoch, index)
            place = f"{self.plan.name}[{int(order[index])}]"
            try:
                batch = self._make(epoch, index, self.plan.items[int(order[index])], place)
            except UserError:
                raise
            except Exception as error:
                raise UserError.single(place, f"{type(error).__name__}: {error}", "mend the class") from error
            yield batch

    def close(self) -> None:
        """Nothing is kept between epochs."""

    def _make(self, epoch: int, index: int, item: Any, place: str) -> Batch:
        if not isinstance(item, Mapping) or item.get("captions") is None or len(item["captions"]) == 0:
            raise UserError.single(place, "is no mapping with captions", "give `captions`, one text for each picture")
        captions = tuple(map(str, item["captions"]))
        latents, pixels = _tensor(item, "latents"), _tensor(item, "images")
        shown = latents if latents is not None else pixels
        if shown is None or shown.ndim != 4:
            raise UserError.single(place, "needs images (b, 3, H, W) or latents (b, c, h, w)")
        attributes: Sequence[Mapping[str, Any]] = item.get("custom_attributes") or [{}] * len(captions)
        self._check_lengths(item, shown, attributes, len(captions), place)
        factor = self.plan.vae_factor
        height, width = (side * (factor if latents is not None else 1) for side in shown.shape[2:])
        if height % factor or width % factor:
            raise UserError.single(place, f"its images are {width}x{height}", f"sides must be multiples of {factor}")
        mine = list(range(self.rank, len(captions), self.world_size))
        weights = _tensor(item, "loss_weights")
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
            multiplier=_multiplier(item, place),
            custom_attributes=tuple(attributes[i] for i in mine),
        )

    @staticmethod
    def _check_lengths(
        item: Mapping[str, Any], shown: torch.Tensor, attributes: Sequence[object], count: int, place: str
    ) -> None:
        """Everything that belongs to pictures comes once for each caption."""
        lengths = {"images or latents": len(shown), "custom_attributes": len(attributes)}
        for name in ("loss_weights", "alpha_masks", "original_sizes_hw", "crop_top_lefts", "target_sizes_hw"):
            tensor = _tensor(item, name)
            if tensor is not None:
                lengths[name] = len(tensor)
        wrong = [f"{length} {name}" for name, length in lengths.items() if length != count]
        if wrong:
            raise UserError.single(place, f"has {count} captions, but {', '.join(wrong)}", "give one for each caption")

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
    if value is None:
        return None
    return (value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))).detach().cpu().float()


def _multiplier(item: Mapping[str, Any], place: str) -> float:
    """The strength of the network; all samples of an item have the same."""
    given = _tensor(item, "network_multipliers")
    if given is None:
        return 1.0
    values = given.flatten().unique()
    if len(values) != 1:
        raise UserError.single(place, "its network_multipliers differ", "give all samples of an item the same")
    return float(values[0])


def _masks(item: Mapping[str, Any], size: tuple[int, int], mine: Sequence[int]) -> torch.Tensor | None:
    """Masks (b, 1, h, w) by area means."""
    masks = _tensor(item, "alpha_masks")
    if masks is None:
        return None
    return torch.nn.functional.interpolate(masks[list(mine)][:, None], size=size, mode="area")
