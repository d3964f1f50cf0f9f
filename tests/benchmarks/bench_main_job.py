"""A full-size model (random weights, original layout), twelve real photographs at 256 px: a whole run, by phase.

python tests/benchmarks/bench_main_job.py [--family sdxl] [--mixed_precision bf16] [--threads 2] [--work FOLDER]
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.full_size import FAMILIES, write_single_file
from tests.memory import run_measured
from tests.photos import write_photos
from tests.programs import environment, launch_command

MORE = {
    "sd1": (),
    "sd2": ("--v_parameterization",),
    "sdxl": ("--network_train_unet_only", "--cache_text_encoder_outputs"),
}


def job(family: str, model: Path, work: Path, precision: str) -> list[str]:
    """The command line of the measured run."""
    return launch_command(
        *(
            "--pretrained_model_name_or_path",
            model,
            "--train_data_dir",
            work / "photos",
            "--output_dir",
            work / "output",
        ),
        *("--output_name", f"bench_{precision}", "--network_module", "networks.lora", "--network_dim", 8),
        *("--resolution", 256, "--enable_bucket", "--min_bucket_reso", 128, "--cache_latents", "--max_train_steps", 6),
        *("--caption_extension", ".txt", "--learning_rate", 1e-4, "--seed", 1, "--mixed_precision", precision),
        *MORE[family],
    )


def main() -> None:
    """Make the model once, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--family", default="sd1", choices=FAMILIES)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorasmith_bench")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    model = work / f"{arguments.family}.safetensors"
    if not model.exists():
        write_single_file(arguments.family, model, dtype="F32" if arguments.family == "sd1" else "F16")
    write_photos(work / "photos")
    variables = environment(OMP_NUM_THREADS=arguments.threads)
    result = run_measured(job(arguments.family, model, work, arguments.mixed_precision), variables, work / "log.txt")
    print(result.stderr[-3000:])
    print(f"exit code {result.returncode}, whole run {result.seconds:.1f} s with the launcher")
    print(f"peak RssAnon+RssShmem {result.anonymous / 2**30:.2f} GiB, VmHWM {result.high_water / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
