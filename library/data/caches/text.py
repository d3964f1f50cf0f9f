"""Text conditioning by final caption: a memo of bounded size, filled ahead where asked, and kept in files where asked.

A caption is always encoded alone, so that its conditioning doesn't depend on the batch it stands in. How that is done
is the caller's; nothing here knows a model. Which captions are known ahead: data.caption_plan.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from library import console
from library.conditioning import Conditioning, join
from library.data.caches import latent_files
from library.data.caches.latent_files import Verdict
from library.data.caches.text_files import Encoded, TextFiles
from library.data.caches.verified import in_order
from library.errors import UserError

Encode = Callable[[Sequence[str]], Conditioning]
"""Captions -> their conditioning, in order."""


class TextStore:
    """Conditioning of captions that no trained encoder makes.

    What was encoded ahead (`fill`) stays, in main memory or in files; of the rest, the last used are kept, up to
    `memo_bytes`, and always the very last one. Not safe for several threads.

    Args:
        encode: called with one caption at a time, without gradients.
        memo_bytes: size of the memo.
        device: where conditioning is handed out.
        files: of the captions that are kept on disk.

    Attributes:
        encodings: how many captions were encoded.
    """

    def __init__(
        self,
        encode: Encode,
        *,
        memo_bytes: int,
        device: torch.device | str = "cpu",
        files: TextFiles | None = None,
    ) -> None:
        self._encode, self.memo_bytes, self.device, self.files = encode, memo_bytes, device, files
        self.encodings = 0
        self.used_bytes = 0
        self._memo: OrderedDict[str, Conditioning] = OrderedDict()
        self._pinned: dict[str, Conditioning] = {}
        self._on_disk: set[str] = set()

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of captions, in order, on `device`.

        Raises:
            UserError: a text encoder gave NaN, or a file can't be read any more.
        """
        found = {caption: self._get(caption).to(self.device) for caption in dict.fromkeys(captions)}
        return join([found[caption] for caption in captions])

    def fill(
        self,
        captions: Iterable[str],
        *,
        threads: int = 4,
        rank: int = 0,
        world_size: int = 1,
        wait: Callable[[], None] | None = None,
    ) -> None:
        """Encode captions ahead, those without a file that fits; afterwards no encoder is needed for them.

        Args:
            threads: threads that check files.
            rank, world_size: each process makes its share of the files; what has none, every process makes.
            wait: called at the end, whatever was found; returns when every process has come so far.

        Raises:
            UserError: a text encoder gave NaN, or a file can't be written.
        """
        wanted = [caption for caption in dict.fromkeys(captions) if caption not in self._pinned]
        filed = [caption for caption in wanted if self.files is not None and caption in self.files]
        missing = self._missing(self.files, filed[rank::world_size], threads) if self.files is not None else {}
        elsewhere = set(filed) - missing.keys()
        todo = [caption for caption in wanted if caption not in elsewhere]
        try:
            for caption in console.track(todo, "caching text", len(todo)) if todo else ():
                self._keep(caption, missing.get(caption, ()))
        except UserError:
            if wait is not None:
                wait()
            raise
        if wait is not None:
            wait()
        self._on_disk.update(filed)

    def _keep(self, caption: str, paths: Sequence[Path]) -> None:
        """Encode a caption into its files, or into memory if it has none."""
        made = self._make(caption)
        if self.files is None or not paths:
            self._pinned[caption] = made.to("cpu")
            return
        encoded = _to_arrays(made, self.files.widths)
        for path in paths:
            self.files.write(path, caption, encoded)

    def _get(self, caption: str) -> Conditioning:
        if caption in self._pinned:
            return self._pinned[caption]
        if caption in self._memo:
            self._memo.move_to_end(caption)
            return self._memo[caption]
        if self.files is not None and caption in self._on_disk:
            made = _from_arrays(self.files.read(caption))
        else:
            made = self._make(caption)
        self._memo[caption] = made
        self.used_bytes += made.nbytes
        while self.used_bytes > self.memo_bytes and len(self._memo) > 1:
            self.used_bytes -= self._memo.popitem(last=False)[1].nbytes
        return made

    def _make(self, caption: str) -> Conditioning:
        with torch.no_grad():
            made = self._encode([caption])
        self.encodings += 1
        if not all(tensor.isfinite().all() for tensor in (made.states, made.pooled) if tensor is not None):
            wrong = "the text encoder gave NaN or infinite numbers"
            raise UserError.single(f"caption {caption[:80]!r}", wrong, "use --mixed_precision bf16 or no")
        return made

    @staticmethod
    def _missing(files: TextFiles, captions: Sequence[str], threads: int) -> dict[str, list[Path]]:
        """The files to make, by caption; says what was found."""
        latent_files.sweep({path.parent for paths in files.files.values() for path in paths})
        pairs = [(path, caption) for caption in captions for path in files.files[caption]]
        found: list[Verdict] = []
        missing: dict[str, list[Path]] = {}
        judged = in_order(lambda pair: files.judge(*pair), pairs, threads)
        tracked = console.track(judged, "checking cached text", len(pairs)) if pairs else ()
        for (path, caption), verdict in zip(pairs, tracked, strict=True):
            found.append(verdict)
            if verdict == "damaged":
                console.warn(f"{path}: damaged; it is made anew")
            if verdict != "ours":
                missing.setdefault(caption, []).append(path)
        files.verified.save()
        if stale := found.count("stale"):
            console.say(f"cached texts that no longer fit caption, text encoder or length: {stale}, made anew")
        if foreign := found.count("foreign"):
            console.say(f"cached texts of another program, which don't tell their caption: {foreign}, made anew")
        return missing


def _to_arrays(made: Conditioning, widths: Sequence[int]) -> Encoded:
    """One caption's conditioning as numpy arrays, one for each text encoder; bfloat16 becomes float32."""
    half = made.states.dtype == torch.float16
    plain = made.to("cpu", torch.float16 if half else torch.float32)
    states = tuple(one.contiguous().numpy() for one in plain.states[0].split(list(widths), dim=-1))
    pooled = None if plain.pooled is None else plain.pooled[0].contiguous().numpy()
    return Encoded(states, pooled, str(made.states.dtype).removeprefix("torch."))


def _from_arrays(encoded: Encoded) -> Conditioning:
    """The way back, bit for bit."""
    states = torch.from_numpy(np.concatenate(encoded.states, axis=-1))[None]
    pooled = None if encoded.pooled is None else torch.from_numpy(encoded.pooled)[None]
    return Conditioning(states, pooled).to("cpu", getattr(torch, encoded.dtype))
