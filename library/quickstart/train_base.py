"""Make the embedded base model: `python -m library.quickstart.train_base --out FOLDER`.

Deterministic: fixed steps, and every draw a function of its coordinates. A run that was stopped continues from the
scratch folder. The parts are in train_vae and train_unet.
"""

import argparse
from pathlib import Path

from library.quickstart.architecture import MODEL_FOLDER, save_folder
from library.quickstart.train_unet import STEPS, measure_scale, train_unet
from library.quickstart.train_vae import train_vae


def main(argv: list[str] | None = None) -> None:
    """Train both halves and write the diffusers folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="where the diffusers folder goes")
    parser.add_argument("--scratch", type=Path, required=True, help="checkpoints and encoded scenes, to continue from")
    parser.add_argument("--stop_at", type=int, default=STEPS, help="end the U-Net at this step, to look at it")
    arguments = parser.parse_args(argv)
    vae = train_vae(arguments.scratch)
    vae.register_to_config(scaling_factor=measure_scale(vae))
    print(f"scaling factor {vae.config.scaling_factor}")
    unet, text_encoder = train_unet(vae, arguments.scratch, arguments.stop_at)
    save_folder(arguments.out, unet, vae, text_encoder)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
