"""Writing a base model as a diffusers folder: weights part by part, configs, scheduler, tokenizers and the index.

The folder is made under a temporary name and gets its own when it is whole.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.models.families import Part, TextEncoder
from library.models.folder import INDEX, SCHEDULER, read_json
from library.models.hub import Wanted
from library.models.info import ModelInfo
from library.models.single_configs import packaged
from library.models.tensors import Reader
from library.tokenizer import END_ID, special_padding, write_folder
from library.weights.checkpoints.layouts import THREADS, Held, planned
from library.weights.checkpoints.opened import BaseModel
from library.weights.checkpoints.stream import Planned, check_room, write_stream
from library.weights.outputs import folder_problems, new_folder

_TOKENIZERS: Mapping[Part, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_WHOLE_BYTES = 4


def write_model(
    model: BaseModel,
    tensors: Mapping[Part, Mapping[str, Held]],
    path: Path,
    reader: Reader,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    reference: Path | None = None,
) -> None:
    """Write the model as a new diffusers folder, which diffusers' pipelines load without a network.

    Args:
        dtype: of the weights; None keeps what is stored.
        variant: stands in the names of the weight files, such as `fp16`.
        reference: a diffusers folder whose tokenizers and scheduler are taken.

    Raises:
        UserError: the folder is there already, no room for it, or the reference can't be read.
    """
    if problems := list(folder_problems(path, "dst")):
        raise UserError(problems)
    info = model.info
    scheduler = scheduler_config(info, reference)
    plan = {part: as_part(inside, part, reader, dtype) for part, inside in tensors.items()}
    check_room(path, sum(one.size for found in plan.values() for one in found))
    with new_folder(path) as folder:
        folder.mkdir()
        for part, found in plan.items():
            (folder / part).mkdir()
            middle = f".{variant}" if variant else ""
            stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
            file = folder / part / f"{stem}{middle}.safetensors"
            write_stream(found, file, {"format": "pt"}, f"writing {part}", threads=THREADS)
            write_json(folder / part / "config.json", _config(info, part, found))
        write_json(folder / SCHEDULER, scheduler)
        for encoder in info.family.text_encoders:
            _tokenizer(folder / _TOKENIZERS[encoder.part], encoder, _own(info, encoder, reference))
        write_json(folder / INDEX, _index(info, str(scheduler["_class_name"])))


def as_part(tensors: Mapping[str, Held], part: Part, reader: Reader, dtype: torch.dtype | None) -> list[Planned]:
    """A part's own file in a diffusers folder, with the level `text_model.` that every loader knows.

    Args:
        dtype: None keeps what is stored.
    """
    return [
        planned(_folder_name(part, name), (one,), one.shape, dtype, partial(one.read, reader))
        for name, one in tensors.items()
    ]


def _folder_name(part: Part, name: str) -> str:
    plain = part in ("unet", "vae") or name.startswith("text_projection.")
    return name if plain else f"text_model.{name}"


def scheduler_config(info: ModelInfo, reference: Path | None) -> dict[str, Any]:
    """The scheduler's config: the reference's or the model's own, with what the model is known to predict.

    A schedule that ends in pure noise is sampled from its very end, where the config of a file says nothing else.
    """
    base = read_json(reference / SCHEDULER, "--reference_model") if reference else info.scheduler_config
    found = {"_class_name": "DDIMScheduler"} | base
    found["rescale_betas_zero_snr"] = info.zero_terminal_snr
    if info.prediction_type is not None:
        found["prediction_type"] = info.prediction_type
    if info.zero_terminal_snr and info.layout == "single_file":
        found["timestep_spacing"] = "trailing"
    return found


def reference_files(info: ModelInfo) -> Wanted:
    """What is wanted of a hub model that is a reference: its scheduler's config and tokenizers."""
    folders = [_TOKENIZERS[encoder.part] for encoder in info.family.text_encoders]
    needed = {SCHEDULER, *(f"{name}/{file}" for name in folders for file in ("vocab.json", "merges.txt"))}

    def wanted(names: Collection[str], _index: Mapping[str, Any]) -> list[str] | None:
        if not needed <= set(names):
            return None
        return sorted(name for name in names if name in (INDEX, SCHEDULER) or name.partition("/")[0] in folders)

    return wanted


def check_reference(path: Path, info: ModelInfo) -> None:
    """Refuse a reference that lacks what is to be taken from it.

    Raises:
        UserError: it is no diffusers folder, or has no scheduler or tokenizer.
    """
    flag = f"--reference_model {path}"
    if not path.is_dir():
        raise UserError.single(
            flag, "is no diffusers folder", "a new folder takes its tokenizers and scheduler from one"
        )
    names = [SCHEDULER, *(_TOKENIZERS[encoder.part] for encoder in info.family.text_encoders)]
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise UserError.single(flag, f"lacks {', '.join(missing)}", "leave it out: the usual ones are packaged")


def _own(info: ModelInfo, encoder: TextEncoder, reference: Path | None) -> Path | None:
    """The tokenizer that is copied, if any."""
    folder = reference or (info.path if info.layout == "folder" else None)
    name = _TOKENIZERS[encoder.part]
    return folder / name if folder and (folder / name).is_dir() else None


def _tokenizer(folder: Path, encoder: TextEncoder, own: Path | None) -> None:
    """CLIP's tokenizer, with the token that this encoder's rows are filled up with; or a copy of the model's own."""
    if own is not None:
        shutil.copytree(own, folder)
        return
    write_folder(folder)
    if encoder.pad_id != END_ID:
        file = folder / "tokenizer_config.json"
        (token,) = special_padding(encoder.pad_id)
        write_json(file, read_json(file, str(file)) | {"pad_token": token})


def _config(info: ModelInfo, part: Part, tensors: list[Planned]) -> dict[str, Any]:
    """A part's config as its loader wants it."""
    if part in ("unet", "vae"):
        kind = packaged(info.family.name, part)["_class_name"]
        return {"_class_name": kind, "_diffusers_version": version("diffusers")} | info.parts[part].config
    found = {"architectures": packaged(info.family.name, part)["architectures"]} | info.parts[part].config
    return found | loaded_whole(one.dtype for one in tensors)


def loaded_whole(dtypes: Iterable[torch.dtype]) -> dict[str, str]:
    """What the config of a text encoder needs whose weights are stored in these dtypes.

    Transformers loads halves as such unasked, while diffusers makes U-Net and VAE float32: a pipeline of both fails.
    """
    return {"dtype": "float32"} if any(dtype.itemsize < _WHOLE_BYTES for dtype in dtypes) else {}


def _index(info: ModelInfo, scheduler: str) -> dict[str, Any]:
    """`model_index.json`: which class each part is."""
    family = info.family
    several = len(family.text_encoders) > 1
    found: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if several else "StableDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for part in ("unet", "vae"):
        found[part] = ["diffusers", packaged(family.name, part)["_class_name"]]
    for encoder in family.text_encoders:
        found[encoder.part] = ["transformers", packaged(family.name, encoder.part)["architectures"][0]]
        found[_TOKENIZERS[encoder.part]] = ["transformers", "CLIPTokenizer"]
    if several:
        return found | {"force_zeros_for_empty_prompt": True}
    return found | {"safety_checker": [None, None], "requires_safety_checker": False}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a config, its keys in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n", encoding="utf-8")
