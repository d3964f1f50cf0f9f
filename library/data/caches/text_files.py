"""Files of text conditioning beside the pictures: their names, what they hold, and whether one still fits.

The layout is that of sd-scripts (`hidden_state1`, `hidden_state2`, `pool2`) with one entry more, `lorasmith`: JSON that
says from which caption, with which text encoders, and at which length the arrays were made. sd-scripts' own files say
nothing of the kind and are never used. Imports no torch; encoding captions is data.caches.text's.
"""

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from library.data.caches import latent_files, npz
from library.data.caches.latent_files import ENTRY, Verdict
from library.data.caches.npz import UNREADABLE, State
from library.data.caches.verified import Verified
from library.errors import UserError

FORMAT_VERSION = 2
ENDING = "_te_outputs.npz"
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Encoded:
    """One caption's conditioning as numpy holds it.

    `states` has an array (tokens, width) for each text encoder, `pooled` is (p,) or None; all float32 or float16.
    `dtype` is that of the model, which may be one that numpy lacks.
    """

    states: tuple[NDArray[Any], ...]
    pooled: NDArray[Any] | None
    dtype: str

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names in a file."""
        found = {f"hidden_state{number}": states for number, states in enumerate(self.states, 1)}
        if self.pooled is not None:
            found[f"pool{len(self.states)}"] = self.pooled
        return found


class TextFiles:
    """The files of the captions that are known ahead. Each picture has one; pictures may share a caption.

    Args:
        captions: pictures, each with its final caption.
        encoder_id: names the text encoders, their precision and how they are used.
        tokens: length of the conditioning: 77, 152 or 227.
        widths: of the text encoders' states.
    """

    def __init__(
        self, captions: Iterable[tuple[Path, str]], *, encoder_id: str, tokens: int, widths: Sequence[int]
    ) -> None:
        self.encoder_id, self.tokens, self.widths = encoder_id, tokens, tuple(widths)
        files: dict[str, list[Path]] = defaultdict(list)
        for path, caption in _claim(dict.fromkeys(captions)):
            files[caption].append(path)
        self.files = {caption: tuple(paths) for caption, paths in files.items()}
        self.verified = Verified(("ours",))
        self._states: dict[Path, State] = {}

    def __contains__(self, caption: str) -> bool:
        return caption in self.files

    def description(self, caption: str) -> dict[str, object]:
        """All that the arrays depend on."""
        return {
            "format": FORMAT_VERSION,
            "caption": hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest(),
            "encoder": self.encoder_id,
            "tokens": self.tokens,
            "widths": list(self.widths),
        }

    def judge(self, path: Path, caption: str, *, afresh: bool = False) -> Verdict:
        """Whether the file at `path` holds the conditioning of `caption`; `foreign` is another program's.

        What was found before and can't have changed isn't read again, unless `afresh`.
        """
        description = self.description(caption)
        state = npz.state_of(path)

        def judge() -> Verdict:
            try:
                return self._worth(*_open(path), description)
            except FileNotFoundError:
                return "absent"
            except UNREADABLE:
                return "damaged"

        verdict = judge() if afresh else self.verified.verdict([path], json.dumps(description), judge)
        if verdict == "ours" and state is not None:
            self._states[path] = state
        return cast(Verdict, verdict)

    def _worth(
        self, said: dict[str, object] | None, arrays: dict[str, NDArray[Any]], description: dict[str, object]
    ) -> Verdict:
        if said is None:
            return "foreign"
        said = said.copy()
        dtype = said.pop("dtype", None)
        hashed = said.pop("arrays", None)
        if said != description or dtype not in DTYPES:
            return "stale"
        if hashed != latent_files.hash_arrays(arrays):
            return "damaged"
        shapes = [getattr(arrays.get(f"hidden_state{n}"), "shape", None) for n in range(1, len(self.widths) + 1)]
        return "ours" if shapes == [(self.tokens, width) for width in self.widths] else "stale"

    def read(self, caption: str) -> Encoded:
        """The conditioning of a caption whose files fit.

        Raises:
            UserError: its file went away, was damaged or was replaced since it was checked.
        """
        path = self.files[caption][0]
        try:
            said, arrays = self._open_known(path, caption)
            states = tuple(arrays[f"hidden_state{n}"] for n in range(1, len(self.widths) + 1))
            return Encoded(states, arrays.get(f"pool{len(states)}"), str((said or {})["dtype"]))
        except UNREADABLE as error:
            wrong = f"cached text can't be read ({error})"
            raise UserError.single(str(path), wrong, "start again to rebuild it") from error

    def _open_known(self, path: Path, caption: str) -> tuple[dict[str, object] | None, dict[str, NDArray[Any]]]:
        """What is in a file that was judged; one that changed, or that another process made, is judged now."""
        if path in self._states:
            with contextlib.suppress(npz.ChangedError):
                return _open(path, self._states[path])
        state = npz.state_of(path)
        said, arrays = _open(path)
        if self._worth(said, arrays, self.description(caption)) != "ours":
            advice = "start again, or use --cache_text_encoder_outputs, which keeps them in memory"
            raise UserError.single(str(path), "another run has replaced it", advice)
        if state is not None:
            self._states[path] = state
        return said, arrays

    def write(self, path: Path, caption: str, encoded: Encoded) -> None:
        """Write one file whole, in place of whatever stood there.

        Raises:
            UserError: the file can't be written.
        """
        arrays = encoded.arrays()
        said = {**self.description(caption), "dtype": encoded.dtype, "arrays": latent_files.hash_arrays(arrays)}
        self._states[path] = latent_files.save(path, arrays, said, memory_flag="--cache_text_encoder_outputs")


def _open(path: Path, state: State | None = None) -> tuple[dict[str, object] | None, dict[str, NDArray[Any]]]:
    """What a file says of itself (None if it has no entry of ours), and its arrays; with a `state`, only of that."""
    arrays = npz.read(path, state=state)
    entry = arrays.pop(ENTRY, None)
    said = None if entry is None else json.loads(str(entry))
    if not isinstance(said, dict | None):
        raise ValueError(f"{ENTRY} holds no table")
    return said, arrays


def _claim(captions: Iterable[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    """A file for each picture and caption, none twice: the usual name for the first picture of a stem."""
    claimed: set[Path] = set()
    for picture, caption in captions:
        number = 1
        path = picture.with_name(f"{picture.stem}{ENDING}")
        while path.absolute() in claimed:
            path = picture.with_name(f"{picture.name}{f'_{number}' if number > 1 else ''}{ENDING}")
            number += 1
        claimed.add(path.absolute())
        yield path, caption
