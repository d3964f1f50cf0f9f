"""Changing the text of a `.safetensors` file and nothing else: its tensors are copied byte for byte, in their order.

Hashes of the tensors (`sshs_model_hash`, `modelspec.hash_sha256`) therefore stay right, or wrong if they were.
`sshs_legacy_hash` is one of bytes that stand at a fixed place of the file, which training text moves, so it is made
anew. Works on any file: LoRAs, embeddings, base models. Imports no torch until a file is written.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO, Literal

from library.embedding_layouts import TOKEN_KEY
from library.errors import UserError
from library.models.headers import Header, read_header
from library.weights.metadata import MINIMUM, Settings
from library.weights.model_hash import LEGACY_LENGTH, LEGACY_START

Strip = Literal["private", "all"]
_CHUNK = 1 << 22
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""What is worked out from tensors, and can't be set."""
MEANING = ("format", "lora_adapter_metadata", TOKEN_KEY)
"""What says how the tensors are to be read: the alphas of peft's files, the word of an embedding."""
_LOADERS = (*MINIMUM, "ss_output_name", "ss_clip_skip", "ss_resolution", "ss_sd_model_name")
_HARMLESS = frozenset(
    (
        *(f"ss_{one.name}" for one in fields(Settings) if one.name != "training_comment"),
        *("ss_debiased_estimation", "ss_optimizer", "ss_num_epochs", "ss_epoch", "ss_steps", "ss_sd_model_hash"),
        *("ss_new_sd_model_hash", "ss_vae_hash", "ss_new_vae_hash", "ss_num_batches_per_epoch", "ss_color_aug"),
        *("ss_batch_size_per_device", "ss_total_batch_size", "ss_flip_aug", "ss_random_crop", "ss_shuffle_caption"),
        *("ss_enable_bucket", "ss_bucket_no_upscale", "ss_min_bucket_reso", "ss_max_bucket_reso", "ss_keep_tokens"),
        *("ss_num_vectors_per_token", "ss_embedding_lr"),
    )
)
"""Settings of a training that tell nothing of whoever trained, or of the pictures."""
_TIMES = ("modelspec.date",)
_PATH = re.compile(r"(?:[A-Za-z]:)?[\\/](?:[^\\/]+[\\/])+([^\\/]+)")


def edited(
    metadata: Mapping[str, str],
    *,
    strip: Strip | None = None,
    remove: Iterable[str] = (),
    settings: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Metadata after a change: first what is stripped goes, then what is removed by name, then values are set.

    Args:
        strip: `private` takes away who trained when on what: folders, tags, comments, the session, and `ss_` keys that
            no training writes; paths are cut to their last part. `all` leaves only what tensors can't be read
            without (`MEANING`).
        remove: keys, or beginnings of keys with a star behind them.
    """
    found = dict(metadata)
    if strip == "all":
        found = {key: text for key, text in found.items() if key in MEANING}
    elif strip == "private":
        found = {key: _without_folder(text) for key, text in found.items() if not _is_private(key)}
    for pattern in remove:
        for key in matching(found, pattern):
            del found[key]
    return found | dict(settings or {})


def matching(metadata: Collection[str], pattern: str) -> list[str]:
    """The keys that a name, or a beginning with a star behind it, means."""
    if pattern.endswith("*"):
        return [key for key in metadata if key.startswith(pattern[:-1])]
    return [pattern] if pattern in metadata else []


def _is_private(key: str) -> bool:
    return key in _TIMES or (key.startswith("ss_") and key not in (*_LOADERS, *MEANING) and key not in _HARMLESS)


def _without_folder(text: str) -> str:
    """A value that is a path, without its folders."""
    found = _PATH.fullmatch(text.strip())
    return found[1] if found else text


def write_edited(source: Path, metadata: Mapping[str, str], target: Path) -> None:
    """Write `source` with other metadata as `target`, which may be the same file: whole or not at all.

    A `sshs_legacy_hash` among the metadata is replaced by that of the new file.

    Raises:
        UserError: `source` is no sound `.safetensors` file, or there is no room for `target`.
    """
    from library.console import bar
    from library.weights.files import atomic_write

    header = read_header(source)
    start = _data_start(source)
    found = dict(metadata)
    if "sshs_legacy_hash" in found:
        found["sshs_legacy_hash"] = legacy_hash(source, header, found)
    raw = _header_bytes(header, start, found)
    size = source.stat().st_size - start

    def verify(written: Path) -> None:
        again = read_header(written, str(target))
        if again.metadata != found or again.entries.keys() != header.entries.keys():
            raise UserError.single(str(target), "was not written as it should be", "the old file stays")

    try:
        with (
            atomic_write(target.resolve(), verify) as file,
            source.open("rb") as old,
            bar(f"writing {target.name}, bytes", size) as progress,
        ):
            file.write(raw)
            old.seek(start)
            while chunk := old.read(_CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    except OSError as fault:
        raise UserError.single(str(target), f"can't be written ({fault.strerror})", "the old file stays") from fault


def legacy_hash(path: Path, header: Header, metadata: Mapping[str, str]) -> str:
    """`sshs_legacy_hash` of a file: SHA-256 of the 64 KiB that stand 1 MiB into it as they would with only the `ss_`
    part of `metadata` before its tensors; 8 hex digits."""
    start = _data_start(path)
    training = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    raw = _header_bytes(header, start, training)
    window = raw[LEGACY_START : LEGACY_START + LEGACY_LENGTH]
    with path.open("rb") as file:
        window += _bytes_at(file, start + max(LEGACY_START - len(raw), 0), LEGACY_LENGTH - len(window))
    return hashlib.sha256(window).hexdigest()[:8]


def content_hash(path: Path) -> str:
    """SHA-256 of everything behind the header of a `.safetensors` file, 64 hex digits: `sshs_model_hash`, which
    `modelspec.hash_sha256` is, too."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(_data_start(path))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _header_bytes(header: Header, start: int, metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, padded to 8 bytes as the safetensors library does."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in header.entries.items():
        offsets = [entry.start - start, entry.end - start]
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
