"""Whether `--network_weights` fits the base model and the network, told from the file's header. Imports no torch."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from library.errors import UserError
from library.models.info import ModelInfo
from library.models.lora_targets import targets
from library.models.pickles import read_weights
from networks.lora_args import LoraArgs
from networks.lora_file import fit
from networks.lora_keys import modules_of, spellings


@dataclass(frozen=True)
class _StandIn:
    """A tensor of a header: all that is asked of it is its shape."""

    shape: tuple[int, ...]

    def reshape(self, shape: tuple[int, ...]) -> "_StandIn":
        return _StandIn(tuple(shape))

    def __float__(self) -> float:
        return 1.0


def check_lora(path: Path, where: str, model: ModelInfo, network: LoraArgs | None, trained: Collection[str]) -> None:
    """Refuse what networks.lora would refuse after the model is loaded.

    Args:
        network: ranks of the network; None takes those of the file (`--dim_from_weights`).
        trained: the parts that are trained, `unet` and `text_encoder`.

    Raises:
        UserError: not a LoRA, damaged, made for another family, of another rank, or of modules that the model lacks or
            that aren't trained.
    """
    source = f"{where} {path}"
    header = read_weights(path, source)
    found = targets(model.unet_config, model.text_encoder_configs, conv=True, unet_key=model.family.unet_key)
    tensors = cast(dict[str, Any], {name: _StandIn(entry.shape) for name, entry in header.entries.items()})
    modules = modules_of(tensors, spellings(found, model.unet_config), source)
    known = {target.name: target for target in found}
    if not modules:
        raise UserError.single(source, "holds no LoRA", "give a LoRA file")
    strange = [name for name in modules if name not in known]
    if len(strange) == len(modules) or (strange and network is None):
        wrong = f"{len(strange)} of its {len(modules)} modules are not in this base model, e.g. {strange[0]}"
        raise UserError.single(source, wrong, "use a LoRA of the same model family")
    held = 0
    for name, module in modules.items():
        target = known.get(name)
        if target is None or (target.part not in trained and network is not None):
            continue
        rank: int | None = module.down.shape[0]
        if network is not None:
            rank = network.conv_dim if target.kernel == "3x3" or target.conv_only else network.dim
            rank = rank and (rank if target.kernel == "3x3" else network.dim)
        if rank:
            fit(module, target, rank, source)
            held += target.part in trained
    if not held:
        wrong = f"none of its {len(modules)} modules is in this network"
        raise UserError.single(source, wrong, f"it trains {' and '.join(trained)}; see --network_args for convolutions")
