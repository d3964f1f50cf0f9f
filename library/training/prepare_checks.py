"""What of a run's options, base model and data don't go together: problems that end it, and lines to say. Imports no
torch. In which order they are looked at is library.training.prepare's.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from library.data.faces import face_of
from library.data.plan import Plan
from library.errors import Problem
from library.models.info import ModelInfo
from library.models.pickles import SUFFIXES, read_weights
from library.options import Options
from library.options.modules import read_settings
from library.options.specs import PRESERVE
from library.training.learning_rates import learning_rates
from library.training.prepare_data import Collector, Data
from library.training.start_weights import check_base_weights, check_lora
from library.weights.loras.modules import refuse_embedding
from networks.blocks import block_notices, block_problems
from networks.lora_args import parse as parse_lora
from networks.oft_targets import oft_targets
from networks.oft_targets import problems as oft_problems
from networks.planned import all_targets

_LORA_FILES = ("networks.lora", "networks.lora_fa", "networks.dylora")
"""Modules whose files are plain LoRA files."""


def text_problems(options: Options, model: ModelInfo) -> list[Problem]:
    """What the model's text encoders don't have."""
    problems = []
    configs, rates = model.text_encoder_configs, options.optimizer.text_encoder_lr or ()
    if len(rates) > len(configs):
        wrong = f"{len(rates)} learning rates, but {model.family.title} models have one text encoder"
        problems.append(Problem(options.where("text_encoder_lr"), wrong, "give one"))
    return problems


def check_network(options: Options, model: ModelInfo, collect: Collector, notices: list[str]) -> None:
    """The network's settings and the weights that it starts from, against the base model; nothing without a network."""
    if options.network.network_module is None:
        return
    module, given = options.network.network_module, options.network_arguments()
    where = options.where("network_args")
    blocks = list(block_problems(given, model.family, module, where))
    collect.problems += blocks
    notices += block_notices(given, model.family, module, where)
    if module == "networks.oft":
        collect.problems += _oft_problems(options, model)
    weights = options.network.network_weights
    if weights is not None and weights.is_file() and not blocks:
        collect.attempt(partial(_check_weights, options, weights, model))
    collect.problems += check_base_weights(options, model)


def _oft_problems(options: Options, model: ModelInfo) -> Iterator[Problem]:
    """Widths of the model that can't be cut into as many blocks."""
    given = options.network_arguments()
    settings = read_settings("networks.oft", given, lambda name: f"--network_args {name}")
    if settings.problems:
        return
    every, conv = (bool(settings.values.get(name)) for name in ("enable_all_linear", "enable_conv"))
    chosen = oft_targets(all_targets(model), every_linear=every, conv=conv)
    yield from oft_problems(chosen, parse_lora(options.network.network_dim, None, {}, module="networks.oft").dim)


def _check_weights(options: Options, weights: Path, model: ModelInfo) -> None:
    """`--network_weights`, as far as its header tells whether it fits."""
    network, where = options.network, options.where("network_weights")
    if network.network_module not in _LORA_FILES:
        if weights.suffix.lower() in (".safetensors", *SUFFIXES):
            source = f"{where} {weights}"
            entries = read_weights(weights, source).entries
            refuse_embedding({name: entry.shape for name, entry in entries.items()}, source)
        return
    module, given = str(network.network_module), options.network_arguments()
    if network.dim_from_weights:
        parse_lora(None, None, given, module=module, from_file=True)
    shape = parse_lora(network.network_dim, network.network_alpha, given, module=module)
    trained = learning_rates(options, len(model.text_encoder_configs)).trained
    check_lora(weights, where, model, None if network.dim_from_weights else shape, trained)


def without_effect(options: Options, model: ModelInfo) -> Iterator[str]:
    """Lines about flags that do nothing for this family."""
    if model.zero_terminal_snr and model.prediction_type == "epsilon":
        yield (
            "zero terminal SNR with a model that predicts noise: its last timestep teaches nothing, and previews are "
            "drawn on the plain schedule; --v_parameterization is for models that predict velocity"
        )
    if options.model.variant and model.layout == "single_file":
        yield "--variant: has no effect, the base model is a single file"
    skip = options.model.clip_skip
    if skip is not None and skip not in model.family.usual_clip_skips:
        usual = " or ".join(str(one) for one in model.family.usual_clip_skips)
        yield f"--clip_skip {skip}: {model.family.title} models are made for {usual}, and other programs take that"
    if options.dataset.exact_crop_conditioning and not model.family.takes_sizes:
        yield f"--exact_crop_conditioning: has no effect, {model.family.title} models aren't told sizes and crops"


def needs_strength(plan: Plan) -> bool:
    """Whether what is trained must be able to act at another strength than 1."""
    specs = [dataset.spec for dataset in plan.datasets]
    kept = any(subset.custom_attributes.get(PRESERVE) for spec in specs for subset in spec.subsets)
    return kept or any(spec.network_multiplier != 1 for spec in specs)


def strength_problems(options: Options, plan: Plan) -> Iterator[Problem]:
    """LyCORIS' DoRA has no strength between none and all, vectors of embeddings have none at all."""
    if options.network.network_module is None:
        specs = [dataset.spec for dataset in plan.datasets]
        found = {spec.where: "network_multiplier" for spec in specs if spec.network_multiplier != 1}
        for subset in (subset for spec in specs for subset in spec.subsets if subset.custom_attributes.get(PRESERVE)):
            found[subset.where] = PRESERVE
        for where, key in found.items():
            yield Problem(where, f"{key} changes a network's strength, and vectors have none", "leave it out")
        return
    decomposed = options.network_arguments().get("dora_wd", "False").lower() not in ("false", "0", "none")
    foreign = not options.network.network_module.startswith("networks.")
    other = any(dataset.spec.network_multiplier not in (0, 1) for dataset in plan.datasets)
    if foreign and decomposed and other:
        wrong = "a network with dora_wd acts wholly or not at all, so that no other network_multiplier can be had"
        yield Problem(options.where("network_args"), wrong, "leave out one of the two")


def has_masks(options: Options, data: Data) -> bool:
    """Whether losses may be masked: by a picture's mask, its alpha channel, or what a class of datasets gives."""
    alpha = any(subset.alpha_mask for spec in data.specs for subset in spec.subsets)
    records = data.plan.records + (data.held_out.records if data.held_out else ())
    return alpha or options.dataset.dataset_class is not None or any(record.mask for record in records)


def unused_data_flags(options: Options, data: Data) -> Iterator[str]:
    """Lines about flags of the data that find nothing to work on."""
    flags = options.dataset
    everything = data.plan.records + (data.held_out.records if data.held_out else ())
    if flags.masked_loss and not has_masks(options, data):
        yield f"{options.where('masked_loss')}: has no effect, no picture has a mask"
    if data.held_out is None:
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "validation_seed"):
            if options.value(name) is not None:
                yield f"{options.where(name)}: has no effect without held-out pictures (--validation_split)"
    faces = {(one.dataset, one.subset) for one in everything if face_of(one.key)} if _crops_faces(data) else set()
    for number, spec in enumerate(data.specs):
        for place, subset in enumerate(spec.subsets):
            if subset.face_crop_aug_range and (number, place) not in faces:
                yield f"{subset.where}: face_crop_aug_range has no effect, no name tells a face (tools/detect_faces.py)"
    cached = options.caching.cache_latents
    if cached and any(subset.keep_in_memory for spec in data.specs for subset in spec.subsets):
        yield "keep_in_memory: has no effect with cached latents"


def watching_problems(options: Options, data: Data) -> Iterator[Problem]:
    """An early stop needs something to look at."""
    if options.training.early_stopping_patience is not None and data.held_out is None:
        wrong = "needs held-out pictures, whose loss tells when to stop"
        yield Problem(options.where("early_stopping_patience"), wrong, "add --validation_split 0.1")


def _crops_faces(data: Data) -> bool:
    return any(subset.face_crop_aug_range for spec in data.specs for subset in spec.subsets)
