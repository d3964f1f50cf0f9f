"""A LoRA file of any program, as tools work on it: modules under the names that we write, and what else is in it.

`read` takes files of sd-scripts, LyCORIS, peft, diffusers and ours; `write` puts one down in the layout that it had, or
in another. What a module means as numbers is in `forms`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from library.embedding_layouts import is_bundled
from library.errors import UserError
from library.models.families import diffusers_key
from library.models.sgm_names import sgm_key
from library.weights.files import read_metadata
from library.weights.loras.keys import read_lora
from library.weights.loras.modules import refuse_embedding
from library.weights.loras.names import diffusers_path, dotted
from library.weights.save import save_lora

Layout = Literal["kohya", "kohya-diffusers", "peft", "diffusers"]
"""`kohya`: underscored names, SDXL's blocks in the original spelling; `kohya-diffusers`: the same with the blocks of
diffusers (SD1 and SD2 files are the same in both); `peft`: dotted paths with lora_A and lora_B; `diffusers`: the older
dotted paths with lora.down and lora.up."""
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
        """It has the two factors of a LoRA and nothing else."""
        return self.leaves.keys() == {"lora_down.weight", "lora_up.weight"}


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
    tensors = read_lora(path)
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    refuse_embedding({key: tuple(tensor.shape) for key, tensor in tensors.items()}, path)
    rest = {key: tensor for key, tensor in tensors.items() if is_bundled(key)}
    leaves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key not in rest:
            name, _, leaf = key.partition(".")
            leaves.setdefault(name, {})[leaf] = tensor
    if not leaves:
        raise UserError.single(str(path), "holds no LoRA", "give a LoRA file")
    sdxl = _is_sdxl(leaves, metadata)
    modules = {}
    for name, found in leaves.items():
        alpha = found.pop("alpha", None)
        ours = _canonical(name, sdxl=sdxl)
        modules[ours] = Module(ours, found, None if alpha is None else float(alpha))
    return Lora(path, _layout(path, leaves), modules, metadata, rest)


def _is_sdxl(names: Mapping[str, object], metadata: Mapping[str, str]) -> bool:
    if version := metadata.get("ss_base_model_version"):
        return version.startswith("sdxl")
    return any("te2_" in name or "transformer_blocks_1_" in name or "_blocks_4_1_" in name for name in names)


def _canonical(name: str, *, sdxl: bool) -> str:
    if name.startswith("lora_te1_") and not sdxl:
        return name.replace("lora_te1_", "lora_te_", 1)
    if not sdxl or not name.startswith("lora_unet_"):
        return name
    path = diffusers_path(dotted(name.removeprefix("lora_unet_")))
    return f"lora_unet_{sgm_key(path)}"


def _layout(path: Path, names: Mapping[str, object]) -> Layout:
    return "kohya-diffusers" if any(name.startswith("lora_unet_down_blocks") for name in names) else "kohya"


def write(lora: Lora, path: Path, *, layout: Layout | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a LoRA file whole or not at all, with its hashes made anew (library.weights.save.save_lora).

    Args:
        layout: None keeps `lora.layout`.
        dtype: of all factors; None keeps each tensor's. Alphas are float32.

    Raises:
        UserError: the layout can't hold a module (LyCORIS kinds in peft's), or the path has no known ending.
    """
    chosen = layout or lora.layout
    found = dict(lora.rest)
    for name, module in lora.modules.items():
        for leaf, tensor in module.leaves.items():
            found[f"{_spelled(name, chosen)}.{leaf}"] = tensor.contiguous() if dtype is None else tensor.to(dtype)
        if module.alpha is not None:
            found[f"{_spelled(name, chosen)}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
    save_lora(found, path, lora.metadata)


def _spelled(name: str, layout: Layout) -> str:
    if layout == "kohya" or not name.startswith("lora_unet_"):
        return name
    return f"lora_unet_{diffusers_key(diffusers_path(dotted(name.removeprefix('lora_unet_'))))}"
