"""The headers of embedding files, and whether their vectors fit a base model; torch-free.

Values aren't read here but in weights.embeddings; which names mean what stands in library.embedding_layouts.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from library.embedding_layouts import Contents, Layout, find
from library.errors import Problem, UserError
from library.models.families import FAMILIES, Family
from library.models.info import ModelInfo
from library.models.pickles import read_weights

_FRACTIONS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_TRUE_WIDTHS = {(768,): "SD1", (1024,): "SD2", (768, 1280): "SDXL", (1280,): "SDXL's second text encoder alone"}
_HALVES = {768: "clip_l", 1280: "clip_g"}
_OTHER_HALF = {"clip_l": "clip_g", "clip_g": "clip_l"}


@dataclass(frozen=True)
class EmbeddingHeader:
    """What a file says of an embedding.

    Attributes:
        shapes: for each text encoder (vectors, width).
        token: as the file tells it.
        tokens: of all embeddings that the file holds, as far as it tells them.
        metadata: the file's texts.
        path: the file.
    """

    layout: Layout
    shapes: tuple[tuple[int, int], ...]
    token: str | None
    tokens: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    path: Path = Path()

    @property
    def vectors(self) -> int:
        """How many vectors the embedding has for each text encoder."""
        return self.shapes[0][0]

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the vectors for each text encoder."""
        return tuple(width for _, width in self.shapes)


def read_embedding_header(path: Path, where: str, token: str | None = None) -> EmbeddingHeader:
    """Read the header of an embedding file of any layout; nothing in a pickle runs.

    Args:
        where: what an error names as the place.
        token: chooses among the embeddings of a file; a file's only one may be called otherwise there.

    Raises:
        UserError: the file is missing, damaged, no embedding, or has several of which `token` is none.
    """
    contents, metadata = _contents(path, where)
    found = contents.choose(token, where)
    return EmbeddingHeader(found.layout, found.shapes, found.token, _told(contents), metadata, path)


def tokens_of(path: Path, where: str) -> tuple[str, ...]:
    """The tokens of all embeddings in a file, as far as it tells them.

    Raises:
        UserError: the file is missing, damaged, or no embedding.
    """
    return _told(_contents(path, where)[0])


def _contents(path: Path, where: str) -> tuple[Contents, Mapping[str, str]]:
    if not path.is_file():
        raise UserError.single(where, "there is no such embedding file")
    header = read_weights(path, where, loose=True)
    shapes = {name: entry.shape for name, entry in header.entries.items() if entry.dtype in _FRACTIONS}
    return find(shapes, header.metadata, where), header.metadata


def _told(contents: Contents) -> tuple[str, ...]:
    return tuple(one.token for one in contents.embeddings if one.token is not None)


def check_fits(header: EmbeddingHeader, where: str, model: ModelInfo) -> Iterator[Problem]:
    """A problem if the vectors have other widths than the model's text encoders, or are those of one of several."""
    half = half_of(header.path, header.metadata, header.widths)
    if half is not None:
        yield Problem(where, f"is {half}", f"make one file of both: {half.command}")
    elif header.widths != model.text_widths:
        theirs, ours = _trained_for(header), model.family.title
        found = f"{theirs} ({_joined(header.widths)})" if theirs else f"vectors of {_joined(header.widths)} numbers"
        wrong = f"trained for {found}, this model is {ours} ({_joined(model.text_widths)})"
        these = " of these widths" if theirs == ours else ""
        yield Problem(where, wrong, f"take an embedding that was trained for {ours}{these}")


@dataclass(frozen=True)
class Half:
    """A file with the vectors of one text encoder, of an embedding for a family with two.

    Attributes:
        title: of the family.
        part: which of the two it holds, as files are called; None if nothing tells.
    """

    path: Path
    title: str
    part: str | None

    def __str__(self) -> str:
        return f"{f'the {self.part} half' if self.part else 'one half'} of an {self.title} embedding"

    @property
    def other(self) -> Path | None:
        """The file of the other half, if it is called as we and our tool call it."""
        stem = self.path.stem.removesuffix(f".{self.part}")
        if self.part is None or stem == self.path.stem:
            return None
        return self.path.with_name(f"{stem}.{_OTHER_HALF[self.part]}{self.path.suffix}")

    @property
    def command(self) -> str:
        """What makes one file of both halves."""
        other = str(self.other or "OTHER_HALF")
        target = str(self.path.with_name(f"{self.path.stem.removesuffix(f'.{self.part}')}.both.safetensors"))
        return shlex.join(("python", "tools/convert_embedding.py", "--to", "kohya", str(self.path), other, target))


def half_of(path: Path, metadata: Mapping[str, str], widths: tuple[int, ...]) -> Half | None:
    """What a file is if its metadata name a family with more text encoders than it has vectors for."""
    family = _named_family(metadata)
    if family is None or len(widths) >= len(family.text_encoders):
        return None
    by_name = next((part for part in _OTHER_HALF if path.stem.endswith(f".{part}")), None)
    return Half(path, family.title, by_name or _HALVES.get(widths[0]))


def _trained_for(header: EmbeddingHeader) -> str | None:
    """The family that the widths tell of, else the one that the metadata name."""
    family = _named_family(header.metadata)
    return _TRUE_WIDTHS.get(header.widths) or (family.title if family else None)


def _named_family(metadata: Mapping[str, str]) -> Family | None:
    version = metadata.get("ss_base_model_version")
    return next((family for family in FAMILIES.values() if version in family.versions.values()), None)


def _joined(widths: tuple[int, ...]) -> str:
    return " and ".join(map(str, widths))
