"""How long `--help`, an option error and the dry run of 1,000 pictures take, each as a whole process.

python tests/benchmarks/bench_dry_run.py [--turns 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.pictures import make_pictures
from tests.programs import SCRIPT, environment
from tests.tiny_models import save_tiny_sd1

SIZES = ((640, 480), (480, 640), (512, 512), (800, 450), (450, 800))


def seconds(arguments: list[str], code: int) -> float:
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment(), capture_output=True, check=False
    )
    if result.returncode != code:
        raise RuntimeError(result.stderr.decode())
    return time.perf_counter() - start


def main() -> None:
    """Print a line of medians per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_sd1(folder / "model")
        make_pictures(folder / "pictures", count=1000, repeats=1, sizes=SIZES)
        job = [
            *("--pretrained_model_name_or_path", f"{folder}/model", "--train_data_dir", f"{folder}/pictures"),
            *("--output_dir", f"{folder}/output", "--network_module", "networks.lora", "--resolution", "512"),
            *("--enable_bucket", "--caption_extension", ".txt"),
        ]
        cases = {
            "--help": (["--help"], 0),
            "option error": ([*job, "--lerning_rate", "1"], 2),
            "dry run of 1,000 pictures": ([*job, "--dry_run"], 0),
        }
        for title, (arguments, code) in cases.items():
            times = [seconds(arguments, code) for _ in range(turns)]
            print(f"{title}: median {statistics.median(times):.2f} s, {min(times):.2f}-{max(times):.2f} s")


if __name__ == "__main__":
    main()
