"""Putting a network module of any origin on a model, by the calls that such modules expect."""

import importlib
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.models.sd1 import Model
from library.training.loop import seed_foreign_generators
from library.training.prepare import Prepared
from library.training.trainable import NetworkTrainable


def attach_network(prepared: Prepared, model: Model, device: torch.device) -> NetworkTrainable:
    """Create the network, put it on the model and load what it starts from."""
    options = prepared.options.network
    name = str(options.network_module)
    module = importlib.import_module(name)
    seed_foreign_generators(prepared.seed, -1)
    arguments: dict[str, Any] = {"dropout": options.network_dropout, **prepared.options.network_arguments()}
    if name.startswith("networks."):
        arguments["seed"] = prepared.seed
    weights = options.network_weights
    if options.dim_from_weights and weights:
        network, _ = module.create_network_from_weights(
            1.0, str(weights), model.vae, model.network_text_encoder, model.unet, **arguments
        )
    else:
        network = module.create_network(
            1.0,
            options.network_dim,
            options.network_alpha,
            model.vae,
            model.network_text_encoder,
            model.unet,
            neuron_dropout=options.network_dropout,
            **arguments,
        )
    if network is None:
        raise UserError.single("--network_module", f"{name} made no network for this model", "check --network_args")
    trainable = NetworkTrainable(
        network, model.unet, model.network_text_encoder, prepared.rates, prepared.options.optimizer.learning_rate
    )
    if weights:
        trainable.load_weights(Path(weights))
    trainable.to(device)
    if prepared.options.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        trainable.enable_gradient_checkpointing()
    trainable.prepare()
    return trainable
