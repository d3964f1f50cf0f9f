"""Batches of a dataset class of one's own: what is taken, what is refused, and that draws belong to their place."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.data.custom import CustomPlan, load_custom
from library.data.custom_loader import CustomLoader
from library.data.loader import Batch
from library.data.plan import Dataset
from library.errors import UserError
from library.options.specs import DatasetSpec

GOOD = {"images": np.zeros((2, 3, 16, 16), np.float32), "captions": ["a", "b"]}


def plan_of(*items: Any) -> CustomPlan:
    return CustomPlan((Dataset(DatasetSpec(2, (16, 16), ()), (), (), 0),), 8, 1, items=items, name="mine.Own")


def batch_of(item: Any) -> Batch:
    return next(CustomLoader(plan_of(item), seed=1).epoch(1))


def test_everything_that_an_item_may_hold() -> None:
    more = {
        "loss_weights": torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
        "alpha_masks": np.ones((2, 16, 16)),
        "original_sizes_hw": [(32, 40), (16, 16)],
        "network_multipliers": [0.5, 0.5],
        "custom_attributes": [{}, {"diff_output_preservation": True}],
        "captions": np.array(["a", "b"]),
    }
    batch = batch_of(GOOD | more)
    assert batch.loss_weights.tolist() == [1.0, 0.5]
    assert batch.masks is not None and batch.masks.shape == (2, 1, 2, 2)
    assert batch.sizes.tolist() == [[32, 40, 0, 0, 16, 16], [16, 16, 0, 0, 16, 16]]
    assert (batch.multiplier, batch.captions, batch.bucket) == (0.5, ("a", "b"), (16, 16))
    assert batch.custom_attributes[1] == {"diff_output_preservation": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": None}, "is no mapping with captions"),
        ({"images": None}, "needs images"),
        ({"images": np.zeros((2, 3, 12, 16))}, "sides must be multiples of 8"),
        ({"captions": ["a"]}, "has 1 captions, but 2 images or latents"),
        ({"loss_weights": [1.0]}, "but 1 loss_weights"),
        ({"custom_attributes": [{}]}, "but 1 custom_attributes"),
        ({"network_multipliers": [1.0, 0.5]}, "its network_multipliers differ"),
    ],
)
def test_an_item_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        batch_of(GOOD | change)


def test_an_item_that_fails_is_named() -> None:
    class Broken:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            raise KeyError("boom")

    plan = CustomPlan((Dataset(DatasetSpec(2, (16, 16), ()), (), (), 0),), 8, 1, items=Broken(), name="mine.Broken")
    with pytest.raises(UserError, match=r"mine.Broken\[0\]: KeyError: 'boom'; mend the class"):
        next(CustomLoader(plan, seed=1).epoch(1))


class Drawn:
    """Items that draw from every global generator."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        drawn = (random.random(), float(np.random.random()), float(torch.rand(())))
        return GOOD | {"captions": [f"{drawn}", f"{index}"]}


def test_draws_belong_to_their_place() -> None:
    plan = CustomPlan((Dataset(DatasetSpec(2, (16, 16), ()), (), (), 0),), 8, 1, items=Drawn(), name="mine.Drawn")
    whole = [batch.captions for batch in CustomLoader(plan, seed=1).epoch(2)]
    random.seed(99)
    torch.manual_seed(99)
    assert [batch.captions for batch in CustomLoader(plan, seed=1).epoch(2, 1)] == whole[1:]
    assert len({captions[0] for captions in whole}) == 3


def test_how_it_was_made_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_too.py").write_text(
        "class Own:\n def __init__(self, *given):\n  pass\n def __len__(self):\n  return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    how: dict[str, Any] = {"batch_size": 1, "vae_factor": 8, "processes": 1}
    prints = {
        load_custom("mine_too.Own", "--x", resolution=size, max_token_length=tokens, **how).fingerprint()
        for size in ((64, 64), (128, 128))
        for tokens in (None, 150)
    }
    assert len(prints) == 4
