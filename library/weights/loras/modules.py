"""Reading a LoRA file's tensors as modules: which belong together, and whether they fit a target.

Imports no torch: of the tensors only shapes and alphas are looked at, so that a header's stand-ins will do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from library.embedding_layouts import find, holds_lora, is_bundled
from library.errors import UserError
from library.models.lora_targets import LoraTarget

if TYPE_CHECKING:
    from torch import Tensor

_OWN_OFT = "oft_unet_"
_OTHERS = {
    "lokr_": "a LyCORIS file (LoKr)",
    "hada_": "a LyCORIS file (LoHa)",
    "oft_": "a LyCORIS file (OFT)",
    "a1.": "a LyCORIS file (GLoRA)",
    "on_input": "a LyCORIS file (IA3)",
    "diff": "a LyCORIS file (full)",
    "lora_mid": "a LyCORIS file (LoCon with Tucker factors)",
    "w_norm": "a LyCORIS file (with norms)",
}
_BASE_MODEL = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
_LEAVES = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")


@dataclass(frozen=True)
class FileModule:
    """One LoRA of a file: `down` (r, in[, k, k]), `up` (out, r[, 1, 1]), `alpha` (the rank if the file has none).

    `dora_scale`: the magnitudes (out, 1[, 1, 1]) of a DoRA, else None.
    """

    down: "Tensor"
    up: "Tensor"
    alpha: float
    dora_scale: "Tensor | None" = None


def group(tensors: "Mapping[str, Tensor]", source: str | Path) -> dict[str, FileModule]:
    """The modules of a file by name. Raises UserError if a key is no LoRA's, or a module lacks one of its factors."""
    leaves: dict[str, dict[str, Tensor]] = {}
    refuse_base_model(tensors, source)
    refuse_embedding({key: tuple(tensor.shape) for key, tensor in tensors.items()}, source)
    for key, tensor in tensors.items():
        name, _, leaf = key.partition(".")
        if leaf not in _LEAVES:
            other = "an OFT file of networks.oft" if name.startswith(_OWN_OFT) else lycoris_kind([key])
            wrong = f"is {other}" if other else f"{key} is not a key of a LoRA"
            advice = "networks.lora takes plain LoRA files only"
            if is_bundled(key):
                wrong = "has embeddings bundled with the LoRA"
                advice = f"take it apart: python tools/convert_embedding.py --to separate {Path(source).name} FOLDER"
            raise UserError.single(str(source), wrong, advice)
        leaves.setdefault(name, {})[leaf] = tensor
    modules = {}
    for name, found in leaves.items():
        if len(found.keys() & set(_LEAVES[:2])) < 2:
            raise UserError.single(str(source), f"{name} lacks lora_down or lora_up", "the file is incomplete")
        down = found["lora_down.weight"]
        alpha = float(found["alpha"]) if "alpha" in found else float(down.shape[0])
        modules[name] = FileModule(down, found["lora_up.weight"], alpha, found.get("dora_scale"))
    return modules


def refuse_base_model(keys: Iterable[str], source: str | Path) -> None:
    """Raises UserError if a file with these keys is a base model's."""
    if any(key.startswith(_BASE_MODEL) for key in keys):
        raise UserError.single(str(source), "is a base model, not a LoRA", "give a LoRA file")


_AS_WEIGHTS = "give it as --weights, and its word as --token_string; as --base_embeddings it stays as it is"


def refuse_embedding(shapes: Mapping[str, tuple[int, ...]], source: str | Path, advice: str = _AS_WEIGHTS) -> None:
    """Raises UserError if a file with tensors of these shapes holds embeddings and no network.

    Args:
        advice: what to do instead; what trainings say unless told.
    """
    if holds_lora(shapes):
        return
    try:
        found = find(shapes, {}, str(source)).embeddings
    except UserError:
        return
    if all(one.layout != "diffusers" or "." not in str(one.token) for one in found):
        raise UserError.single(str(source), "is an embedding, not a network", advice)


def lycoris_kind(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, as messages name it, if only LyCORIS writes such; None of any other."""
    for key in keys:
        name, _, leaf = key.partition(".")
        for start, kind in _OTHERS.items():
            if leaf.startswith(start) and not name.startswith(_OWN_OFT):
                return kind
    return None


def fit(module: FileModule, target: LoraTarget, rank: int, source: str | Path) -> "tuple[Tensor, Tensor]":
    """The factors in the target's shapes: a 1x1 convolution's may stand for a Linear's and the other way round.

    Raises UserError if the rank or a size differs.
    """
    found = module.down.shape[0]
    if found != rank:
        raise UserError.single(
            str(source),
            f"{target.name} has rank {found}, the network {rank}",
            "use --dim_from_weights, or the file's rank",
        )
    shapes = target.shapes(rank)
    factors = []
    for tensor, shape in zip((module.down, module.up), shapes, strict=True):
        if _core(tensor.shape) != _core(shape):
            raise UserError.single(
                str(source),
                f"{target.name} has shape {tuple(tensor.shape)} where this model needs {shape}",
                "use a LoRA of the same model family",
            )
        factors.append(tensor.reshape(shape))
    return factors[0], factors[1]


def fit_magnitudes(module: FileModule, target: LoraTarget, source: str | Path) -> "Tensor | None":
    """The magnitudes of a DoRA in the target's shape, (out, 1[, 1, 1]); None if the module has none.

    Raises UserError if they aren't one for each output: LyCORIS files can have one for each input, (1, in[, 1, 1]).
    """
    if module.dora_scale is None:
        return None
    found = tuple(module.dora_scale.shape)
    if prod(found) != target.out_features or found[0] != target.out_features:
        wrong = f"{target.name} has a dora_scale of shape {found}, not one number for each output"
        raise UserError.single(str(source), wrong, "only files that weigh outputs (LyCORIS: wd_on_output=True) will do")
    return module.dora_scale.reshape(magnitude_shape(target))


def magnitude_shape(target: LoraTarget) -> tuple[int, ...]:
    """The shape of `dora_scale`: (out, 1), of a convolution (out, 1, 1, 1)."""
    return (target.out_features, *(1 for _ in target.shapes(1)[0][1:]))


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the 1x1 window that only the kind of module decides."""
    return tuple(shape[:2]) if tuple(shape[2:]) in ((), (1, 1)) else tuple(shape)
