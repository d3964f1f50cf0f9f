"""`--dataset_class`: a dataset of the user's own in the place of pictures and plan. Imports no torch by itself.

The class is made as sd-scripts makes it, `Class(tokenizer, max_token_length, resolution, debug_dataset)`. It has a
length, and each of its items is a batch (data.custom_loader says what stands in one). The order of an epoch's batches
is ours.
"""

import hashlib
import importlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.data.plan import Dataset, Plan
from library.errors import UserError
from library.options.specs import DatasetSpec
from library.rng import rng
from library.tokenizer import clip_tokenizer


@dataclass(frozen=True)
class CustomPlan(Plan):
    """The plan of a dataset whose batches come ready: `items[i]` is one, for all processes together. It has no records.

    `name` is the dotted name of its class.
    """

    items: Any = None
    name: str = ""
    max_token_length: int | None = None

    @cached_property
    def batches_per_epoch(self) -> int:
        """Items of the dataset."""
        return len(self.items)

    @cached_property
    def samples_per_epoch(self) -> int:
        """As many as full batches hold; what items really hold is known only when they are made."""
        return len(self.items) * self.global_batch_size(0)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The indexes of an epoch's items (epochs count from 1) in the order in which they are trained."""
        return rng(seed, "order", epoch, "batches").permutation(len(self.items))

    def fingerprint(self) -> str:
        """A hash of the class, how it was made, and its length; its items aren't looked at."""
        spec = self.datasets[0].spec
        told = f"{self.name}:{len(self.items)}:{spec.resolution}:{spec.batch_size}:{self.max_token_length}"
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def load_custom(
    name: str,
    where: str,
    *,
    resolution: tuple[int, int] | None,
    max_token_length: int | None,
    batch_size: int,
    vae_factor: int,
    processes: int,
) -> CustomPlan:
    """Import the class `name` and make its dataset. Modules are looked for in the working folder, too.

    The class gets a `tokenizers.Tokenizer` for CLIP's vocabulary.

    Raises:
        UserError: there is no such class, making it failed, or it has no length or no items.
    """
    module, _, title = name.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        made = getattr(importlib.import_module(module), title)(clip_tokenizer(), max_token_length, resolution, False)
        length = len(made)
    except Exception as error:
        wrong = f"{name} can't be made: {type(error).__name__}: {error}"
        advice = "it is called as Class(tokenizer, max_token_length, resolution, debug_dataset) and needs a length"
        raise UserError.single(where, wrong, advice) from error
    if length < 1:
        raise UserError.single(where, f"{name} has no items", "each item is a batch")
    spec = DatasetSpec(batch_size, resolution or (vae_factor, vae_factor), (), where=where)
    return CustomPlan(
        (Dataset(spec, (), (), 0),), vae_factor, processes, items=made, name=name, max_token_length=max_token_length
    )
