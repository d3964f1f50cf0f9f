"""Putting a network module of any origin on a model, by the calls that such modules expect."""

from typing import Any

import torch

from library.errors import UserError
from library.global_draws import seed_global_generators
from library.models.model import Model
from library.training.prepare import Prepared
from library.training.prepare_checks import needs_strength
from library.training.trainable import ForeignTrainable, NetworkTrainable
from networks import foreign
from networks.facade import text_encoder_facade, unet_facade

OWN = "networks."
_COMPLAINTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def attach_network(prepared: Prepared, model: Model, device: torch.device) -> NetworkTrainable:
    """Create the network, put it on the model and load what it starts from.

    Raises:
        UserError: the module can't make a network of these arguments, or the weights don't fit it.
    """
    options = prepared.options.network
    own = str(options.network_module).startswith(OWN)
    unet, text_encoder = model.unet, model.network_text_encoder
    if not own:
        unet, text_encoder = unet_facade(unet), text_encoder_facade(text_encoder)
        model.suit_foreign_networks()
    network = _create(prepared, model, unet, text_encoder, own)
    if options.scale_weight_norms is not None and not hasattr(network, "apply_max_norm_regularization"):
        wrong = f"{options.network_module} can't bound the norms of its modules"
        raise UserError.single(prepared.options.where("scale_weight_norms"), wrong, "leave it out")
    kind = NetworkTrainable if own else ForeignTrainable
    trainable = kind(network, unet, text_encoder, prepared.rates, prepared.options.optimizer.learning_rate)
    if options.network_weights and (own or not options.dim_from_weights):
        trainable.load_weights(options.network_weights)
    trainable.to(device)
    if checkpoint(prepared, model):
        trainable.enable_gradient_checkpointing()
    trainable.prepare()
    if needs_strength(prepared.plan):
        trainable.set_multiplier(0.0)
        trainable.set_multiplier(1.0)
    return trainable


def checkpoint(prepared: Prepared, model: Model) -> bool:
    """`--gradient_checkpointing` of the model itself; whether it is asked for."""
    flags = prepared.options.model
    if flags.gradient_checkpointing:
        model.enable_gradient_checkpointing(
            flags.gradient_checkpointing_every, flags.gradient_checkpointing_attention_only
        )
    return flags.gradient_checkpointing


def _create(prepared: Prepared, model: Model, unet: Any, text_encoder: Any, own: bool) -> Any:
    """The network, not yet on the model; what a foreign module complains about becomes one message."""
    options = prepared.options.network
    name = str(options.network_module)
    module = foreign.load(name)
    seed_global_generators(prepared.seed, -1)
    given = foreign.arguments(name, prepared.options.network_arguments())
    arguments: dict[str, Any] = {"dropout": options.network_dropout, **given}
    if own:
        arguments["seed"] = prepared.seed
    models = (model.vae, text_encoder, unet)
    shape = (options.network_dim, options.network_alpha)
    try:
        if options.dim_from_weights and options.network_weights:
            file = str(options.network_weights)
            network, _ = module.create_network_from_weights(1.0, file, *models, **arguments)
        else:
            dropout = options.network_dropout
            network = module.create_network(1.0, *shape, *models, neuron_dropout=dropout, **arguments)
    except _COMPLAINTS as fault:
        if own:
            raise
        wrong = f"{name} can't make this network: {type(fault).__name__} {fault}".strip()
        raise UserError.single("--network_args", wrong, "check them against the module's own documentation") from fault
    if network is None:
        raise UserError.single("--network_module", f"{name} made no network for this model", "check --network_args")
    return network
