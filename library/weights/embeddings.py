"""Embeddings in files: read in every layout that is in use, written in four, and read back before they are kept.

How files and their tensors are called stands in library.embedding_layouts; headers alone, without torch, are read by
models.embedding_files. What metadata tell is embedding_metadata's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.console import warn
from library.embedding_layouts import Contents, Layout, find, layout_files, tensor_names
from library.errors import UserError
from library.weights.check import BadWeightsError
from library.weights.files import atomic_write, save_pickle, save_safetensors

__all__ = [
    "Embedding",
    "Layout",
    "bundle_tensors",
    "check_embedding_file",
    "layout_files",
    "read_embedding",
    "read_embeddings",
    "write_embedding",
]
_PLACEHOLDER_ID = 265
_DEPTH = 4


@dataclass(frozen=True)
class Embedding:
    """The vectors of one token.

    Attributes:
        vectors: for each text encoder (vectors, width), float32.
        token: as the file tells it.
        metadata: the file's texts.
    """

    vectors: tuple[Tensor, ...]
    token: str | None
    metadata: Mapping[str, str] = field(repr=False)
    layout: Layout


def read_embedding(path: Path, where: str, token: str | None = None) -> Embedding:
    """The vectors of an embedding file of any layout, on the CPU; nothing in a pickle runs.

    Args:
        where: what an error names as the place.
        token: chooses among the embeddings of a file; a file's only one may be called otherwise there.

    Raises:
        UserError: the file is missing, damaged, no embedding, has several of which `token` is none, or holds numbers
            that are not finite.
    """
    tensors, metadata, contents = _read(path, where)
    return _embedding(tensors, metadata, Contents((contents.choose(token, where),)), where)[0]


def read_embeddings(path: Path, where: str) -> tuple[Embedding, ...]:
    """All embeddings of a file, as `read_embedding` reads one."""
    tensors, metadata, contents = _read(path, where)
    return _embedding(tensors, metadata, contents, where)


def write_embedding(
    path: Path,
    vectors: Sequence[Tensor],
    layout: Layout,
    token: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    *,
    called: Path | None = None,
) -> list[str]:
    """Write the vectors of one token, whole or not at all, and return the warnings of `check_embedding_file`.

    Args:
        path: `.safetensors` gets `metadata`; other endings are written as torch does and have none. The layout
            `webui` is a table around the tensor of a single text encoder, which needs another ending; with two it is
            the same as `kohya`, which is what A1111 reads there.
        vectors: for each text encoder whose vectors the file holds (vectors, width).
        dtype: of the numbers in the file; None for the vectors' own.
        called: how messages name the file, where `path` is a temporary name.

    Raises:
        BadWeightsError: the file that was written isn't right, such as numbers that overflow `dtype`; an older file
            stays.
    """
    names = tensor_names(layout, token, len(vectors))
    plain = [one.detach().to("cpu", dtype or one.dtype, copy=True).contiguous() for one in vectors]
    if any(
        bool((one.isfinite() & ~new.isfinite().to(one.device)).any()) for one, new in zip(vectors, plain, strict=True)
    ):
        wrong = f"{called or path}: the vectors of {token} are not finite in {dtype}: too large for it"
        raise BadWeightsError(f"{wrong}; leave out --save_precision")
    tensors = dict(zip(names, plain, strict=True))
    shapes = tuple((int(one.shape[0]), int(one.shape[1])) for one in plain)
    warnings: list[str] = []

    def verify(written: Path) -> None:
        warnings.extend(check_embedding_file(written, shapes, called=called or path))

    if path.suffix == ".safetensors":
        save_safetensors(tensors, path, metadata, verify)
    elif layout == "webui" and len(plain) == 1:
        with atomic_write(path, verify) as file:
            torch.save(_webui_table(plain[0], token, metadata.get("ss_steps")), file)
    else:
        save_pickle(tensors, path, verify)
    return warnings


def bundle_tensors(tokens: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The tensors that stand in a LoRA's file so that A1111, ComfyUI and OneTrainer know its tokens.

    Args:
        tokens: the vectors (vectors, width) of each for each text encoder.

    Raises:
        ValueError: two tokens differ only in what a bundle can't hold, a dot.
    """
    found: dict[str, Tensor] = {}
    for token, vectors in tokens.items():
        for name, tensor in zip(tensor_names("bundle", token, len(vectors)), vectors, strict=True):
            if name in found:
                raise ValueError(f"a bundle can't tell {token} from another of its tokens")
            found[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return found


def check_embedding_file(
    path: Path, shapes: Sequence[tuple[int, int]], token: str | None = None, *, called: Path | None = None
) -> list[str]:
    """Read a written file back and return warnings: one if vectors are all zero.

    Args:
        shapes: for each text encoder (vectors, width).
        token: whose embedding, in a file of several.
        called: how messages name the file, where it has a temporary name.

    Raises:
        BadWeightsError: it can't be read, its shapes are others, or a number is not finite.
    """
    place = str(called or path)
    try:
        found = read_embedding(path, place, token)
    except UserError as error:
        raise BadWeightsError(str(error)) from error
    sizes = [tuple(one.shape) for one in found.vectors]
    if sizes != [tuple(shape) for shape in shapes]:
        raise BadWeightsError(f"{place}: the vectors have the shapes {sizes}, not {[tuple(one) for one in shapes]}")
    zeros = sum(int((one == 0).all(dim=1).sum()) for one in found.vectors)
    return [f"{place}: {zeros} of its vectors are all zero"] if zeros else []


def _webui_table(vectors: Tensor, token: str, steps: str | None) -> dict[str, Any]:
    """A1111's own file: its reader takes the tensor; the other fields it shows."""
    return {
        "string_to_token": {"*": _PLACEHOLDER_ID},
        "string_to_param": {"*": vectors},
        "name": token,
        "step": int(steps) if steps is not None else None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


def _embedding(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], contents: Contents, where: str
) -> tuple[Embedding, ...]:
    found = []
    for one in contents.embeddings:
        parts = [[tensors[name].detach().to(torch.float32) for name in names] for names in one.places]
        vectors = tuple(torch.cat([part.reshape(-1, part.shape[-1]) for part in some]) for some in parts)
        if not all(bool(torch.isfinite(some).all()) for some in vectors):
            wrong = f"its vectors{f' of {one.token}' if one.token else ''} hold numbers that are not finite"
            raise UserError.single(where, wrong, "the file is damaged, or its training diverged; use another one")
        found.append(Embedding(vectors, one.token, metadata, one.layout))
    return tuple(found)


def _read(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str], Contents]:
    """The tensors that a file's embeddings need, its texts, and what is what."""
    if not path.is_file():
        raise UserError.single(where, "there is no such embedding file")
    try:
        tensors, metadata, contents = _safetensors(path, where) if _is_safetensors(path) else _pickle(path, where)
    except UnpicklingError as error:
        wrong = "the pickle is damaged, or reading it could run code; it is not read"
        raise UserError.single(where, wrong, "use a .safetensors file") from error
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise UserError.single(where, f"can't be read as weights ({reason})", "it may be damaged") from error
    ignored = [name for name in contents.unused if name.endswith("_out")]
    if ignored:
        warn(f"{where}: {', '.join(ignored)} is ignored: vectors behind the text encoder, which no prompt takes")
    return tensors, metadata, contents


_UNREADABLE = (SafetensorError, RuntimeError, EOFError, ValueError, OSError, TypeError, AttributeError, LookupError)


def _is_safetensors(path: Path) -> bool:
    """By the ending, or where it tells of a pickle, by the first byte of the header's text."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _safetensors(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str], Contents]:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
        shapes = {}
        for name in tuple(file.keys()):
            part = file.get_slice(name)
            if part.get_dtype().startswith(("F", "BF")):
                shapes[name] = tuple(part.get_shape())
        contents = find(shapes, metadata, where)
        return {name: file.get_tensor(name) for name in _needed(contents)}, metadata, contents


def _pickle(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str], Contents]:
    """`ParameterDict` is let in beside what torch takes for harmless: old embeddings have one."""
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        root = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        root = root["state_dict"]
    if not isinstance(root, dict | Tensor):
        raise UserError.single(where, "is a pickle that holds no named tensors")
    tensors = {"": root} if isinstance(root, Tensor) else dict(_flat("", root, _DEPTH))
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    texts = root.items() if isinstance(root, dict) else ()
    metadata = {name: text for name, text in texts if isinstance(name, str) and isinstance(text, str)}
    return tensors, metadata, find({name: tuple(one.shape) for name, one in tensors.items()}, metadata, where)


def _flat(prefix: str, values: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        inner = value._parameters if isinstance(value, torch.nn.ParameterDict) else value
        if isinstance(inner, Tensor):
            yield f"{prefix}{name}", inner
        elif isinstance(inner, Mapping) and depth:
            yield from _flat(f"{prefix}{name}.", inner, depth - 1)


def _needed(contents: Contents) -> Iterator[str]:
    return (name for one in contents.embeddings for names in one.places for name in names)
