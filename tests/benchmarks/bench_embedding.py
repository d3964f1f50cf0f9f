"""What training only new vectors saves against training the whole vocabulary and writing the old rows back.

python tests/benchmarks/bench_embedding.py [--family sdxl] [--vectors 8] [--turns 5] [--layers 0]

The text encoders have the family's true sizes and random weights; `--layers 2` cuts them down. In turn, each in a
process of its own, both ways encode a caption, go back to the embeddings and make a step of AdamW: ours, with vectors
joined behind a frozen table; and the other one, a table that was made larger and is trained as a whole, with its old
rows written back after each step. The backward pass through the U-Net is the same for both, so it is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CAPTION = "a photo of mycat on a sofa, looking at the camera"
WARMUP = 1


def encoders(family: str, layers: int) -> list[Any]:
    """The family's text encoders with random weights, frozen."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    found = []
    for path in sorted((ROOT / "library/models/configs" / family).glob("text_encoder*.json")):
        given = json.loads(path.read_text(encoding="utf-8"))
        config = CLIPTextConfig(**given | ({"num_hidden_layers": layers} if layers else {}))
        projects = "CLIPTextModelWithProjection" in given.get("architectures", [])
        torch.manual_seed(0)
        found.append((CLIPTextModelWithProjection if projects else CLIPTextModel)(config).requires_grad_(False))
    return found


def joined(models: list[Any], vectors: int) -> tuple[list[Any], list[Any], Callable[[], None]]:
    """Ours: vectors behind frozen tables."""
    import torch

    from library.models.joined import join, token_embedding

    parameters = []
    for model in models:
        rows = token_embedding(model).weight[320 : 320 + vectors].detach().clone()
        parameters.append(torch.nn.Parameter(rows))
        join(model, [parameters[-1]])
    return models, parameters, lambda: None


def whole(models: list[Any], vectors: int) -> tuple[list[Any], list[Any], Callable[[], None]]:
    """The other way: larger tables, trained as a whole; old rows come back after each step."""
    import torch

    from library.models.joined import token_embedding
    from library.tokenizer import VOCABULARY_SIZE

    parameters, kept = [], []
    for model in models:
        model.resize_token_embeddings(VOCABULARY_SIZE + vectors, mean_resizing=False)
        table = token_embedding(model).weight.requires_grad_()
        parameters.append(table)
        kept.append(table.detach().clone())

    def restore() -> None:
        with torch.no_grad():
            for table, old in zip(parameters, kept, strict=True):
                table[:VOCABULARY_SIZE] = old[:VOCABULARY_SIZE]

    return models, parameters, restore


def measure(way: str, family: str, vectors: int, turns: int, layers: int) -> dict[str, float]:
    """Seconds of a step, bytes of AdamW's moments, and what the steps held beyond the models (bytes)."""
    import torch

    from library.models.prompts import token_rows
    from library.tokenizer.vocabulary import NewToken, Vocabulary
    from tests.memory import Peak

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    vocabulary = Vocabulary((NewToken("mycat", vectors),))
    models, parameters, after = {"joined": joined, "whole": whole}[way](encoders(family, layers), vectors)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    rows = token_rows([CAPTION], vocabulary=vocabulary)[:, 0]
    times = []
    with Peak() as peak:
        for turn in range(WARMUP + turns):
            start = time.perf_counter()
            loss = sum(model(rows).last_hidden_state.square().mean() for model in models)
            encoded = time.perf_counter()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            stepped = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after()
            if turn >= WARMUP:
                end = time.perf_counter()
                times.append((encoded - start, stepped - encoded, end - stepped))
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    forward, backward, step = (statistics.median(column) for column in zip(*times, strict=True))
    return {"forward": forward, "backward": backward, "step": step, "moments": moments, "peak": peak.grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sdxl")
    parser.add_argument("--vectors", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--way", choices=("joined", "whole"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.way:
        print(json.dumps(measure(flags.way, flags.family, flags.vectors, flags.turns, flags.layers)))
        return
    found = {}
    for way in ("joined", "whole"):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    print(f"{flags.family}, {flags.vectors} vectors, medians of {flags.turns} steps")
    for way, one in found.items():
        print(
            f"{way:7} forward {one['forward']:.3f} s, backward and clipping {one['backward']:.3f} s, "
            f"AdamW's step {one['step'] * 1000:.1f} ms, its moments {int(one['moments']):,} bytes, "
            f"{one['peak'] / 2**20:,.0f} MiB beside the models"
        )
    ours, other = (sum(found[way][part] for part in ("forward", "backward", "step")) for way in ("joined", "whole"))
    print(f"whole over joined: {other / ours:.2f}x the time of a step")


if __name__ == "__main__":
    main()
