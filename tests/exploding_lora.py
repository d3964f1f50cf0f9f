"""networks.lora as a module whose gradients turn to NaN while the loss stays finite."""

from typing import Any

from networks import lora


def create_network(*arguments: Any, **options: Any) -> Any:
    network = lora.create_network(*arguments, **options)
    for layer in network._built:
        for parameter in layer.parameters():
            parameter.register_hook(lambda gradient: gradient * float("nan"))
    return network
