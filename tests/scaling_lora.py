"""networks.lora as a module with which the loss is scaled as for float16, though the run computes in float32."""

from typing import Any

import torch

from networks.lora import create_network

__all__ = ["create_network"]

_plain = torch.amp.GradScaler


def _always_on(device: str, enabled: bool) -> Any:
    return _plain(device, enabled=True, init_scale=256.0)


torch.amp.GradScaler = _always_on
