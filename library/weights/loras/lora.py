"""A LoRA file of any program, as tools work on it: modules under the names that we write, and what else is in it.

`read` takes files of sd-scripts, LyCORIS, peft, diffusers and ours; `write` puts one down in the layout that it had, or
in another. What a module means as numbers is in `forms`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from library.console import say, warn
from library.embedding_layouts import is_bundled
from library.errors import Problem, UserError
from library.models.families import Family, diffusers_key
from library.models.headers import Header
from library.models.pickles import read_weights
from library.models.sgm_names import sgm_key
from library.weights.check import BadWeightsError, is_finite
from library.weights.files import read_metadata, read_tensors
from library.weights.loras.amended import NAME, STALE
from library.weights.loras.keys import stranger
from library.weights.loras.lycoris import EXACT, kind_of, misfit, missing
from library.weights.loras.modules import refuse_base_model, refuse_embedding
from library.weights.loras.names import diffusers_path, dotted
from library.weights.loras.peft import (
    SETTINGS,
    Plain,
    as_older_diffusers,
    as_peft,
    is_dotted,
    is_older,
    settings_of,
    underscored,
)
from library.weights.loras.spelled import family_for, possible, sort_keys
from library.weights.outputs import LORA_ENDINGS
from library.weights.save import save_lora

_SLOW = 100_000_000
"""Bytes of a file that takes a while to be written."""
_FACTORS = {"lora_down.weight", "lora_up.weight"}
_MODULE = re.compile(r"(lora_unet|lora_te[12]?|lycoris|oft_unet)_\w")
_TEXT = re.compile(r"lora_te([12]?)_")
_DIFFUSERS_BLOCKS = re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks)_")

Layout = Literal["kohya", "kohya-diffusers", "peft", "diffusers"]
"""`kohya`: underscored names, SDXL's blocks in the original spelling; `kohya-diffusers`: the same with the blocks of
diffusers (SD1 and SD2 files are the same in both); `peft`: dotted paths with lora_A and lora_B; `diffusers`: the older
dotted paths with lora.down and lora.up."""
DYNAMIC = "Dynamic"
"""What metadata say in place of a rank or alpha where modules differ."""
LAYOUTS: tuple[Layout, ...] = ("kohya", "kohya-diffusers", "peft", "diffusers")


@dataclass(frozen=True)
class Module:
    """What a file changes of one module of a base model.

    Attributes:
        name: the file's key before the dot, as we write it: `lora_unet_...`, SDXL's blocks in the original spelling;
            `lora_te_...`, or `lora_te1_` and `lora_te2_` of SDXL.
        leaves: tensors by the rest of their keys: `lora_down.weight` (r, in[, k, k]), `lora_up.weight`
            (out, r[, 1, 1]), `dora_scale`, `hada_w1_a`, `lokr_w1`, ... without `alpha`.
        alpha: None where the file has none; then the scale is 1.
    """

    name: str
    leaves: Mapping[str, Tensor]
    alpha: float | None = None

    @property
    def is_plain(self) -> bool:
        """It has the two factors of a LoRA, with the magnitudes of a DoRA or without, and nothing else."""
        return self.leaves.keys() - {"dora_scale"} == _FACTORS


@dataclass(frozen=True)
class Lora:
    """A file's content.

    Attributes:
        path: as messages name it.
        modules: by name, in the file's order.
        rest: tensors that belong to no module, such as bundled embeddings; they are kept as they are.
    """

    path: Path
    layout: Layout
    modules: Mapping[str, Module]
    metadata: Mapping[str, str] = field(default_factory=dict)
    rest: Mapping[str, Tensor] = field(default_factory=dict)

    def with_modules(self, modules: Mapping[str, Module], metadata: Mapping[str, str]) -> "Lora":
        """The same file with other modules and metadata."""
        return replace(self, modules=modules, metadata=metadata)


def read(path: str | Path) -> Lora:
    """Read a LoRA file.

    Raises:
        UserError: no file, damaged, no LoRA, a base model, an embedding, or a module that lacks a factor.
    """
    path = Path(path)
    if path.is_file():
        _refuse_others(read_weights(path, str(path)), path)
    raw = read_tensors(path)
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    tensors = underscored(raw, settings_of(metadata, path))
    rest = {key: tensor for key, tensor in tensors.items() if is_bundled(key)}
    leaves = _leaves(tensors, path)
    if not leaves:
        raise UserError.single(str(path), "holds no LoRA", "give a LoRA file")
    layout = _layout(raw)
    family = family_for(sort_keys({key: tuple(tensor.shape) for key, tensor in raw.items()}), metadata)
    sdxl = family is not None and len(family.text_encoders) > 1
    modules: dict[str, Module] = {}
    problems = []
    for name, found in leaves.items():
        ours = _canonical(name, sdxl=sdxl)
        if ours in modules:
            problems.append(Problem(str(path), f"it holds {ours} twice, also as {name}", "the file is damaged"))
        elif wrong := _wrong(name, found):
            problems.append(Problem(str(path), wrong, "the file is incomplete or damaged"))
        else:
            alpha = found.pop("alpha", None)
            modules[ours] = Module(ours, found, None if alpha is None else float(alpha))
    if problems:
        more = len(problems) - 1
        first = problems[0]
        raise UserError.single(first.where, first.wrong + (f" (and {more} more)" if more else ""), first.advice)
    if layout == "kohya" and sdxl and any(_DIFFUSERS_BLOCKS.match(name) for name in leaves):
        layout = "kohya-diffusers"
    return Lora(path, layout, modules, metadata, rest)


def family_of(lora: Lora) -> Family | None:
    """The family of base models that a file is made for (`spelled.possible`); None if nothing tells."""
    keys = sort_keys(
        {
            f"{name}.{leaf}": tuple(tensor.shape)
            for name, module in lora.modules.items()
            for leaf, tensor in module.leaves.items()
        }
    )
    found = possible(keys, lora.metadata)
    return found[0] if len(found) == 1 else None


def _refuse_others(header: Header, path: Path) -> None:
    """Raises UserError if a file's header alone tells that it is no LoRA of ours."""
    refuse_base_model(header.entries, path)
    shapes = {key: entry.shape for key, entry in header.entries.items()}
    refuse_embedding(shapes, path, "give a LoRA file; convert_embedding.py works on embeddings")
    if title := stranger(header.entries):
        raise UserError.single(str(path), f"is made for {title}", "give a LoRA for SD1, SD2 or SDXL")
    for key in header.entries:
        if not (is_bundled(key) or _MODULE.match(key) or is_dotted(key)):
            raise UserError.single(str(path), f"{key} is not a key of a LoRA", "give a LoRA file")


def _leaves(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of modules by module and leaf. Raises UserError if one is no module's."""
    leaves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not is_bundled(key):
            name, _, leaf = key.partition(".")
            known = _MODULE.match(name) and (leaf == "alpha" or kind_of({leaf: None}))
            if not known:
                raise UserError.single(str(path), f"{key} is not a key of a LoRA", "give a LoRA file")
            leaves.setdefault(name, {})[leaf] = tensor
    return leaves


def _wrong(name: str, leaves: Mapping[str, Tensor]) -> str | None:
    """What keeps a module from being used, as messages say it."""
    own = {leaf: tensor for leaf, tensor in leaves.items() if leaf != "alpha"}
    lacks = missing(own)
    if lacks is not None:
        return f"{name} lacks {lacks}"
    alpha = leaves.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        return f"{name}.alpha is {alpha.numel()} numbers"
    wrong = misfit(own)
    return wrong and f"{name} {wrong}"


def _canonical(name: str, *, sdxl: bool) -> str:
    if name.startswith("lycoris_") and _DIFFUSERS_BLOCKS.match(f"lora_unet_{name.removeprefix('lycoris_')}"):
        name = f"lora_unet_{name.removeprefix('lycoris_')}"
    if found := _TEXT.match(name):
        number = found[1] or ("1" if sdxl else "")
        number = "" if number == "1" and not sdxl else number
        level = "" if name[found.end() :].startswith(("text_model_", "text_projection")) else "text_model_"
        return f"lora_te{number}_{level}{name[found.end() :]}"
    if not sdxl or not name.startswith("lora_unet_"):
        return name
    try:
        return f"lora_unet_{sgm_key(diffusers_path(dotted(name.removeprefix('lora_unet_'))))}"
    except (ValueError, KeyError):
        return name


def _layout(raw: Mapping[str, Tensor]) -> Layout:
    if not any(map(is_dotted, raw)):
        return "kohya"
    return "diffusers" if any(map(is_older, raw)) else "peft"


def write(lora: Lora, path: Path, *, layout: Layout | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a LoRA file whole or not at all, with its hashes made anew (library.weights.save.save_lora).

    In the layout `peft` alphas stand in the metadata; `diffusers` has no place for them, so alpha / rank goes into the
    up-factors there. Metadata become those that `completed` tells.

    Args:
        layout: None keeps `lora.layout`.
        dtype: of all factors; None keeps each tensor's. Alphas are float32.

    Raises:
        UserError: the layout can't hold a module (LyCORIS kinds in peft's) or a bundled embedding, a number is not
            finite (in `dtype`), or the path has no known ending.
    """
    chosen = layout or lora.layout
    if path.suffix not in LORA_ENDINGS:
        raise UserError.single(str(path), "has no known ending", f"use {' or '.join(LORA_ENDINGS)}")
    refuse_not_finite(lora)
    if path.suffix != ".safetensors" and lora.metadata:
        warn(f"{path.suffix} files have no metadata; those of {lora.path.name} are left out of {path.name}")
    metadata = completed(lora, path)
    tensors: dict[str, Tensor] = {}
    if chosen in ("kohya", "kohya-diffusers"):
        tensors |= lora.rest
        for name, module in lora.modules.items():
            key = _spelled(name, chosen)
            tensors |= {f"{key}.{leaf}": _cast(tensor, dtype) for leaf, tensor in module.leaves.items()}
            if module.alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
    else:
        refuse_layout(lora, chosen)
        plain = [_plain(module, dtype) for module in lora.modules.values()]
        if chosen == "peft":
            tensors, settings = as_peft(plain, lora.path)
            metadata[SETTINGS] = json.dumps(settings, indent=2, sort_keys=True)
            if path.suffix != ".safetensors" and any(one.alpha != one.down.shape[0] for one in plain):
                wrong = "has no metadata, in which the layout peft keeps alphas"
                raise UserError.single(str(path), wrong, "write a .safetensors file, or the layout diffusers")
        else:
            tensors = as_older_diffusers(plain, lora.path, lambda up, scale: (up.double() * scale).to(up.dtype))
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size >= _SLOW:
        say(f"writing {path.name}, {size / 1e6:,.0f} MB")
    try:
        save_lora({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    except BadWeightsError as error:
        wrong = str(error).partition(": ")[2] or str(error)
        raise UserError.single(str(path), wrong, "the numbers don't fit into that dtype, use bf16 or float") from error


def completed(lora: Lora, path: Path) -> dict[str, str]:
    """The metadata that `write` puts into `path`, but for what belongs to its layout and its hashes.

    Without what was true of an older file only, and with what loaders look for: the base model, rank and alpha, where
    they lack, or where names and sizes tell of another family; and the name, where there is none.
    """
    metadata = {key: text for key, text in lora.metadata.items() if key not in (*STALE, SETTINGS)}
    family = family_of(lora)
    if family is not None:
        velocity = metadata.get("modelspec.prediction_type", "").startswith("v")
        version = family.versions["v_prediction" if velocity else "epsilon"]
        plain = all(module.is_plain for module in lora.modules.values())
        dim, alpha = ranks_and_alphas(lora.modules.values())
        told = {
            "ss_v2": str(family.v2),
            "ss_base_model_version": version,
            "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
            "ss_network_dim": dim,
            "ss_network_alpha": alpha,
            "ss_network_args": "{}",
        }
        if metadata.get("ss_base_model_version") not in family.versions.values():
            metadata.pop("ss_base_model_version", None)
        metadata = told | metadata | {"ss_v2": str(family.v2)}
    return metadata | {NAME: metadata.get(NAME) or path.stem}


def ranks_and_alphas(modules: Iterable[Module]) -> tuple[str, str]:
    """The rank and alpha of modules as metadata tell them, `Dynamic` where they differ or don't count; without an
    alpha, the rank counts."""
    pairs = [(rank, rank if module.alpha is None else module.alpha) for module in modules if (rank := rank_of(module))]
    ranks = {str(rank) for rank, _ in pairs}
    return shared(ranks), shared({alpha_text(alpha) for _, alpha in pairs})


def alpha_text(alpha: float) -> str:
    """An alpha as metadata have it, without the digits of its rounding: `4.0`."""
    return str(float(f"{alpha:.10g}"))


def shared(values: set[str]) -> str:
    """The only value, or `Dynamic`."""
    return next(iter(values)) if len(values) == 1 else DYNAMIC


def rank_of(module: Module) -> int | None:
    """The rank that alpha is divided by; None where it doesn't count, or LyCORIS has rules of its own."""
    for leaf in ("lora_down.weight", "hada_w1_b"):
        if leaf in module.leaves:
            return int(module.leaves[leaf].shape[0])
    return None


def refuse_not_finite(lora: Lora) -> None:
    """Raises UserError if a number of a file is NaN or infinite, alphas too."""
    leaves = ((f"{one.name}.{leaf}", tensor) for one in lora.modules.values() for leaf, tensor in one.leaves.items())
    bad = [key for key, tensor in leaves if not is_finite(tensor)]
    bad += [f"{one.name}.alpha" for one in lora.modules.values() if not math.isfinite(one.alpha or 0.0)]
    if bad:
        wrong = f"{len(bad)} of its tensors are not finite, e.g. {bad[0]}"
        raise UserError.single(str(lora.path), wrong, "the file is damaged")


def refuse_layout(lora: Lora, layout: Layout) -> None:
    """Raises UserError with everything that a layout has no place for."""
    if layout in ("kohya", "kohya-diffusers"):
        return
    where, kohya = str(lora.path), "keep it in the layout kohya"
    problems = []
    strange = [module for module in lora.modules.values() if not module.is_plain]
    if strange:
        wrong = f"{len(strange)} modules are no plain LoRA, e.g. {strange[0].name} ({kind_of(strange[0].leaves)})"
        able = all(kind_of(module.leaves) in EXACT for module in strange)
        advice = "make them plain: python tools/convert_lora.py --as_lora" if able else kohya
        problems.append(Problem(where, f"{wrong}, and the layout {layout} has no keys for them", advice))
    if odd := next((m for m in lora.modules.values() if not _weighs_outputs(m)), None):
        wrong = f"{odd.name} is a DoRA that weighs inputs, which the layout {layout} has no keys for"
        problems.append(Problem(where, wrong, kohya))
    if lora.rest:
        advice = f"take it apart: python tools/convert_embedding.py --to separate {lora.path.name} FOLDER"
        problems.append(Problem(where, f"has embeddings, for which the layout {layout} has no place", advice))
    if problems:
        raise UserError(problems)


def _weighs_outputs(module: Module) -> bool:
    size, up = module.leaves.get("dora_scale"), module.leaves.get("lora_up.weight")
    return size is None or up is None or (size.numel() == up.shape[0] == size.shape[0])


def _plain(module: Module, dtype: torch.dtype | None) -> Plain:
    have = {leaf: _cast(tensor, dtype) for leaf, tensor in module.leaves.items()}
    down = have["lora_down.weight"]
    alpha = float(down.shape[0]) if module.alpha is None else module.alpha
    return Plain(module.name, down, have["lora_up.weight"], alpha, have.get("dora_scale"))


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _spelled(name: str, layout: Layout) -> str:
    if layout == "kohya" or not name.startswith("lora_unet_"):
        return name
    return f"lora_unet_{diffusers_key(diffusers_path(dotted(name.removeprefix('lora_unet_'))))}"
