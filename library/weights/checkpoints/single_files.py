"""Writing a base model as one file in the original layout, which A1111, ComfyUI and InvokeAI load.

A folder lacks some of what such files hold beside the model. It comes from a file where one is given; the rest is made
as other programs make it, and listed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import library
from library.errors import UserError
from library.models import evidence
from library.models.families import Part, PredictionType
from library.models.folder import SCHEDULER, read_json
from library.models.info import ModelInfo
from library.models.original_names import Original, originals
from library.models.tensors import Reader, Source, stored_dtype
from library.weights.checkpoints.layouts import (
    THREADS,
    V_PREDICTION,
    ZERO_SNR,
    Held,
    common,
    held,
    is_ema,
    planned,
    significant,
    unused,
)
from library.weights.checkpoints.opened import BaseModel
from library.weights.checkpoints.stream import Planned, write_stream
from library.weights.loras.amended import amended
from library.weights.metadata import ModelSpec, modelspec

_KIND = "checkpoint"
_PREDICTION = "modelspec.prediction_type"


@dataclass(frozen=True)
class Added:
    """A tensor of a file that its model doesn't have. `why`: what it is, for a list."""

    planned: Planned
    why: str


def write_file(
    model: BaseModel,
    tensors: Mapping[Part, Mapping[str, Held]],
    path: Path,
    reader: Reader,
    *,
    dtype: torch.dtype | None = None,
    spare: Sequence[Source] = (),
    metadata: Mapping[str, str] | None = None,
    predicts: PredictionType | None = None,
) -> list[Added]:
    """Write the model as a `.safetensors` file, whole or not at all, with a progress bar.

    Args:
        dtype: of the weights; None keeps what is stored.
        spare: as for `as_file`.
        metadata: more of it; the file's own and `modelspec.*` stand there anyway.
        predicts: what a user said of the model, if that was said.

    Returns:
        The tensors that the model itself doesn't have.

    Raises:
        UserError: as `as_file`; no room for it.
    """
    found, added = as_file(model, tensors, reader, dtype, spare)
    text = file_metadata(model, path, predicts) | dict(metadata or {})
    write_stream(found, path, text, f"writing {path.name}", threads=THREADS)
    return added


def file_metadata(model: BaseModel, path: Path, predicts: PredictionType | None = None) -> dict[str, str]:
    """The text of the new file: its model's own if that was a file, without hashes, and what it takes to load it right.

    `modelspec.prediction_type` stands there where the model tells it, a user said it (`predicts`) or a probe found it.
    What is only usual for the family doesn't: the next reader would take it for evidence.
    """
    info = model.info
    own = info.parts["unet"].headers[0].metadata if info.layout == "single_file" else {}
    predicted = info.prediction_type or "epsilon"
    spec = modelspec(
        ModelSpec(
            base_model_version=model.family.versions[predicted],
            date=datetime.now(),
            implementation_version=f"lorasmith/{library.__version__}",
            title=own.get("modelspec.title") or path.stem,
            v_prediction=predicted == "v_prediction",
            kind=_KIND,
        )
    )
    spec["modelspec.architecture"] = spec["modelspec.architecture"].removesuffix(f"/{_KIND}")
    found = {"format": "pt"} | spec | amended(own) | {_PREDICTION: spec[_PREDICTION]}
    if predicts is None and not info.family.probes_prediction and _told(info) is None:
        del found[_PREDICTION]
    return found


def _told(info: ModelInfo) -> PredictionType | None:
    """What the model's own files tell that it predicts."""
    if info.layout == "folder":
        file = info.path / SCHEDULER
        said = evidence.of_scheduler(read_json(file, str(file)), str(file)) if file.is_file() else evidence.Evidence()
    else:
        header = info.parts["unet"].headers[0]
        said = evidence.of_header(header, str(header.path))
    return said.prediction[0] if said.prediction else None


def as_file(
    model: BaseModel,
    tensors: Mapping[Part, Mapping[str, Held]],
    reader: Reader,
    dtype: torch.dtype | None,
    spare: Sequence[Source] = (),
) -> tuple[list[Planned], list[Added]]:
    """The whole model as one file in the original layout: its own tensors, and what such files have besides.

    That is what `spare` holds, as it is stored; of OpenCLIP's text encoder without pooled output (SD2) else its last
    layer once more, and a projection and logit scale of ones, as other programs write them; and marks of what the model
    predicts.

    Args:
        dtype: of the model's own tensors; None keeps what is stored.

    Raises:
        UserError: a tensor has no name there.
    """
    found: list[Planned] = []
    for part, inside in tensors.items():
        for one in originals(model.family, part, model.info.parts[part].config, inside):
            pieces = tuple(inside[target] for target in one.targets)
            shape = one.shape([piece.shape for piece in pieces])
            found.append(planned(one.name, pieces, shape, dtype, partial(_joined, one, pieces, shape, reader)))
    there = {one.name for one in found}
    added: list[Added] = []
    for added_one in [*_spare(spare, reader), *_marks(model.info), *_made_up(model, found)]:
        if added_one.planned.name not in there:
            there.add(added_one.planned.name)
            added.append(added_one)
    return _in_order([*found, *(one.planned for one in added)]), added


def taken_over(
    reference: BaseModel, model: BaseModel, tensors: Mapping[Part, Mapping[str, Held]], where: str
) -> list[Source]:
    """What a file of the same kind holds beside its model, for `spare`; not EMA copies, which are of its own weights.

    Args:
        where: how messages name the reference.

    Raises:
        UserError: it is no file in the original layout, incomplete, or a model of another kind.
    """
    if reference.info.layout != "single_file":
        raise UserError.single(where, "is a folder", "a new file takes its other tensors from a file")
    if reference.family is not model.family:
        wrong = f"is an {reference.family.title} model, not {model.family.title}"
        raise UserError.single(where, wrong, "give a model of the same kind")
    there = held(reference)
    for part, inside in tensors.items():
        for name, one in inside.items():
            other = there[part].get(name)
            if other is not None and significant(other.shape) != significant(one.shape):
                wrong = f"its tensor {other.source.name} has the shape {other.shape}, not {one.shape}"
                raise UserError.single(where, wrong, "give a model of the same kind")
    kept = (one for one in unused(reference, there) if not is_ema(one))
    return [one for one in kept if one.name not in (V_PREDICTION, ZERO_SNR)]


def _spare(sources: Iterable[Source], reader: Reader) -> Iterator[Added]:
    for one in sources:
        yield Added(
            Planned(one.name, stored_dtype(one), one.shape, partial(reader.read, one)), "as they stand in the file"
        )


def _marks(info: ModelInfo) -> Iterator[Added]:
    velocity = info.prediction_type == "v_prediction" and not info.family.probes_prediction
    for name, said, why in (
        (V_PREDICTION, velocity, "marks that it predicts velocity"),
        (ZERO_SNR, info.zero_terminal_snr, "marks that its noise schedule ends in pure noise"),
    ):
        if said:
            yield Added(Planned(name, torch.float32, (0,), partial(torch.zeros, 0)), why)


def _made_up(model: BaseModel, found: Sequence[Planned]) -> Iterator[Added]:
    """What programs look for in OpenCLIP's text encoder, of which a folder has only what is used."""
    named = {one.name: one for one in found}
    for encoder in model.family.text_encoders:
        if not encoder.open_clip or encoder.projects:
            continue
        config = model.info.parts[encoder.part].config
        width, count = int(config["hidden_size"]), int(config["num_hidden_layers"])
        dtype = named[f"{encoder.prefix}ln_final.weight"].dtype
        layers = f"{encoder.prefix}transformer.resblocks."
        last, beyond = f"{layers}{count - 1}.", f"{layers}{count}."
        for name, one in named.items():
            if name.startswith(last):
                yield Added(
                    replace(one, name=beyond + name.removeprefix(last)),
                    f"the {encoder.part}'s last layer once more, where programs look for one more",
                )
        square = (width, width)
        make = partial(torch.ones, square, dtype=dtype)
        yield Added(
            Planned(f"{encoder.prefix}text_projection", dtype, square, make),
            f"ones for the {encoder.part}'s projection, which no pipeline uses",
        )
        scale = partial(torch.ones, (), dtype=dtype)
        yield Added(
            Planned(f"{encoder.prefix}logit_scale", dtype, (), scale),
            f"one for the {encoder.part}'s logit scale, which no pipeline uses",
        )


def _joined(original: Original, pieces: Sequence[Held], shape: tuple[int, ...], reader: Reader) -> Tensor:
    read = [piece.read(reader) for piece in pieces]
    if len(read) > 1:
        dtype = common([piece.dtype for piece in pieces])
        same = [one.to(dtype).contiguous() for one in read]
        rows = [one.view(torch.uint8) for one in same]
        read = [torch.cat(rows).view(dtype)]
    whole = read[0].T if original.turned else read[0]
    return whole.reshape(shape).contiguous()


def _in_order(planned: Iterable[Planned]) -> list[Planned]:
    """Widest dtypes first, so that each tensor is aligned in the file."""
    return sorted(planned, key=lambda one: (-one.dtype.itemsize, one.name))
