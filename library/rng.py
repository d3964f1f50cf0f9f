"""Every random draw of a run as a pure function of its coordinates: no stream has a position that could be lost.

A generator is keyed by a 128-bit hash of (seed, stream, coordinates). Nothing needs to be stored for a resume, and the
draw is the same whatever the number of loader workers or processes. Code that isn't ours and draws from the global
generators is not served here (training.loop seeds those).
"""

import hashlib
from typing import Literal, get_args

import numpy as np

Stream = Literal[
    "order",
    "caption",
    "augment",
    "split",
    "init",
    "posterior",
    "timestep",
    "noise",
    "dropout",
    "preview",
    "validation",
    "rounding",
    "foreign",
]
_STREAMS = frozenset(get_args(Stream))


def rng(seed: int, stream: Stream, *coordinates: int | str) -> np.random.Generator:
    """A Philox generator for one place in a run, e.g. `rng(seed, "noise", epoch, batch, position)`.

    Every coordinate is hashed with its type and length, so ("a", "bc") and ("ab", "c"), or 1 and "1", differ.
    """
    if stream not in _STREAMS:
        raise ValueError(f"unknown random stream {stream!r}")
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, stream, *coordinates):
        text = part if isinstance(part, str) else str(int(part))
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(data)}:".encode())
        digest.update(data)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))
