"""What a run will train, from options, the base model's configs and the plan of its embeddings: modules of the network,
parameter groups, and which part of the model would be left without any. Imports no torch.
"""

from collections.abc import Sequence

from library.errors import UserError
from library.models.info import ModelInfo
from library.models.lora_targets import LoraTarget, Shape
from library.options import Options
from library.training.embedding_plan import EmbeddingPlan
from library.training.learning_rates import LearningRates
from networks.lora_args import LoraArgs
from networks.lora_args import parse as parse_lora
from networks.planned import Planned, PlannedGroup, planned, planned_from_file, planned_groups

EMBEDDING = "embedding"
"""The name of the group that holds the vectors of all new tokens."""
_NAMES = {"unet": "the U-Net", "text_encoder": "the text encoder"}
_WITHOUT_ARGS = ("networks.oft",)
"""Modules of ours whose settings aren't those of networks.lora; they have one group for a model."""


def expected_modules(options: Options, model: ModelInfo, rates: LearningRates) -> tuple[Planned, ...] | None:
    """Every module that will be trained, none without a network; None for a network that isn't ours.

    Raises:
        UserError: the settings, or the file of `--dim_from_weights`, can't be read.
    """
    network, parts = options.network, rates.trained
    module, file = network.network_module, network.network_weights
    if module is None:
        return ()
    if network.dim_from_weights and file is not None:
        return planned_from_file(module, file, options.where("network_weights"), model, parts)
    return planned(module, network.network_dim, network.network_alpha, options.network_arguments(), model, parts)


def expected_groups(
    options: Options, model: ModelInfo, rates: LearningRates, embeddings: EmbeddingPlan | None = None
) -> list[PlannedGroup] | None:
    """The parameter groups that the run will have: those of the network's modules, then that of the vectors. None for a
    network that isn't ours.

    Raises:
        UserError: see `expected_modules`.
    """
    rows = expected_modules(options, model, rates)
    if rows is None:
        return None

    def rate_of(target: LoraTarget) -> float:
        return rates.unet if target.part == "unet" else rates.text_encoders[target.encoder]

    network = planned_groups(rows, rate_of, _settings(options), model.family.blocks) if rows else []
    return [*network, *embedding_groups(model, embeddings)]


def vector_shapes(model: ModelInfo, embeddings: EmbeddingPlan | None) -> tuple[Shape, ...]:
    """(vectors, width) of what is trained of each new token in each text encoder."""
    trained = embeddings.trained if embeddings else ()
    return tuple((one.token.vectors, width) for width in model.text_widths for one in trained)


def embedding_groups(model: ModelInfo, embeddings: EmbeddingPlan | None) -> list[PlannedGroup]:
    """The one group of all vectors that are trained; none where none are."""
    shapes = vector_shapes(model, embeddings)
    return [PlannedGroup(EMBEDDING, embeddings.rate, shapes)] if embeddings and shapes else []


def _settings(options: Options) -> LoraArgs:
    network, module = options.network, str(options.network.network_module)
    if module in _WITHOUT_ARGS:
        return LoraArgs(1, 1.0)
    return parse_lora(network.network_dim, network.network_alpha, options.network_arguments(), module=module)


def untrained(options: Options, model: ModelInfo, rates: LearningRates) -> list[str]:
    """A line for each part of the model that has a learning rate but no module, while the other one is trained; none
    without a network.

    Raises:
        UserError: no part has a rate or a module that is trained, or see `expected_modules`.
    """
    if options.network.network_module is None:
        return []
    if not rates.trained:
        advice = "give --unet_lr or --text_encoder_lr a value above 0"
        raise UserError.single("--learning_rate", "there is nothing to train", advice)
    groups = expected_groups(options, model, rates)
    if groups is None:
        return []
    held = {"unet" if group.name.startswith("unet") else "text_encoder" for group in groups}
    lines = [f"{_source(options)}: {_NAMES[part]} isn't trained, {_why(options)}" for part in _without(rates, held)]
    if not held:
        wrong = f"nothing is left to train, {_why(options)}"
        raise UserError.single(_source(options), wrong, "raise a rank or a weight above 0, or train another part")
    return lines


def _without(rates: LearningRates, held: set[str]) -> Sequence[str]:
    return [part for part in rates.trained if part not in held]


def _source(options: Options) -> str:
    return options.where("network_weights" if options.network.dim_from_weights else "network_args")


def _why(options: Options) -> str:
    if options.network.dim_from_weights:
        return "because the file holds no module of it, or its weights are 0"
    return "because the ranks or the weights of all its blocks are 0"
