"""Makes the curves that the stop advisor is tested on: real trainings of a very small denoiser. Run by hand.

A three-layer network that was trained to predict the noise in one kind of 8 numbers goes on with another kind.
`plateau` has pictures enough; `overfit` has 6 of them; `diverged` has a learning rate that goes on growing. Held-out
losses use fixed noise and timesteps. Step 0 is the network before.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

STEPS, EVERY, BATCH, TIMES = 1600, 40, 4, (0.2, 0.4, 0.6, 0.8)


def samples(count: int, generator: torch.Generator, bend: float, shift: float = 0.0) -> torch.Tensor:
    """Points (count, 8) on a bent two-dimensional sheet."""
    place = torch.rand(count, 2, generator=generator) * 4 - 2
    waves = [torch.sin(place @ torch.tensor([1.0 + bend * k, 2.0 - 0.4 * k])) for k in range(8)]
    return torch.stack(waves, dim=1) + shift


def loss_of(network: torch.nn.Module, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    noisy = (1 - t) * clean + t * noise
    return mse_loss(network(torch.cat([noisy, t], dim=1)), noise)


def base(generator: torch.Generator) -> torch.nn.Module:
    """The network before the training that is recorded."""
    layers = [torch.nn.Linear(9, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(), torch.nn.Linear(96, 8)]
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(1000):
        noise, t = torch.randn(64, 8, generator=generator), torch.rand(64, 1, generator=generator)
        loss = loss_of(network, samples(64, generator, -0.5), noise, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def run(pictures: int, rate: float, growth: float = 1.0) -> dict[str, list[object]]:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    train, held = samples(pictures, generator, 0.3, 0.8), samples(64, generator, 0.3, 0.8)
    fixed = torch.randn(64, 8, generator=generator)
    network = base(generator)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9) if growth > 1 else None
    optimizer = optimizer or torch.optim.AdamW(network.parameters(), rate)
    losses: list[object] = []
    validations: list[object] = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                each = [float(loss_of(network, held, fixed, torch.full((64, 1), t))) for t in TIMES]
            validations.append([step, round(sum(each) / 4, 5)])
        chosen = torch.randint(0, pictures, (BATCH,), generator=generator)
        noise, t = torch.randn(BATCH, 8, generator=generator), torch.rand(BATCH, 1, generator=generator)
        loss = loss_of(network, train[chosen], noise, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= growth
        losses.append(round(float(loss.detach()), 5))
    return {"training": losses[:STEPS], "validation": validations}


if __name__ == "__main__":
    curves = {"plateau": run(4000, 5e-4), "overfit": run(6, 1e-3), "diverged": run(4000, 2e-3, 1.004)}
    for name, curve in curves.items():
        target = Path(__file__).with_name(f"{name}.json")
        target.write_text(json.dumps(curve) + "\n", encoding="utf-8")
        sys.stdout.write(f"{target}\n")
