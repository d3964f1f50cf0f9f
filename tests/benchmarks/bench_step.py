"""A training step with LoRA against the bare frozen U-Net and text encoder, forward and backward, run in turn.

python tests/benchmarks/bench_step.py MODEL.safetensors [--dtype bf16] [--turns 7] [--threads 2]
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def bare_step(model: Any, noisy: Any, timesteps: Any, captions: list[str]) -> None:
    """Forward and backward of the frozen parts; gradients flow to the token embeddings and to the noisy latents."""
    import torch

    def wants_gradient(module: Any, inputs: Any, output: Any) -> Any:
        return output.requires_grad_()

    hook = model.network_text_encoder.get_input_embeddings().register_forward_hook(wants_gradient)
    prediction = model.predict(noisy.clone().requires_grad_(), timesteps, model.encode_prompts(captions))
    torch.nn.functional.mse_loss(prediction, noisy).backward()
    hook.remove()


def lora_step(model: Any, optimizer: Any, noisy: Any, timesteps: Any, captions: list[str]) -> None:
    """Forward, backward and update of the adapters, as the loop does it."""
    import torch

    prediction = model.predict(noisy, timesteps, model.encode_prompts(captions))
    torch.nn.functional.mse_loss(prediction, noisy).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Alternate the two and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = arguments.threads

    import torch

    from library.models.inspect import inspect
    from library.models.load import load
    from library.training.optimizers import build_optimizer
    from networks.lora import create_network

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    model = load(inspect(arguments.model), dtype=dtype, with_vae=False)
    noisy, timesteps, captions = torch.randn(1, 4, 32, 32), torch.tensor([500]), ["photo of a cat, close-up"]

    def attached_step() -> float:
        network = create_network(1.0, arguments.rank, 1.0, None, model.network_text_encoder, model.unet)
        network.apply_to(model.network_text_encoder, model.unet)
        groups, _ = network.prepare_optimizer_params(1e-4, 1e-4, 1e-4)
        optimizer, _ = build_optimizer("AdamW", groups, {})
        seconds = timed(lambda: lora_step(model, optimizer, noisy, timesteps, captions))
        network.remove()
        return seconds

    bare, ours = [], []
    for turn in range(arguments.turns + 1):
        bare.append(timed(lambda: bare_step(model, noisy, timesteps, captions)))
        ours.append(attached_step())
        print(f"turn {turn}: bare {bare[-1]:.3f} s, with LoRA {ours[-1]:.3f} s", flush=True)
    first, second = statistics.median(bare[1:]), statistics.median(ours[1:])
    ratios = sorted(b / a for a, b in zip(bare[1:], ours[1:], strict=True))
    print(f"{arguments.dtype}, rank {arguments.rank}, {arguments.threads} threads, medians of {arguments.turns} turns:")
    spread = f"by turn {ratios[0]:.2f}-{ratios[-1]:.2f}"
    print(f"bare {first:.3f} s, with LoRA {second:.3f} s: {second / first:.3f}x ({spread})")


if __name__ == "__main__":
    main()
