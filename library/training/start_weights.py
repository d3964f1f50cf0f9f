"""Whether weight files that a run starts from fit the base model and the network, told from their headers: no torch."""

from collections.abc import Collection, Iterator
from pathlib import Path

from library.errors import Problem, UserError
from library.models.info import ModelInfo
from library.options import Options
from library.options.modules import LYCORIS, find_module
from library.weights.loras.header import header_modules, lycoris_modules
from library.weights.loras.modules import FileModule, fit, fit_magnitudes
from networks.blocks import shaped
from networks.lora_args import LoraArgs
from networks.planned import all_targets

_FAMILY = "use a LoRA of the same model family"


def check_lora(path: Path, where: str, model: ModelInfo, network: LoraArgs | None, trained: Collection[str]) -> None:
    """Refuse what networks.lora would refuse after the model is loaded.

    Args:
        network: the network's settings; None takes ranks and kinds of the file (`--dim_from_weights`).
        trained: the parts that are trained, `unet` and `text_encoder`.

    Raises:
        UserError: not a LoRA, damaged, made for another family, of another rank or kind, or of modules that the model
            lacks or that aren't trained.
    """
    source = f"{where} {path}"
    modules = _known_modules(path, source, model, strict=network is None)
    found = all_targets(model)
    if network is None:
        ranks = {target: modules[target.name].down.shape[0] for target in found if target.name in modules}
    else:
        mine = [target for target in found if target.part in trained]
        ranks = {target: rank for target, rank, _ in shaped(mine, network, model.family.blocks)}
    held = 0
    for target, rank in ranks.items():
        module = modules.get(target.name)
        if module is None:
            continue
        fit(module, target, rank, source)
        if fit_magnitudes(module, target, source) is not None and network is not None and not network.dora:
            wrong = f"{target.name} is a DoRA there, and the network is none"
            raise UserError.single(source, wrong, "add dora=true to --network_args")
        held += target.part in trained
    if not held:
        wrong = f"none of its {len(modules)} modules is in this network"
        raise UserError.single(source, wrong, f"it trains {' and '.join(trained)}; see --network_args for convolutions")


def check_base_weights(options: Options, model: ModelInfo) -> Iterator[Problem]:
    """What is wrong with `--base_weights`: files of LoRA, DoRA or LyCORIS, of which every module must be in the model.

    Of LyCORIS' files, which may hold norms and other layers that no LoRA has, only whether any is; the rest is told
    when the model is there (networks.foreign).
    """
    files, strengths = options.network.base_weights or (), options.network.base_weights_multiplier or ()
    where = options.where("base_weights")
    if files and len(strengths) > len(files):
        wrong = f"{len(strengths)} strengths for {len(files)} files"
        yield Problem(options.where("base_weights_multiplier"), wrong, "give one for each file of --base_weights")
    for file in files:
        path = Path(file)
        if not path.is_file():
            yield Problem(where, f"there is no file {path}")
            continue
        source = f"{where} {path}"
        try:
            if found := lycoris_modules(path, source):
                yield from _lycoris(*found, source, model)
                continue
            modules = _known_modules(path, source, model, strict=True)
            for target in all_targets(model):
                if module := modules.get(target.name):
                    fit(module, target, module.down.shape[0], source)
                    fit_magnitudes(module, target, source)
        except UserError as error:
            yield from error.problems


def _lycoris(kind: str, names: Collection[str], source: str, model: ModelInfo) -> Iterator[Problem]:
    if find_module(LYCORIS):
        yield Problem(source, f"is {kind}, and LyCORIS isn't installed", "pip install 'lorasmith[lycoris]'")
    known = {target.name for target in all_targets(model)}
    if known.isdisjoint(names):
        wrong = f"is {kind}, and none of its {len(names)} modules is in this base model, e.g. {min(names)}"
        yield Problem(source, wrong, "use a file of the same model family")


def _known_modules(path: Path, source: str, model: ModelInfo, *, strict: bool) -> dict[str, FileModule]:
    """The modules of a file. `strict`: the model must have all of them, not only some.

    Raises:
        UserError: it is no LoRA, or one for another model.
    """
    modules = header_modules(path, source, model)
    known = {target.name for target in all_targets(model)}
    if not modules:
        raise UserError.single(source, "holds no LoRA", "give a LoRA file")
    strange = [name for name in modules if name not in known]
    if len(strange) == len(modules) or (strange and strict):
        wrong = f"{len(strange)} of its {len(modules)} modules are not in this base model, e.g. {strange[0]}"
        raise UserError.single(source, wrong, _FAMILY)
    return modules
