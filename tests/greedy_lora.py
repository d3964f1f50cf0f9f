"""networks.lora as a module for which memory runs out in the third step, as torch's allocator says it on a CPU."""

from typing import Any

from networks import lora


class GreedyNetwork(lora.LoraNetwork):
    """Asks for what nobody has."""

    steps = 0

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


def create_network(*arguments: Any, **options: Any) -> Any:
    network = lora.create_network(*arguments, **options)
    network.__class__ = GreedyNetwork
    return network
