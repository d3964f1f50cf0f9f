"""Did the embedding learn the new look? Figures, and a grid that a person can look at.

    python -m library.quickstart.measure_embedding --embedding FILE [--lora FILE] [--init_word green] [--grid FILE.png]

The base model hears the same captions with the word that the vectors started from in place of the token. Denoising
losses have fixed noise and timesteps, on pictures that training never saw; samples are judged by OpenCV.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from library.models.joined import token_embedding
from library.quickstart.architecture import MODEL_FOLDER, Parts, load_folder
from library.quickstart.evaluate_base import grid
from library.quickstart.judge_look import mean_look
from library.quickstart.measure import denoising_loss, load_with_lora
from library.quickstart.pictures import LOOK_HELD_OUT, LOOK_OTHER_SHAPES, look_prompts, old_pictures, old_pictures_in
from library.quickstart.sampling import sample
from library.quickstart.scenes import COLOURS, NEW_LOOK, Picture
from library.tokenizer.vocabulary import NewToken, Vocabulary
from library.weights.embeddings import read_embedding

INIT_WORD = "green"
GRID_COLUMNS = 10


@dataclass(frozen=True)
class LookFigures:
    """One model's figures with one word for the look.

    Attributes:
        held_out, other_shapes: mean losses of six held-out hearts in the new look, and of six other shapes in it.
        old, old_green: mean losses of twenty pictures of the old world, and of green things there; green is the word
            that the vectors start from.
        score: the look (0 ... 1) over the prompts, with the `samples` it is of.
    """

    held_out: float
    other_shapes: float
    old: float
    old_green: float
    score: float
    samples: tuple[Picture, ...]


@torch.no_grad()
def with_embedding(parts: Parts, embedding: Path, token: str = NEW_LOOK) -> Parts:
    """The same parts with an embedding's rows behind their table, as a larger table of torch's own."""
    vectors = read_embedding(embedding, str(embedding), token).vectors[0]
    encoder = parts.text_encoder
    rows = torch.cat([token_embedding(encoder).weight, vectors])
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(rows))
    return replace(parts, vocabulary=Vocabulary((NewToken(token, len(vectors)),)))


def load(folder: Path = MODEL_FOLDER, embedding: Path | None = None, lora: Path | None = None) -> Parts:
    """The base model, with what is given of an embedding and a LoRA."""
    parts = load_with_lora(lora, folder) if lora else load_folder(folder)
    return with_embedding(parts, embedding) if embedding else parts


def held_out_loss(parts: Parts, word: str = NEW_LOOK) -> float:
    """Mean loss of the six held-out hearts for a model that hears `word` for the look."""
    return denoising_loss(parts, LOOK_HELD_OUT, [sized.captioned(word) for sized in LOOK_HELD_OUT])


def figures(parts: Parts, word: str = NEW_LOOK) -> LookFigures:
    """All figures of one model that hears `word` for the look; about 25 seconds on two cores."""
    wanted = look_prompts()
    seeds = [3000 + number for number in range(len(wanted))]
    samples = sample(parts, [sized.captioned(word) for sized in wanted], seeds)
    return LookFigures(
        held_out=held_out_loss(parts, word),
        other_shapes=denoising_loss(parts, LOOK_OTHER_SHAPES, [sized.captioned(word) for sized in LOOK_OTHER_SHAPES]),
        old=denoising_loss(parts, old_pictures()),
        old_green=denoising_loss(parts, old_pictures_in(INIT_WORD)),
        score=mean_look(samples, "heart"),
        samples=tuple(samples),
    )


def best_known_word(parts: Parts) -> tuple[str, float]:
    """The colour of the old world that describes the held-out hearts best, and their loss with it."""
    losses = {word: held_out_loss(parts, word) for word in COLOURS}
    return min(losses.items(), key=lambda pair: pair[1])


def table(columns: Sequence[tuple[str, LookFigures]]) -> str:
    """A Markdown table, a column for each model."""
    rows = [
        ("denoising loss, 6 held-out hearts in the new look", [one.held_out for _, one in columns]),
        ("denoising loss, 6 other shapes in the new look", [one.other_shapes for _, one in columns]),
        ("denoising loss, 20 pictures of the old things", [one.old for _, one in columns]),
        (
            f"denoising loss, {len(old_pictures_in(INIT_WORD))} old things in green",
            [one.old_green for _, one in columns],
        ),
        ("new look in 20 samples, 0 to 1", [one.score for _, one in columns]),
    ]
    lines = [f"| {name} | {' | '.join(f'{value:.4f}' for value in values)} |" for name, values in rows]
    return "\n".join([f"| | {' | '.join(name for name, _ in columns)} |", "| --- " * (len(columns) + 1) + "|", *lines])


def rows_of_samples(columns: Sequence[LookFigures]) -> Picture:
    """The first samples of each model, a row each, under the drawn truth."""
    drawn = [sized.draw() for sized in look_prompts()[:GRID_COLUMNS]]
    pictures = [*drawn, *(one for each in columns for one in each.samples[:GRID_COLUMNS])]
    return np.ascontiguousarray(grid(pictures, GRID_COLUMNS))


def write_grid(path: Path, columns: Sequence[LookFigures]) -> None:
    """`rows_of_samples` as a PNG file.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = cv2.cvtColor(rows_of_samples(columns), cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(path), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9]):
        raise OSError(f"{path} could not be written")


def main(argv: list[str] | None = None) -> None:
    """Print the table and, if asked to, write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding", type=Path, help="the embedding to judge")
    parser.add_argument("--lora", type=Path, help="a LoRA to judge, with the embedding if there is one")
    parser.add_argument("--init_word", default=INIT_WORD, help="what the base model hears in place of the token")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--grid", type=Path, help="where a picture of the samples goes: drawn truth, base, trained")
    arguments = parser.parse_args(argv)
    if not (arguments.embedding or arguments.lora):
        parser.error("give --embedding, --lora or both")
    base, trained = load(arguments.model), load(arguments.model, arguments.embedding, arguments.lora)
    before, after = figures(base, arguments.init_word), figures(trained)
    print(table([(f"base, {arguments.init_word!r}", before), (f"trained, {NEW_LOOK!r}", after)]))
    word, loss = best_known_word(base)
    print(f"the base model's best word of its own: {word!r}, {loss:.4f}")
    if arguments.grid:
        write_grid(arguments.grid, [before, after])
        print(f"drawn, before and after: {arguments.grid}")


if __name__ == "__main__":
    main()
