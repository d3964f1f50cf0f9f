"""Compiling the U-Net's residual and transformer blocks in place, each by itself, for the training step only.

Blocks of one shape share what is compiled, so a U-Net costs a dozen graphs or two for each size of picture and batch,
not one huge one. Modules keep their identity, so adapters inside them, checkpointing and the names in state dicts stay
as they are. What runs without gradients (previews, validation) is not compiled: it would need graphs of its own.
"""

import shutil
import time
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from library.errors import UserError, nearest

_GRAPHS = 1024
"""How many graphs one kind of block may have: more than blocks times sizes of buckets ever are."""


def check_backend(backend: str, device: torch.device) -> None:
    """Before a model is loaded, whether torch has this compiler here.

    Raises:
        UserError: it doesn't, or lacks what it needs.
    """
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        advice = nearest(backend, known) or "use inductor"
        raise UserError.single("--dynamo_backend", f"torch {torch.__version__} has no compiler {backend} here", advice)
    if backend == "cudagraphs" and device.type != "cuda":
        raise UserError.single("--dynamo_backend", "cudagraphs needs CUDA", "use inductor")
    if backend != "inductor":
        return
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError.single("--torch_compile", "inductor needs a C++ compiler here", "install g++, or leave it out")
    if device.type == "cuda" and find_spec("triton") is None:
        wrong = "inductor needs the package triton on CUDA"
        raise UserError.single("--torch_compile", wrong, "pip install triton, or leave it out")


class CompileTimes:
    """How long torch compiled since this was made, whoever asked for it. torch tells of one compilation at a time."""

    def __init__(self) -> None:
        from torch._dynamo.callback import on_compile_end, on_compile_start

        self.seconds, self.count = 0.0, 0
        self._started, self._told = 0.0, 0
        on_compile_start(self._start)
        on_compile_end(self._end)

    def _start(self, _: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        self.count += 1

    def news(self) -> str | None:
        """One line with all so far, or None where nothing was compiled since the last call."""
        if self.count == self._told:
            return None
        self._told = self.count
        return f"compiled {self.count} graphs in {self.seconds:.1f} s so far"

    def close(self) -> None:
        """Count no further."""
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)


def compile_blocks(unet: nn.Module, backend: str) -> int:
    """Let each block of the U-Net be compiled at its first call for each size that it sees.

    Call it when adapters are attached, as they are at each call: their factors are inputs of the graphs, their scales
    and strengths numbers in them.

    Returns:
        How many blocks there are.
    """
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _GRAPHS)
    blocks = [one for one in unet.modules() if isinstance(one, BasicTransformerBlock | ResnetBlock2D)]
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


def uncompiled() -> AbstractContextManager[Any]:
    """Blocks run as they are inside of this, whether or not they were compiled."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
