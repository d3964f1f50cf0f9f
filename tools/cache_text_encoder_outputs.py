"""Cache what the text encoders make of a dataset's captions beside its pictures.

`python tools/cache_text_encoder_outputs.py --pretrained_model_name_or_path MODEL --dataset_config DATA.toml`, with the
flags of train_network.py. `--verify` judges every wanted file, `--prune` deletes ours that no run can use any more.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 (`--verify` found files that can't be used), 2 (bad input), or 130."""
    sys.path.insert(0, str(ROOT))
    from library.training.cache_run import main as run

    return run(
        "text",
        sys.argv[1:] if argv is None else argv,
        "Cache what the text encoders make of a dataset's captions beside its pictures.",
    )


if __name__ == "__main__":
    sys.exit(main())
