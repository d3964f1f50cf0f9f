"""The embedded base model is small, loads like any Stable Diffusion folder, and draws what it is asked for."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from library.quickstart.architecture import MODEL_FOLDER, load_folder
from library.quickstart.evaluate_base import evaluate, evaluation_scenes
from library.quickstart.judge import agreement, judge
from library.quickstart.measure import denoising_loss
from library.quickstart.pictures import old_pictures
from library.quickstart.scenes import Scene, caption
from library.quickstart.words import tokens


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_under_twenty_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL_FOLDER.rglob("*") if path.is_file()) < 20_000_000


def test_its_tokenizer_is_clips(pipeline: StableDiffusionPipeline) -> None:
    prompt = "a small red circle on a blue background, at the top"
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77).input_ids
    assert len(pipeline.tokenizer) == 49408
    assert ids == tokens([prompt])[0].tolist()


def test_the_pipeline_draws_the_prompt_from_ordinary_noise(pipeline: StableDiffusionPipeline) -> None:
    scenes = [
        Scene("circle", "red", "blue", size="large"),
        Scene("star", "yellow", "black", size="large"),
        Scene("square", "green", "white", size="large"),
        Scene("heart", "pink", "purple", size="large"),
    ]
    pictures = pipeline(
        [caption(scene) for scene in scenes],
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(n) for n in range(4)],
        output_type="np",
    ).images
    found = [agreement(s, judge((p * 255).round().astype("uint8"))) for s, p in zip(scenes, pictures, strict=True)]
    assert sum(f["colour"] and f["background"] and f["shape"] for f in found) >= 3, found


def test_it_obeys_twelve_prompts() -> None:
    right, _ = evaluate(load_folder(), evaluation_scenes(12))
    assert right["all three"] >= 9, right


def test_its_words_matter() -> None:
    """Denoising is easier with the right caption than with another picture's."""
    parts = load_folder()
    pictures = old_pictures()[:6]
    right = denoising_loss(parts, pictures)
    wrong = denoising_loss(parts, pictures, captions=[sized.caption for sized in (*pictures[1:], pictures[0])])
    assert right < 0.95 * wrong
