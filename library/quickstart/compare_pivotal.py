"""Is a LoRA with its own word better than a LoRA alone? The new look, four ways, on the same budget of steps.

    python -m library.quickstart.compare_pivotal --scratch FOLDER [--seeds 1 2 3] [--steps 200] [--grid FILE.png]

The LoRA alone is trained once with captions that hold the unknown word, as CLIP spells it, and once with the colour
that the embedding starts from in its place. docs/quickstart.md keeps the table.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from library.options.scripts import TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION, Script
from library.quickstart.architecture import MODEL_FOLDER
from library.quickstart.make_images import make_embedding_images
from library.quickstart.measure_embedding import INIT_WORD, LookFigures, figures, load, write_grid
from library.quickstart.pictures import LOOK_TRAINING
from library.quickstart.scenes import NEW_LOOK
from library.training.script import run

STEPS = 200
LORA_RATE = "1e-3"
EMBEDDING_RATE = "2e-2"


@dataclass(frozen=True)
class Way:
    """One way to train the look: the word in its captions, and what is trained."""

    name: str
    word: str
    lora: bool
    embedding: bool

    @property
    def script(self) -> Script:
        """The script that trains it."""
        return TRAIN_NETWORK if self.lora else TRAIN_TEXTUAL_INVERSION

    def flags(self) -> list[str]:
        """What differs from way to way on the command line."""
        lora = ["--network_module", "networks.lora", "--network_dim", "16", "--network_alpha", "16"]
        token = ["--token_string", NEW_LOOK, "--init_word", INIT_WORD, "--embedding_lr", EMBEDDING_RATE]
        return [*(lora if self.lora else []), *(token if self.embedding else [])]

    def files(self, folder: Path) -> tuple[Path | None, Path | None]:
        """The embedding and the LoRA that it leaves in the folder."""
        embedding = folder / (f"look-{NEW_LOOK}.safetensors" if self.lora else "look.safetensors")
        return (embedding if self.embedding else None), (folder / "look.safetensors" if self.lora else None)


WAYS = (
    Way("embedding", NEW_LOOK, lora=False, embedding=True),
    Way(f"LoRA, captions say {NEW_LOOK!r}", NEW_LOOK, lora=True, embedding=False),
    Way(f"LoRA, captions say {INIT_WORD!r}", INIT_WORD, lora=True, embedding=False),
    Way("LoRA and embedding", NEW_LOOK, lora=True, embedding=True),
)


def train(way: Way, seed: int, steps: int, scratch: Path) -> tuple[Path | None, Path | None]:
    """The files of one run, which is made unless they are there."""
    folder = scratch / f"{WAYS.index(way)}_{seed}_{steps}"
    files = way.files(folder)
    if all(path.is_file() for path in files if path):
        return files
    for sized, path in zip(LOOK_TRAINING, make_embedding_images(folder / "pictures"), strict=True):
        path.with_suffix(".txt").write_text(sized.captioned(way.word) + "\n", encoding="utf-8")
    argv = ["--pretrained_model_name_or_path", str(MODEL_FOLDER), "--train_data_dir", str(folder / "pictures")]
    argv += ["--caption_extension", ".txt", "--resolution", "128", "--enable_bucket", "--cache_latents"]
    argv += ["--min_bucket_reso", "64", "--max_bucket_reso", "192", "--bucket_reso_steps", "16"]
    argv += ["--train_batch_size", "4", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20", "--noise_offset", "0.1"]
    argv += ["--learning_rate", LORA_RATE, "--max_train_steps", str(steps), "--seed", str(seed)]
    argv += ["--output_dir", str(folder), "--output_name", "look", *way.flags()]
    if run(way.script, argv) != 0:
        raise SystemExit(f"the run with seed {seed} failed: {way.name}")
    return files


def row(seed: int | str, name: str, found: LookFigures) -> str:
    """A line of the table."""
    losses = (found.held_out, found.other_shapes, found.old, found.old_green)
    return f"| {seed} | {name} | {' | '.join(f'{loss:.4f}' for loss in losses)} | {found.score:.2f} |"


def main(argv: list[str] | None = None) -> None:
    """Train, measure, and print the table line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--grid", type=Path, help="where samples of the first seed go: drawn truth, then a row a line")
    arguments = parser.parse_args(argv)
    names = ("seed", "trained", "held-out hearts", "other shapes", "old things", "green ones", "look, 0 to 1")
    print(f"| {' | '.join(names)} |\n{'| --- ' * len(names)}|")
    columns = [figures(load(), INIT_WORD)]
    print(row("", f"nothing, captions say {INIT_WORD!r}", columns[0]), flush=True)
    for seed in arguments.seeds:
        for way in WAYS:
            began = time.perf_counter()
            embedding, lora = train(way, seed, arguments.steps, arguments.scratch)
            spent = time.perf_counter() - began
            found = figures(load(embedding=embedding, lora=lora), way.word)
            print(row(seed, f"{way.name} ({spent:.0f} s)", found), flush=True)
            columns += [found] if seed == arguments.seeds[0] else []
    if arguments.grid:
        write_grid(arguments.grid, columns)


if __name__ == "__main__":
    main()
