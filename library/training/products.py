"""The files of a save: how each is written, and what of it is looked at before it counts. What they are called is
library.training.weight_files' business; when they are written, and which old ones go, saving's and steps'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from library.training.embeddings import EmbeddingTrainable
from library.training.pivotal import PivotalTrainable
from library.training.prepare import Prepared
from library.training.record import RunRecord
from library.training.trainable import NetworkTrainable, Trainable
from library.training.weight_files import WeightFile, weight_files
from library.weights.check import check_file
from library.weights.embedding_metadata import EmbeddingFacts, bundle_usage_metadata
from library.weights.embeddings import bundle_tensors, check_embedding_file, write_embedding
from library.weights.files import read_metadata, read_tensors, save_safetensors
from library.weights.save import save_lora


@dataclass(frozen=True)
class Product:
    """One file.

    Attributes:
        name: relative to the output folder.
        write: (path, dtype of its numbers or None for theirs, updates done) -> the file at `path`.
        check: reads a written file back; raises if it is not as it should be, returns what a user should know, in
            lines that name the file as it will be called.
    """

    name: str
    write: Callable[[Path, torch.dtype | None, int], None]
    check: Callable[[Path], list[str]]


Products = Callable[[str], Sequence[Product]]
"""A save's stem, such as `mycat-000002`, -> its files, the main one first."""


def products(prepared: Prepared, trainable: Trainable, record: RunRecord) -> Products:
    """The files of a run's saves."""
    written = Files(prepared, record, *_parts(trainable))
    return lambda stem: tuple(written.product(file) for file in _files(prepared, stem))


def _files(prepared: Prepared, stem: str) -> tuple[WeightFile, ...]:
    return weight_files(prepared.options, prepared.embeddings, len(prepared.model.text_widths), stem)


def _parts(trainable: Trainable) -> tuple[NetworkTrainable | None, EmbeddingTrainable | None]:
    """The network and the vectors of what is trained."""
    if isinstance(trainable, PivotalTrainable):
        return trainable.network, trainable.embeddings
    return (
        trainable if isinstance(trainable, NetworkTrainable) else None,
        trainable if isinstance(trainable, EmbeddingTrainable) else None,
    )


class Files:
    """Writes and checks a network's file, those of embeddings, and bundles of both."""

    def __init__(
        self,
        prepared: Prepared,
        record: RunRecord,
        network: NetworkTrainable | None,
        embeddings: EmbeddingTrainable | None,
    ) -> None:
        self._prepared, self._record = prepared, record
        self._network, self._embeddings = network, embeddings

    def product(self, file: WeightFile) -> Product:
        """What makes one file, by what it holds."""
        if file.holds == "network":
            return Product(file.name, partial(self._write_network, file), partial(self._check_network, file))
        if file.holds == "bundle":
            return Product(file.name, partial(self._write_bundle, file), partial(self._check_bundle, file))
        return Product(file.name, partial(self._write_embedding, file), partial(self._check_embedding, file))

    def _write_network(self, file: WeightFile, path: Path, dtype: torch.dtype | None, updates_done: int) -> None:
        if self._network is None:
            raise ValueError("there is no network to write")
        beside = () if file.holds == "bundle" else _files(self._prepared, Path(file.name).stem)
        names = [Path(one.name).name for one in beside if one.holds == "kohya"]
        self._network.save(path, dtype, self._record.metadata(updates_done, names))

    def _check_network(self, file: WeightFile, path: Path) -> list[str]:
        shapes = self._network.file_shapes() if self._network else None
        return check_file(path, shapes, trained_parts=self._prepared.rates.trained, called=file.name)

    def _write_embedding(self, file: WeightFile, path: Path, dtype: torch.dtype | None, updates_done: int) -> None:
        layout = file.holds
        if layout == "network":
            raise ValueError(f"{file.name} is no file of an embedding")
        (token,) = file.tokens
        encoders, name = len(self._prepared.model.text_widths), Path(file.name).name
        facts = EmbeddingFacts(token.text, token.vectors, encoders, name, layout, self._prepared.rates.embeddings)
        metadata = self._record.embedding_metadata(updates_done, facts)
        vectors = self._vectors(file, token.text)
        write_embedding(path, vectors, layout, token.text, dtype, metadata, called=Path(file.name))

    def _check_embedding(self, file: WeightFile, path: Path) -> list[str]:
        (token,) = file.tokens
        return check_embedding_file(path, _shapes(self._vectors(file, token.text)), token.text, called=Path(file.name))

    def _write_bundle(self, file: WeightFile, path: Path, dtype: torch.dtype | None, updates_done: int) -> None:
        """Network and vectors in one file: the network as it writes itself, then all of it again."""
        vectors = {token.text: self._vectors(file, token.text) for token in file.tokens}
        bundled = {name: tensor.to(dtype or tensor.dtype) for name, tensor in bundle_tensors(vectors).items()}
        plain = self._prepared.options.output.no_metadata
        usage = {} if plain else bundle_usage_metadata(Path(file.name).name, list(vectors))
        if self._network is None:
            facts = EmbeddingFacts(
                " ".join(vectors),
                sum(token.vectors for token in file.tokens),
                len(file.encoders),
                Path(file.name).name,
                "bundle",
                self._prepared.rates.embeddings,
            )
            save_safetensors(bundled, path, self._record.embedding_metadata(updates_done, facts) | usage)
            return
        self._write_network(file, path, dtype, updates_done)
        tensors, metadata = read_tensors(path), dict(sorted(read_metadata(path).items()))
        save_lora({**tensors, **bundled}, path, metadata | usage)

    def _check_bundle(self, file: WeightFile, path: Path) -> list[str]:
        found = []
        for token in file.tokens:
            shapes = _shapes(self._vectors(file, token.text))
            found += check_embedding_file(path, shapes, token.text, called=Path(file.name))
        return found

    def _vectors(self, file: WeightFile, token: str) -> tuple[Tensor, ...]:
        """A token's vectors (n, d) for the text encoders that a file is for."""
        if self._embeddings is None:
            raise ValueError("there are no embeddings to write")
        every = self._embeddings.vectors_of(token)
        return tuple(every[encoder] for encoder in file.encoders)


def _shapes(vectors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(int(one.shape[0]), int(one.shape[1])) for one in vectors]
