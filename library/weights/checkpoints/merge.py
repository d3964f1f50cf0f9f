"""LoRA files merged into a base model on disk, or taken out of one again: streamed, a few tensors in memory at a time.

The output has the input's layout, a `.safetensors` file or a diffusers folder. Tensors that no LoRA changes are copied
byte for byte; changed ones are computed in `compute` and stored in the dtype that they had. EMA copies in a file stay
as they are.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from library.console import warn
from library.errors import UserError
from library.models.families import Part, diffusers_key
from library.models.folder import read_json
from library.models.headers import Header
from library.models.integrity import check_hashes
from library.models.original_names import EMA, PART_PREFIXES
from library.models.tensors import Reader, Source, finite, stored_dtype
from library.weights.checkpoints.changes import OFT_PREFIX, Leaf, changed, leaves_of
from library.weights.checkpoints.folders import loaded_whole, write_json
from library.weights.checkpoints.merged_metadata import merged_metadata, needed_metadata
from library.weights.checkpoints.opened import BaseModel, open_model
from library.weights.checkpoints.replaced_folder import check_new_folder, copied_size, replaced_folder
from library.weights.checkpoints.stream import Planned, check_ending, check_room, write_stream
from library.weights.loras.lora import Module
from library.weights.loras.merging import Weighted

_THREADS = min(4, os.cpu_count() or 1)
Stored = tuple[Path, str]
"""A tensor of a file: the file and its name there."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        modules: modules of LoRA files that are in the result.
        unknown: by file, the modules that the model has no place for.
        tensors: tensors of the model that changed.
        size: bytes of the tensors that were written.
    """

    modules: int
    unknown: Mapping[Path, tuple[str, ...]]
    tensors: int
    size: int


@dataclass(frozen=True)
class _Change:
    """What one module of a LoRA does to one tensor, or to rows of it."""

    source: Source
    module: Module
    strength: float
    leaf: Leaf


@dataclass(frozen=True)
class _Plan:
    changes: Mapping[Stored, Sequence[_Change]]
    modules: int
    unknown: Mapping[Path, tuple[str, ...]]


def merge_into(
    model: Path,
    loras: Sequence[Weighted],
    save_to: Path,
    *,
    compute: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    with_metadata: bool = True,
    unmerge: bool = False,
) -> MergeReport:
    """Merge LoRAs into a base model, one after the other.

    Args:
        model: a file in the original layout (pickles too) or a diffusers folder. Parts that it lacks aren't needed.
        save_to: a `.safetensors` file, or of a folder a folder that isn't there yet. It may be the file `model`.
        compute: what sums and products are computed in.
        dtype: what weights are stored in, not EMA copies nor buffers of the noise schedule; None keeps each tensor's.
        device: where changed tensors are computed; None is the CPU.
        unmerge: take the LoRAs out again, last to first.

    Raises:
        UserError: no base model, nothing of a LoRA fits it, a kind that can't be merged, `save_to` can't be written, or
            a result isn't finite. Nothing is written then.
    """
    opened = open_model(model)
    if opened.info.layout == "single_file":
        check_ending(save_to, "--save_to")
    else:
        check_new_folder(opened.info.path, save_to)
    plan = _plan(opened, loras, unmerge=unmerge)
    _check_content(opened)
    work = _Work(compute, dtype, device or torch.device("cpu"), unmerge)
    with Reader() as reader:
        if opened.info.layout == "single_file":
            header = opened.info.parts["unet"].headers[0]
            if any(name.startswith(EMA) for name in header.entries):
                warn(f"{model} has EMA copies of its weights ({EMA}...); they stay as they are")
            merged = [one.lora for one in loras]
            metadata = merged_metadata(opened, merged, save_to) if with_metadata else needed_metadata(opened)
            size = write_stream(
                _planned(header, plan, work, reader, original=True),
                save_to,
                metadata,
                f"writing {save_to.name}",
                threads=_THREADS,
            )
        else:
            size = _write_folder(opened, save_to, plan, work, reader)
    return MergeReport(plan.modules, plan.unknown, len(plan.changes), size)


def _plan(model: BaseModel, loras: Sequence[Weighted], *, unmerge: bool) -> _Plan:
    """Which tensors change, and how; every module is checked against the model's shapes."""
    changes: dict[Stored, list[_Change]] = {}
    unknown: dict[Path, tuple[str, ...]] = {}
    names = _Names(model)
    merged = 0
    for one in reversed(loras) if unmerge else loras:
        strangers = []
        for name, module in one.lora.modules.items():
            found = [(leaf, names.find(name, leaf)) for leaf in leaves_of(module, one.lora.path, undo=unmerge)]
            if any(source is None for _, source in found):
                strangers.append(name)
                continue
            merged += 1
            for leaf, source in found:
                if source is not None and (strength := one.strength(name)):
                    change = _Change(source, module, strength, leaf)
                    _check_shape(change, one.lora.path, model)
                    changes.setdefault((source.path, source.name), []).append(change)
        if len(strangers) == len(one.lora.modules):
            wrong = f"none of its {len(strangers)} modules is in the model, e.g. {strangers[0]}"
            advice = f"the model is an {model.family.title} one; use a LoRA of that family"
            raise UserError.single(str(one.lora.path), wrong, advice)
        if strangers:
            unknown[one.lora.path] = tuple(strangers)
    return _Plan(changes, merged, unknown)


class _Names:
    """The tensors of a base model by the names that LoRA files have for their modules, in every spelling."""

    def __init__(self, model: BaseModel) -> None:
        self._model = model
        self._stems: dict[str, tuple[Part, str]] = {}
        self._looked_at: set[Part] = set()
        encoders = model.family.text_encoders
        self._prefixes: dict[str, Part] = {"lora_unet_": "unet", OFT_PREFIX: "unet"}
        for number, encoder in enumerate(encoders):
            if encoder.part in model.info.parts:
                if number == 0:
                    self._prefixes["lora_te_"] = encoder.part
                if len(encoders) > 1:
                    self._prefixes[f"lora_te{number + 1}_"] = encoder.part

    def find(self, name: str, leaf: Leaf) -> Source | None:
        """Where the weight or bias of the module `name` stands; None if the model has none."""
        part = next((part for prefix, part in self._prefixes.items() if name.startswith(prefix)), None)
        if part is None:
            return None
        if part not in self._looked_at:
            self._look_at(part)
        found = self._stems.get(name)
        return None if found is None else self._model.places_of(part).get(f"{found[1]}.{leaf}")

    def _look_at(self, part: Part) -> None:
        self._looked_at.add(part)
        prefixes = [prefix for prefix, its in self._prefixes.items() if its == part]
        for path in self._model.places_of(part):
            stem, _, leaf = path.rpartition(".")
            if leaf == "weight":
                for prefix in prefixes:
                    for key in self._keys(part, stem):
                        self._stems[prefix + key] = (part, stem)

    def _keys(self, part: Part, stem: str) -> set[str]:
        if part != "unet":
            level = "" if stem == "text_projection" else "text_model_"
            return {level + stem.replace(".", "_")}
        try:
            return {diffusers_key(stem), self._model.family.unet_key(stem)}
        except ValueError:
            return {diffusers_key(stem)}


def _check_shape(change: _Change, path: Path, model: BaseModel) -> None:
    """Refuse factors of other sizes before anything is read."""
    down, up = change.module.leaves.get("lora_down.weight"), change.module.leaves.get("lora_up.weight")
    if change.leaf == "bias" or down is None or up is None or "lora_mid.weight" in change.module.leaves:
        return
    held = change.source.shape
    if up.shape[0] != held[0] or math.prod(down.shape[1:]) != math.prod(held[1:]):
        wrong = f"{change.module.name} is for a weight of ({up.shape[0]}, {math.prod(down.shape[1:])}), not {held}"
        raise UserError.single(str(path), wrong, f"use a LoRA for {model.family.title} models of this size")


def _check_content(model: BaseModel) -> None:
    """Files that carry a hash of their tensors are checked; one that differs may have been kept by another tool."""
    files = {header.path: header for part in model.info.parts.values() for header in part.headers}
    try:
        check_hashes((str(path), header) for path, header in files.items())
    except UserError as fault:
        for problem in fault.problems:
            warn(f"{problem.where}: {problem.wrong}; the file is damaged, or a tool changed it and kept an old hash")


@dataclass(frozen=True)
class _Work:
    """How tensors are computed and stored."""

    compute: torch.dtype
    dtype: torch.dtype | None
    device: torch.device
    undo: bool

    def stored(self, source: Source) -> torch.dtype:
        """The dtype that a tensor of the input gets in the output."""
        own = stored_dtype(source)
        return self.dtype if self.dtype is not None and own.is_floating_point else own


def _planned(header: Header, plan: _Plan, work: _Work, reader: Reader, *, original: bool) -> list[Planned]:
    """All tensors of a file in the order in which it holds them.

    Args:
        original: it is a whole model, in which not all is weights.
    """
    found = []
    for name, entry in sorted(header.entries.items(), key=lambda item: item[1].start):
        whole = Source(name, header.path, entry, name)
        weight = not original or name.startswith(PART_PREFIXES)
        stored = work.stored(whole) if weight else stored_dtype(whole)
        changes = plan.changes.get((header.path, name), ())
        values: Callable[[], Tensor] = partial(_values, whole, changes, stored, work, reader)
        found.append(Planned(name, stored, entry.shape, values))
    return found


def _values(whole: Source, changes: Sequence[_Change], stored: torch.dtype, work: _Work, reader: Reader) -> Tensor:
    """A tensor of the output."""
    held = reader.read(whole)
    if not changes and held.dtype == stored:
        return held
    with torch.no_grad():
        weight = held.to(work.device, work.compute) if changes else held
        del held
        for change in changes:
            rows = change.source.rows
            part = weight if rows is None else weight[slice(*rows)]
            part = part.T if change.source.transpose else part
            new = changed(part.contiguous(), change.module, change.strength, leaf=change.leaf, undo=work.undo)
            if new is not part:
                part.copy_(new)
        result = weight.to("cpu", stored)
        if not finite(result):
            raise _not_finite(result, whole, changes, finite(reader.read(whole)))
    return result


def _not_finite(result: Tensor, whole: Source, changes: Sequence[_Change], before: bool) -> UserError:
    """Whose fault it is: the model's if it held such values `before`, or the LoRA's, or the dtype's."""
    if not before:
        wrong = f"its tensor {whole.name} holds values that are no finite numbers"
        advice = "the model is damaged, or its training diverged; use another one"
        return UserError.single(str(whole.path), wrong, advice)
    wrong = f"the new {whole.name} would hold values that are no finite numbers in {str(result.dtype)[6:]}"
    advice = "for values too large for float16, --save_precision bf16 or float"
    if changes:
        advice = f"use a LoRA that isn't damaged; {advice}"
    return UserError.single(str(whole.path), wrong, advice)


def _write_folder(model: BaseModel, save_to: Path, plan: _Plan, work: _Work, reader: Reader) -> int:
    """A copy of a folder whose weights are written anew where they change."""
    parts = {
        part: held
        for part, held in model.info.parts.items()
        if work.dtype is not None
        or any((header.path, name) in plan.changes for header in held.headers for name in header.entries)
    }
    files = [
        (part, header, _planned(header, plan, work, reader, original=False))
        for part, held in parts.items()
        for header in held.headers
    ]
    size = sum(one.size for _, _, planned in files for one in planned)
    check_room(save_to, size + copied_size(model.info.path, parts))
    with replaced_folder(model.info.path, save_to, parts) as new:
        for part, header, planned in files:
            target = new.path_of(header.path)
            what = f"writing {target.parent.name}/{target.name}"
            write_stream(planned, target, {"format": "pt"} | header.metadata, what, threads=_THREADS)
            if part not in ("unet", "vae"):
                _tell_dtype(target.parent / "config.json", planned)
    return size


def _tell_dtype(config: Path, planned: Sequence[Planned]) -> None:
    """Let a text encoder's config say what its weights are loaded as, where it is silent and that matters."""
    values = read_json(config, str(config))
    if not values.keys() & {"dtype", "torch_dtype"} and (told := loaded_whole(one.dtype for one in planned)):
        write_json(config, values | told)
