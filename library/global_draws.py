"""The global generators of python, numpy and torch, from which code that isn't ours draws. A leaf; needs torch."""

import random

import numpy as np
import torch

from library.rng import rng


def seed_global_generators(seed: int, *coordinates: int | str) -> None:
    """Seed them all by a place in a run, such as a micro-step."""
    value = int(rng(seed, "foreign", *coordinates).integers(2**32))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
