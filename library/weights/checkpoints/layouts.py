"""The tensors of a base model by the modules that they belong to, ready to be written in another layout, and those that
belong to none.

Values stay what they are, bit for bit, unless another dtype is asked for. `checkpoints.folders` and `single_files` say
how each layout is written.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.models.families import Part, TextEncoder
from library.models.info import ModelInfo
from library.models.original_names import EMA, prefix
from library.models.tensors import Reader, Source, stored_dtype
from library.weights.checkpoints.opened import BaseModel
from library.weights.checkpoints.stream import Planned

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Tensors without values by which programs know that a file predicts velocity, and that its schedule ends in noise."""
THREADS = 2
"""That read ahead while a file is written."""
_SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "lvlb_weights"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("logvar", "denoiser.sigmas", "scale_factor"),
)


@dataclass(frozen=True)
class Held:
    """Where a tensor of a module stands, and the shape that the module has it in."""

    source: Source
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return stored_dtype(self.source)

    def read(self, reader: Reader) -> Tensor:
        """The tensor, in its stored dtype."""
        return reader.read(self.source).reshape(self.shape)


def file_shaped(info: ModelInfo, *, linear: bool = False) -> ModelInfo:
    """The same model with the U-Net config that its file means: matrices or 1x1 kernels around the transformers.

    Args:
        linear: matrices, whatever the file has.
    """
    unet = info.parts["unet"]
    stored = (
        len(entry.shape) == 2
        for header in unet.headers
        for name, entry in header.entries.items()
        if name.startswith(unet.prefix) and name.endswith(".proj_in.weight")
    )
    if not (linear or unet.original):
        return info
    config = unet.config | {"use_linear_projection": linear or any(stored)}
    return replace(info, parts={**info.parts, "unet": replace(unet, config=config)})


def held(model: BaseModel) -> dict[Part, dict[str, Held]]:
    """Every tensor of the model's modules by part and name, without `text_model.`.

    Raises:
        UserError: one is missing, or of another shape; all parts at once.
    """
    from library.models.parts import build

    found: dict[Part, dict[str, Held]] = {}
    faults: list[UserError] = []
    for part in model.family.parts:
        module = build(model.info, part)
        wanted = {name.removeprefix("text_model."): tuple(one.shape) for name, one in module.state_dict().items()}
        where = model.info.parts[part].where
        missing = [name for name in wanted if (part, name) not in model.places]
        if missing:
            wrong = f"lacks {len(missing)} of {len(wanted)} tensors of its {part}, first {missing[0]}"
            faults.append(UserError.single(where, wrong, "the model is incomplete or of another family"))
            continue
        found[part] = {name: Held(model.places[part, name], shape) for name, shape in wanted.items()}
        for name, one in found[part].items():
            if significant(one.source.shape) != significant(one.shape):
                wrong = f"its tensor {one.source.name} ({name}) has the shape {one.source.shape}, not {one.shape}"
                faults.append(UserError.single(where, wrong, "the model is of another family"))
                break
    if faults:
        raise UserError(problem for fault in faults for problem in fault.problems)
    return found


def unused(model: BaseModel, tensors: Mapping[Part, Mapping[str, Held]]) -> list[Source]:
    """What stands in the model's files and in none of its modules, in the order of the files.

    What a file has for parts that are taken from another model (--vae, --text_encoder) isn't among it.
    """
    used = {(one.source.path, one.source.name) for part in tensors.values() for one in part.values()}
    parts, base = model.info.parts, model.info.path
    moved = {part for part, info in parts.items() if not all(_within(base, header.path) for header in info.headers)}
    replaced = tuple(prefix(model.family, part) for part in moved) if parts["unet"].original else ()
    own = {header.path: header for part in sorted(parts.keys() - moved) for header in parts[part].headers}
    return [
        Source(name, header.path, entry, name)
        for header in own.values()
        for name, entry in header.entries.items()
        if (header.path, name) not in used and not name.startswith(replaced)
    ]


def _within(base: Path, path: Path) -> bool:
    """Is it the file of a model, or one of its folder's?"""
    return path == base or base in path.parents


def groups(model: BaseModel, left: Iterable[Source]) -> dict[str, list[str]]:
    """What has no place in a folder, by what it is: names under phrases for a user."""
    encoders = model.family.text_encoders
    found: dict[str, list[str]] = {}
    for one in left:
        found.setdefault(_what(one.name, encoders), []).append(one.name)
    return found


def _what(name: str, encoders: Sequence[TextEncoder]) -> str:
    if name.startswith(EMA):
        return "EMA copies"
    if name in (V_PREDICTION, ZERO_SNR):
        return "marks of the prediction type, which stand in the scheduler's config"
    if name in _SCHEDULE:
        return "buffers of the noise schedule"
    if name.endswith("position_ids"):
        return "position ids"
    encoder = next((one for one in encoders if name.startswith(one.prefix)), None)
    if encoder is not None and ".resblocks." in name:
        return f"the {encoder.part}'s last layer, which no pipeline uses"
    if encoder is not None and name.removeprefix(encoder.prefix).startswith(("text_projection", "logit_scale")):
        return f"the {encoder.part}'s {name.removeprefix(encoder.prefix).partition('.')[0]}"
    return "tensors of no part of the model"


def of_schedule(name: str) -> bool:
    """Is it a buffer of the noise schedule? Those of a schedule that ends in pure noise may be infinite."""
    return name in _SCHEDULE


def is_ema(source: Source) -> bool:
    """Is it one of the averaged copies of other weights?"""
    return source.name.startswith(EMA)


def planned(
    name: str,
    pieces: Sequence[Held],
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    values: Callable[[], Tensor],
) -> Planned:
    """A tensor made of `pieces` by `values`, in `dtype` if there is one and it holds numbers of that kind.

    Writing it raises UserError if numbers become infinite in `dtype`.
    """
    stored = common([piece.dtype for piece in pieces])
    if dtype is None or dtype == stored or not stored.is_floating_point:
        return Planned(name, stored, shape, values)
    return Planned(name, dtype, shape, partial(_cast, values, dtype, name))


def _cast(values: Callable[[], Tensor], dtype: torch.dtype, name: str) -> Tensor:
    """The values in another dtype; numbers must stay numbers."""
    tensor = values()
    found = tensor.to(dtype)
    if not bool(found.isfinite().all()) and bool(tensor.float().isfinite().all()):
        wrong = f"holds values that are too large for {str(dtype).removeprefix('torch.')}"
        raise UserError.single(f"the tensor {name}", wrong, "use --bf16 or --float")
    return found


def common(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of tensors that become one: theirs, or float32 where they differ."""
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32


def significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its last ones: matrices and kernels of 1x1 are the same values."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
