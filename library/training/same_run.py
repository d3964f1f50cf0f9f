"""What makes a resumed run another one than was started, in words. Imports no torch.

The settings and how they are made are run_settings'; where a state holds them, state's. Hashes mean nothing to a user,
so of data and files it is said what the hash is of.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from library.errors import Problem
from library.training.run_settings import EMBEDDINGS, NO_EMBEDDINGS

_IN_WORDS = {
    "data": "names, sizes, repeats or captions of pictures, buckets, or settings of the dataset are not those that the "
    "run was started with",
    "pictures": "what is in the files of pictures or masks is not what the run was started with",
    "base model": "its files are not those that the run was started on",
    "base weights": "the files of --base_weights or their strengths are not those that the run was started with",
}
_ADVICE = {
    "seed": "resume with the seed that the run was started with, or leave --seed out",
    "data": "resume with the same pictures, captions and dataset settings",
    "pictures": "their files have changed; resume with those that the run was started with",
    "base model": "resume on the same base model",
}
_BATCH = "batch size over all processes"
_FILES = ("dim_from_weights", "base_embeddings")
"""Parts of a setting that are hashes of files, by the first word of their names."""
_MANY = ("parts", "text encoders")


def differences(started: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Problem]:
    """A problem for each setting of `now` that isn't as in `started`.

    The hash of the data covers the size of batches: where that differs, nothing can be said of the data.
    """
    started = {EMBEDDINGS: NO_EMBEDDINGS, **started}
    differing = [name for name, value in now.items() if started.get(name) != value]
    if _BATCH in differing and "data" in differing:
        differing.remove("data")
    for name in differing:
        wrong = _IN_WORDS.get(name) or _changed(started.get(name), now[name]) or "it was written by another version"
        yield Problem(f"--resume ({name})", wrong, _ADVICE.get(name, f"resume with the same {name}"))


def _changed(started: str | None, now: str) -> str:
    """What was and what is; of an object in JSON, only those of its parts that differ."""
    before, after = _parts(started), _parts(now)
    if before is None or after is None:
        return f"the run was started with {started or 'none'}, this one has {now or 'none'}"
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(_told(name, before.get(name), after.get(name)) for name in names)


def _told(name: str, before: Any, after: Any) -> str:
    """One part of a setting that differs."""
    is_file = name.partition(" ")[0] in _FILES
    if is_file and before and after:
        return f"the file of --{name} is another one"
    if is_file:
        return f"--{name} was {'given' if before else 'not given'}, now it is{'' if after else ' not'}"
    return f"{name} {'were' if name in _MANY else 'was'} {_written(before)}, now {_written(after)}"


def _parts(text: str | None) -> dict[str, Any] | None:
    """The object that `text` is in JSON, with arguments as parts of their own; None if it is none."""
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    return found | {f"--network_args {name}": value for name, value in found.pop("args", ())}


def _written(value: Any) -> str:
    """A value as a user would say it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "trained" if value else "frozen"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " and ".join(map(_written, value))
    return str(value)
