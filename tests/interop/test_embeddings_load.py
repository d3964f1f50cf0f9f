"""diffusers loads the embedding files that we write, and then its text encoders give what ours give."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor

from library.conditioning import Conditioning
from library.embedding_layouts import Layout, layout_files
from library.models.inspect import inspect
from library.models.load import load
from library.tokenizer.vocabulary import NewToken, Vocabulary
from library.weights.embedding_metadata import usage_metadata
from library.weights.embeddings import read_embedding, write_embedding
from library.weights.files import read_metadata
from networks import lora
from tests.networks.tiny_families import fill
from tests.programs import ROOT

Finder = Callable[[str], Path]
FAMILIES = ("sd1", "sd2", "sdxl")
TOKEN = "<blorp>"
PROMPTS = ["a photo of <blorp>, red", "<blorp> and <blorp>"]


def pipeline(folder: Path) -> Any:
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    return kind.from_pretrained(folder, local_files_only=True)


def vectors(folder: Path, count: int) -> list[Tensor]:
    """As long as the vocabulary's own."""
    torch.manual_seed(3)
    return [torch.randn(count, width) * 0.02 for width in inspect(str(folder)).text_widths]


def ours(folder: Path, made: list[Tensor], prompts: list[str], token: str = TOKEN) -> Conditioning:
    model = load(inspect(str(folder)))
    model.join_embeddings(Vocabulary((NewToken(token, len(made[0])),)), [[one] for one in made])
    with torch.no_grad():
        return model.encode_prompts(prompts)


def compare(pipe: Any, expected: Conditioning, prompts: list[str]) -> None:
    with torch.no_grad():
        states, _, *pooled = pipe.encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(states, expected.states, rtol=0, atol=1e-5)
    if expected.pooled is not None:
        torch.testing.assert_close(pooled[0], expected.pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_line_for_diffusers_in_our_files_works_as_it_stands(
    family: str, layout: Layout, count: int, tiny_models: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models(family)
    made, pipe = vectors(folder, count), pipeline(folder)
    for name, encoders in layout_files("run", layout, len(made)):
        path = tmp_path / name
        text = usage_metadata(layout, path.name, TOKEN, len(made))
        write_embedding(path, [made[one] for one in encoders], layout, TOKEN, None, text)
        line, _, tail = read_metadata(path)["usage_diffusers"].rpartition("; ")
        monkeypatch.chdir(path.parent)
        exec(line, {"pipe": pipe, "safetensors": safetensors})
        assert tail == f"write {TOKEN}"
    compare(pipe, ours(folder, made, PROMPTS), PROMPTS)


@pytest.mark.parametrize("name", ["kohya/run.pt", "webui/run.pt"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_torch_files_load_too(family: str, name: str, tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models(family)
    made, pipe = vectors(folder, 2), pipeline(folder)
    layout: Layout = "webui" if name.startswith("webui") else "kohya"
    write_embedding(tmp_path / name, made, layout, TOKEN, None, {})
    named = {} if layout == "webui" else {"token": TOKEN}
    pipe.load_textual_inversion(str(tmp_path / name), **named)
    compare(pipe, ours(folder, made, PROMPTS), PROMPTS)


def test_half_precision_files_load(tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models("sd1")
    made, pipe = vectors(folder, 2), pipeline(folder)
    write_embedding(tmp_path / "run.safetensors", made, "kohya", TOKEN, torch.float16, {})
    pipe.load_textual_inversion(str(tmp_path / "run.safetensors"), token=TOKEN)
    read = read_embedding(tmp_path / "run.safetensors", "here")
    compare(pipe, ours(folder, list(read.vectors), PROMPTS), PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_diffusers_script_saves_is_read(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    """Its script adds tokens `tok`, `tok_1`, saves their rows under the placeholder, and can be told of it again."""
    folder = tiny_models(family)
    pipe = pipeline(folder)
    made = vectors(folder, 2)
    for number, rows in zip(("", "_2"), made, strict=False):
        tokenizer, encoder = getattr(pipe, f"tokenizer{number}"), getattr(pipe, f"text_encoder{number}")
        assert tokenizer.add_tokens([TOKEN, f"{TOKEN}_1"]) == 2
        encoder.resize_token_embeddings(len(tokenizer))
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[-2:] = rows
        torch.save({TOKEN: table[-2:].detach()}, tmp_path / f"learned{number}.bin")
        read = read_embedding(tmp_path / f"learned{number}.bin", "here")
        assert read.token == TOKEN
        torch.testing.assert_close(read.vectors[0], rows, rtol=0, atol=0)
    compare(pipe, ours(folder, made, PROMPTS), PROMPTS)


def blocks() -> list[str]:
    """The Python of the page about embeddings."""
    page = (ROOT / "docs/textual-inversion.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_and_its_word_load_together(
    family: str, lora_first: bool, tiny_models: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the lines of the docs, in either order; the text encoders with both give what ours with both give."""
    folder, prompts = tiny_models(family), ["a photo of mycat, red"]
    made, pipe, output = vectors(folder, 2), pipeline(folder), tmp_path / "output"
    model = load(inspect(str(folder)))
    write_embedding(output / "pets-mycat.safetensors", made, "kohya", "mycat", None, {})
    network = lora.create_network(1.0, 4, 2.0, None, list(model.text_encoders), model.unet)
    network.apply_to(list(model.text_encoders), model.unet)
    fill(network)
    network.save_weights(output / "pets.safetensors", None, {})
    model.join_embeddings(Vocabulary((NewToken("mycat", 2),)), [[one] for one in made])
    with torch.no_grad():
        expected = model.encode_prompts(prompts)
    without = ours(folder, made, prompts, token="mycat")
    assert (expected.states - without.states).abs().max() > 1e-3
    monkeypatch.chdir(tmp_path)
    first, embedding, _ = blocks()[-1].splitlines()
    if len(made) == 2:
        embedding = blocks()[1].replace("mycat.safetensors", "pets-mycat.safetensors")
    for line in (first, embedding) if lora_first else (embedding, first):
        exec(line, {"pipe": pipe})
    compare(pipe, expected, prompts)


def test_which_files_know_their_word(tiny_models: Finder, tmp_path: Path) -> None:
    """What the docs say of diffusers without `token=`."""
    folder = tiny_models("sd1")
    made = vectors(folder, 1)
    kinds: tuple[tuple[str, Layout, str], ...] = (("a.safetensors", "kohya", "emb_params"), ("b.pt", "webui", "mycat"))
    for name, layout, word in kinds:
        write_embedding(tmp_path / name, made, layout, "mycat", None, {})
        pipe = pipeline(folder)
        pipe.load_textual_inversion(str(tmp_path / name))
        assert [*pipe.tokenizer.get_added_vocab()][-1] == word
