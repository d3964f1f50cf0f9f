"""LoRA files of tiny models as other programs write them: sd-scripts' layout built from its documented rules, files of
peft and diffusers saved by these, modules of LyCORIS made by it; and what diffusers makes of a file, as an oracle.

Imports nothing of library.weights or networks, so that what those read and write is judged by others' words.
"""

import copy
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Damage = Literal["truncated", "nan", "header", "missing_up"]
Blocks = Literal["kohya", "diffusers"]
Part = Literal["unet", "text_encoder", "text_encoder_2"]

_LIERLA = ("Transformer2DModel",)
_C3LIER = (*_LIERLA, "ResnetBlock2D", "Downsample2D", "Upsample2D")
_TEXT = ("CLIPAttention", "CLIPMLP")
_CONV_ENDS = [
    *("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
]
_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)")
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}


def family(folder: Path) -> Literal["sd1", "sd2", "sdxl"]:
    """Which of the tiny models a diffusers folder is, by its U-Net's config."""
    config = json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") else "sd1"


def pipeline(folder: Path) -> Any:
    """The model as diffusers loads it, frozen; what a LoRA can be on is of the caller's own."""
    kept = _pipeline(folder)
    shared = [one for name, one in kept.components.items() if name not in parts(kept)]
    return copy.deepcopy(kept, {id(one): one for one in shared})


@lru_cache
def _pipeline(folder: Path) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    loaded = kind.from_pretrained(folder, local_files_only=True)
    for part in parts(loaded).values():
        part.requires_grad_(requires_grad=False)
    return loaded


def parts(loaded: Any) -> dict[Part, nn.Module]:
    """What of a pipeline a LoRA can be on."""
    names: tuple[Part, ...] = ("unet", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(loaded, name, None)) is not None}


def targets(
    folder: Path, *, conv: bool = False, blocks: Blocks = "kohya", text: bool = True
) -> Iterator[tuple[str, Part, str, nn.Module]]:
    """Every module that sd-scripts trains: its name in files, part, path in diffusers' model, and the module itself.

    `conv`: C3Lier's as well. `blocks`: SDXL's in the original spelling, or in diffusers' as some programs write them.
    """
    found = parts(_pipeline(folder))
    for part, model in found.items():
        if part == "unet":
            for path in _inside(model, _C3LIER if conv else _LIERLA):
                original = blocks == "kohya" and family(folder) == "sdxl"
                key = sgm_name(path) if original else path.replace(".", "_")
                yield f"lora_unet_{key}", part, path, model.get_submodule(path)
        elif text:
            number = "" if len(found) == 2 else "2" if part == "text_encoder_2" else "1"
            for path in _inside(model, _TEXT):
                key = f"text_model.{path.removeprefix('text_model.')}".replace(".", "_")
                yield f"lora_te{number}_{key}", part, path, model.get_submodule(path)


def _inside(model: nn.Module, containers: tuple[str, ...]) -> Iterator[str]:
    for name, container in model.named_modules():
        if type(container).__name__ in containers:
            for inner, module in container.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    yield f"{name}.{inner}"


def sgm_name(path: str) -> str:
    """A module of SDXL's U-Net as sd-scripts spells it, by the published table."""
    if found := _MIDDLE.fullmatch(path):
        kind, number, rest = found[1], int(found[2]), found[3]
        inner = rest.replace(".", "_") if kind == "attentions" else _RESNET[rest]
        return f"middle_block_{1 if kind == 'attentions' else 2 * number}_{inner}"
    found = _BLOCK.fullmatch(path)
    assert found is not None, path
    block, layer, rest = int(found[2]), int(found[4]), found[5]
    inner = rest.replace(".", "_")
    if found[1] == "down":
        match found[3]:
            case "resnets":
                return f"input_blocks_{3 * block + layer + 1}_0_{_RESNET[rest]}"
            case "attentions":
                return f"input_blocks_{3 * block + layer + 1}_1_{inner}"
            case _:
                return f"input_blocks_{3 * (block + 1)}_0_op"
    match found[3]:
        case "resnets":
            return f"output_blocks_{3 * block + layer}_0_{_RESNET[rest]}"
        case "attentions":
            return f"output_blocks_{3 * block + layer}_1_{inner}"
        case _:
            return f"output_blocks_{3 * block + 2}_2_conv"


def kohya_metadata(folder: Path, rank: int = 4, alpha: float = 2.0, conv_rank: int | None = None) -> dict[str, str]:
    """What sd-scripts writes into a file, as far as programs read it."""
    name = family(folder)
    arguments = {} if conv_rank is None else {"conv_dim": str(conv_rank), "conv_alpha": str(alpha)}
    return {
        "ss_v2": str(name == "sd2"),
        "ss_base_model_version": _VERSIONS[name],
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(arguments),
        "ss_output_name": "tiny",
        "ss_training_comment": "None",
        "ss_session_id": "1234",
        "ss_sd_model_name": folder.name,
        "ss_clip_skip": "None",
        "ss_resolution": "(64, 64)",
        "ss_dataset_dirs": json.dumps({"2_cat": {"n_repeats": 2, "img_count": 3}}),
        "ss_tag_frequency": json.dumps({"2_cat": {"cat": 3, "sitting": 2, "outdoors": 1}}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURES[name]}/lora",
        "modelspec.title": "tiny",
        "modelspec.hash_sha256": "0" * 64,
        "sshs_model_hash": "0" * 64,
        "sshs_legacy_hash": "0" * 8,
    }


def write_kohya(
    path: Path,
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 2.0,
    conv_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    alphas: bool = True,
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
    blocks: Blocks = "kohya",
    text: bool = True,
    scale: float = 0.1,
) -> Path:
    """A file as sd-scripts writes it for a tiny diffusers folder, with random factors; returns `path`.

    Args:
        conv_rank: of 3x3 convolutions (LoRA-C3Lier); None leaves out what only C3Lier trains.
        alphas: False leaves the alphas out, as some programs do (scale 1 then).
        metadata: None writes what sd-scripts writes; an empty one none.
        blocks: `diffusers` spells SDXL's blocks as diffusers does.
        scale: of the factors' numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, _, _, module in targets(folder, conv=conv_rank is not None, blocks=blocks, text=text):
        weight: Any = module.weight
        kernel = tuple(weight.shape[2:])
        own = conv_rank if kernel == (3, 3) and conv_rank else rank
        shapes = {
            "lora_down.weight": (own, weight.shape[1], *kernel),
            "lora_up.weight": (weight.shape[0], own, *(1 for _ in kernel)),
        }
        if alphas:
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
        for leaf, shape in shapes.items():
            tensors[f"{name}.{leaf}"] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    told = kohya_metadata(folder, rank, alpha, conv_rank) if metadata is None else dict(metadata)
    return _save(tensors, path, told)


def write_dora(path: Path, folder: Path, *, rank: int = 4, alpha: float = 2.0, seed: int = 0, **more: Any) -> Path:
    """The same with `dora_scale` (out, 1[, 1, 1]): the norms of what the LoRA makes of the weights, 20 % changed."""
    write_kohya(path, folder, rank=rank, alpha=alpha, seed=seed, **more)
    tensors, metadata = load_file(path), metadata_of(path)
    generator = torch.Generator().manual_seed(seed + 1)
    every = targets(folder, conv=True, blocks=more.get("blocks", "kohya"))
    for name, _, _, module in every:
        if f"{name}.lora_up.weight" in tensors:
            weight: Any = module.weight
            up, down = (tensors[f"{name}.lora_{way}.weight"].float() for way in ("up", "down"))
            change = (up.flatten(1) @ down.flatten(1)) * (alpha / down.shape[0])
            norms = (weight.flatten(1) + change).norm(dim=1)
            noise = 1 + 0.2 * torch.randn(norms.shape, generator=generator)
            ones = (1,) * (weight.ndim - 1)
            tensors[f"{name}.dora_scale"] = (norms * noise).view(-1, *ones).to(tensors[f"{name}.lora_up.weight"].dtype)
    return _save(tensors, path, metadata)


def write_peft(
    path: Path,
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 2.0,
    conv: bool = False,
    text: bool = True,
    adapter_metadata: bool = True,
    seed: int = 0,
    scale: float = 0.1,
    **config: Any,
) -> Path:
    """A file that peft and diffusers make: `add_adapter`, random factors, `save_lora_weights`; returns `path`.

    Args:
        conv: on residual blocks' convolutions as well.
        adapter_metadata: False leaves out the adapters' settings, as older versions do (scale 1 then).
        config: more for `peft.LoraConfig`, e.g. `use_dora=True`, `use_rslora=True`, `rank_pattern={...}`.
    """
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    loaded = _adapted(folder, rank, alpha, conv=conv, text=text, seed=seed, scale=scale, **config)
    layers, on = {}, {}
    for part, model in parts(loaded).items():
        if getattr(model, "peft_config", None):
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
            on[part] = model
    told = _collate_lora_metadata(on) if adapter_metadata else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    type(loaded).save_lora_weights(path.parent, weight_name=path.name, **layers, **told)
    return path


def write_old_diffusers(
    path: Path, folder: Path, *, rank: int = 4, seed: int = 0, processors: bool = False, scale: float = 0.1
) -> Path:
    """A file of attention layers as diffusers' training scripts write them: `lora.down`, `lora_linear_layer.down`.

    `processors`: the still older spelling of the U-Net's, `attn1.processor.to_q_lora.down.weight`. No alphas, no
    settings.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    names = ["to_q", "to_k", "to_v", "to_out.0"]
    loaded = _adapted(folder, rank, rank, target_modules=names, seed=seed, scale=scale)
    layers = {
        f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name="default"))
        for part, model in parts(loaded).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    type(loaded).save_lora_weights(path.parent, weight_name=path.name, **layers)
    if processors:
        older = re.compile(r"\.(attn[12])\.to_(q|k|v|out)(?:\.0)?\.lora\.(down|up)\.")
        renamed = {older.sub(r".\1.processor.to_\2_lora.\3.", key): t for key, t in load_file(path).items()}
        save_file(renamed, path, metadata_of(path))
    return path


def _adapted(
    folder: Path,
    rank: int,
    alpha: float,
    *,
    seed: int,
    scale: float,
    conv: bool = False,
    text: bool = True,
    target_modules: list[str] | None = None,
    **config: Any,
) -> Any:
    """A pipeline with adapters of peft that do something."""
    from peft import LoraConfig

    loaded = pipeline(folder)
    ends = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    ends += _CONV_ENDS if conv else []
    words = ["q_proj", "k_proj", "v_proj", "out_proj"] + ([] if target_modules else ["fc1", "fc2"])
    generator = torch.Generator().manual_seed(seed)
    for part, model in parts(loaded).items():
        if part == "unet" or text:
            chosen = (target_modules or ends) if part == "unet" else words
            settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, init_lora_weights=False, **config)
            adapted: Any = model
            adapted.add_adapter(settings)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator) if "lora_" in name else None
                    if noise is not None and "magnitude" in name:
                        parameter.mul_(1 + 0.2 * noise)
                    elif noise is not None:
                        parameter.copy_(noise * scale)
    return loaded


def lycoris_layers(
    folder: Path,
    algo: str,
    *,
    rank: int = 4,
    alpha: float = 2.0,
    conv: bool = True,
    text: bool = False,
    only: str = "",
    blocks: Blocks = "kohya",
    seed: int = 0,
    **args: Any,
) -> dict[str, Any]:
    """Modules of lycoris-lora on a tiny model's layers, filled with random numbers, by their name in files.

    Args:
        algo: `locon`, `loha`, `lokr`, `full`, `ia3`, `glora`, `diag-oft`, `boft`, `dylora`.
        only: a regular expression that names must match somewhere, to keep files small.
        args: for LyCORIS' class: `use_tucker=True`, `weight_decompose=True`, `decompose_both=True`, `factor=4` ...
    """
    kind = _lycoris_class(algo)
    torch.manual_seed(seed)
    found: dict[str, Any] = {}
    for name, _, _, module in targets(folder, conv=conv, blocks=blocks, text=text):
        if re.search(only, name):
            torch.manual_seed(seed)
            found[name] = layer = kind(name, copy.deepcopy(module), 1.0, rank, alpha, **args)
            generator = torch.Generator().manual_seed(seed + len(found))
            with torch.no_grad():
                for own, parameter in layer.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator) * 0.1
                    if own == "dora_scale":
                        parameter.mul_(1 + noise)
                    elif algo == "full":
                        parameter.add_(noise)
                    else:
                        parameter.copy_(noise)
    return found


def write_lycoris(
    path: Path,
    folder: Path,
    algo: str = "loha",
    *,
    rank: int = 4,
    alpha: float = 2.0,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    **args: Any,
) -> Path:
    """A file of `lycoris_layers` (its arguments), as LyCORIS names the tensors; returns `path`."""
    tensors = {
        f"{name}.{leaf}": tensor.detach().to(dtype).contiguous()
        for name, layer in lycoris_layers(folder, algo, rank=rank, alpha=alpha, **args).items()
        for leaf, tensor in layer.state_dict().items()
    }
    told = kohya_metadata(folder, rank, alpha) if metadata is None else dict(metadata)
    if metadata is None:
        told |= {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": algo})}
    return _save(tensors, path, told)


@lru_cache
def _lycoris_class(algo: str) -> Any:
    import logging

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    modules = importlib.import_module("lycoris.modules")
    names = {"diag-oft": "DiagOFTModule", "boft": "ButterflyOFTModule", "ia3": "IA3Module", "glora": "GLoRAModule"}
    names |= {"locon": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule", "full": "FullModule"}
    names |= {"dylora": "DyLoraModule", "norm": "NormModule"}
    return getattr(modules, names[algo])


def damage(path: Path, how: Damage) -> Path:
    """Spoil a file in place: cut off its end, write nonsense over its header, make a number NaN, or drop a factor."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif how == "header":
        path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])
    else:
        tensors, metadata = load_file(path), metadata_of(path)
        key = next(key for key in tensors if "lora_up" in key or "lora_B" in key or "lora.up" in key)
        if how == "nan":
            tensors[key].view(-1)[0] = float("nan")
        else:
            del tensors[key]
        save_file(tensors, path, metadata)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    """A file's metadata as the safetensors library reads them."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def base_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of the tiny model by `part.name`, as diffusers has them."""
    return _weights(_pipeline(folder))


def applied(path: Path, folder: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """The same after diffusers and peft have loaded a LoRA file and fused it."""
    loaded = pipeline(folder)
    loaded.load_lora_weights(path.parent, weight_name=path.name)
    on = [part for part, model in parts(loaded).items() if getattr(model, "peft_config", None)]
    loaded.fuse_lora(lora_scale=strength, components=on)
    loaded.unload_lora_weights()
    return _weights(loaded)


def _weights(loaded: Any) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor.detach()
        for part, model in parts(loaded).items()
        for name, tensor in model.state_dict().items()
    }


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    """`.safetensors`, or as torch saves it, which has no metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(dict(tensors), path, dict(metadata) or None)
    else:
        torch.save(dict(tensors), path)
    return path
