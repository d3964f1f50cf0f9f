"""The text of embedding files: what readers in the field look for, and a line for each program."""

from dataclasses import replace
from typing import Any

import pytest

from library.embedding_layouts import Layout
from library.weights.embedding_metadata import (
    EmbeddingFacts,
    bundle_usage_metadata,
    embedding_metadata,
    usage_metadata,
)
from library.weights.metadata import ModelSpec, Progress, training_metadata
from tests.weights.test_metadata import SETTINGS, SPEC, run

FACTS = EmbeddingFacts("<cat>", 3, 1, "run-cat.safetensors", "kohya", 0.005)


def text(facts: EmbeddingFacts = FACTS, spec: ModelSpec = SPEC, **more: Any) -> dict[str, str]:
    return embedding_metadata(facts, training_metadata(run(), SETTINGS), Progress(2, 100, 1700000100.25), spec, **more)


def test_what_the_file_is_and_how_it_was_trained() -> None:
    expected = {
        "ss_token_string": "<cat>",
        "ss_num_vectors_per_token": "3",
        "ss_embedding_lr": "0.005",
        "ss_learning_rate": "0.0001",
        "ss_steps": "100",
        "ss_epoch": "2",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_output_name": "None",
        "ss_sd_model_name": "sd15.safetensors",
        "modelspec.architecture": "stable-diffusion-v1/textual-inversion",
        "modelspec.trigger_phrase": "<cat>",
        "modelspec.title": "cat",
    }
    found = text()
    assert expected.items() <= found.items()
    assert all(isinstance(value, str) for value in found.values())
    assert not [name for name in found if name.startswith("ss_network_")]


def test_what_the_user_says_of_the_file_stands() -> None:
    spec = replace(SPEC, title=None, texts={"trigger_phrase": "a photo of <cat>", "author": "me", "license": None})
    found = text(spec=spec)
    assert found["modelspec.trigger_phrase"] == "a photo of <cat>"
    assert found["modelspec.author"] == "me" and "modelspec.license" not in found
    assert found["modelspec.title"].startswith("TextualInversion@")


def test_no_metadata_keeps_what_loaders_need() -> None:
    found = text(no_metadata=True)
    rest = {name: value for name, value in found.items() if not name.startswith("modelspec.")}
    assert rest == {"ss_token_string": "<cat>", "ss_v2": "False", "ss_base_model_version": "sd_v1"}
    assert found["modelspec.architecture"].endswith("/textual-inversion")


@pytest.mark.parametrize("version", ["sd_v2", "sd_v2_v", "sdxl_base_v1-0"])
def test_the_architecture_of_each_family(version: str) -> None:
    lora = {"sd_v2": "stable-diffusion-v2-512", "sd_v2_v": "stable-diffusion-v2-768-v"}
    found = text(spec=replace(SPEC, base_model_version=version))
    expected = lora.get(version, "stable-diffusion-xl-v1-base")
    assert found["modelspec.architecture"] == f"{expected}/textual-inversion"


@pytest.mark.parametrize(
    ("layout", "name", "encoders", "says"),
    [
        ("kohya", "run.safetensors", 1, ["write run", "embedding:run", "<run>", "token='<cat>')"]),
        ("kohya", "run.safetensors", 2, ["write run", "embedding:run", "<run>", 't["clip_g"]']),
        ("diffusers", "run.clip_g.safetensors", 2, [".clip_l", ".clip_l", ".clip_l", "pipe.text_encoder_2"]),
        ("diffusers", "run.clip_l.safetensors", 2, [".clip_g", ".clip_g", ".clip_g", "pipe.text_encoder,"]),
        ("bundle", "run.bundle.safetensors", 2, ["<lora:run.bundle:1> <cat>", "embedding:run", "separate", "separate"]),
    ],
)
def test_a_line_for_each_program(layout: Layout, name: str, encoders: int, says: list[str]) -> None:
    found = usage_metadata(layout, name, "<cat>", encoders)
    assert list(found) == ["usage_a1111", "usage_comfyui", "usage_invokeai", "usage_diffusers"]
    for line, word in zip(found.values(), says, strict=True):
        assert word in line
        assert "\n" not in line
    facts = replace(FACTS, layout=layout, file_name=name, encoders=encoders)
    assert found.items() <= text(facts).items()


def test_a_bundle_names_all_of_its_tokens_as_programs_read_them() -> None:
    assert bundle_usage_metadata("a.safetensors", ["my.cat", "dog"])["usage_a1111"].endswith("<lora:a:1> my_cat dog")
