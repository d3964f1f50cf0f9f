"""Giving memory of what was let go back to the system, which neither Python nor its allocators do at once."""

import ctypes
import gc
import sys

import torch


def give_back(device: torch.device) -> None:
    """Free what nothing refers to any more, and hand free pages back: the device's, and on Linux those of the heap.

    Tensors of up to 32 MB lie on glibc's heap, which keeps its pages until it is told otherwise.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
