"""Flags of embeddings: which vectors a run trains, what they start from, how long and how far they move, and the files
that hold them. Values are compared with the base model's own table, read from its file.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import CLIPTokenizer

from library.options.templates import OBJECT, STYLE
from tests.flags.effects import Ran, Runs, WordRuns, equal, observes, part

pytestmark = pytest.mark.xdist_group("flags of embeddings")
STILL = ("--learning_rate", "1e-12")
START = ("--init_word", "cat", *STILL)
TABLE = "text_model.embeddings.token_embedding.weight"
Array = np.ndarray[Any, Any]


def table(runs: Runs, model: str = "sd1", folder: str = "text_encoder") -> Array:
    """The vocabulary's rows (49408, width) as they are on disk."""
    tensors = load_file(runs.models(model) / folder / "model.safetensors")
    return next(tensor for name, tensor in tensors.items() if name.endswith(TABLE.removeprefix("text_model.")))


def rows(runs: Runs, text: str, **of: str) -> Array:
    """The rows of a text's tokens, as transformers' tokenizer names them."""
    tokenizer = CLIPTokenizer.from_pretrained(runs.models(of.get("model", "sd1")) / "tokenizer")
    return table(runs, **of)[tokenizer(text, add_special_tokens=False).input_ids]


def vectors(ran: Ran, name: str = "x.safetensors") -> Array:
    return load_file(ran.folder / name)["emb_params"]


def norms(values: Array) -> Array:
    return np.linalg.norm(values.astype(np.float64), axis=1)


@observes("token_string", "num_vectors_per_token")
def test_each_token_gets_its_vectors_and_all_of_them_learn(words: WordRuns) -> None:
    one, still = words("--init_word", "cat"), words(*START)
    assert vectors(one).shape == (1, 32) and not np.array_equal(vectors(one), vectors(still))
    assert one.metadata["ss_token_string"] == "blorp" and one.metadata["ss_num_vectors_per_token"] == "1"
    three = words("--init_word", "cat", "--num_vectors_per_token", "3")
    assert (vectors(three) != rows(words, "cat cat cat")).any(axis=1).all() and len(vectors(three)) == 3
    assert three.losses[0] != pytest.approx(one.losses[0], rel=1e-6)
    both = words("--token_string", "blorp", "tag0", "--num_vectors_per_token", "2", "1", "--init_word", "cat", "red")
    assert len(vectors(both, "x-blorp.safetensors")) == 2 and not both.file.exists()
    assert (vectors(both, "x-tag0.safetensors") != rows(words, "red")).all()
    assert "blorp" not in "".join(one.weights)
    absent = words("--token_string", "zorkel", "--init_word", "cat", expect=2)
    assert "zorkel" in absent.err and not absent.steps_were_made


@observes("init_word")
def test_vectors_start_from_a_word_of_the_vocabulary(words: WordRuns) -> None:
    assert np.array_equal(vectors(words(*START)), rows(words, "cat"))
    twice = words(*START, "--num_vectors_per_token", "2")
    assert np.array_equal(vectors(twice), rows(words, "cat cat"))
    both = words(*START, model="sdxl").weights
    for key, folder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        assert np.array_equal(both[key], rows(words, "cat", model="sdxl", folder=folder))
    drawn, other = vectors(words(*STILL)), vectors(words(*STILL, "--seed", "4"))
    assert not np.array_equal(drawn, other) and not np.array_equal(drawn, rows(words, "cat"))
    wrong = words(*STILL, "--init_word", "florpish", expect=2)
    assert "tokens: " in wrong.err and "--initial_phrase" in wrong.err and not wrong.steps_were_made


@observes("initial_phrase")
def test_vectors_start_from_a_phrase_one_for_each_of_its_tokens(words: WordRuns) -> None:
    still = words(*STILL, "--initial_phrase", "a small red cat")
    assert np.array_equal(vectors(still), rows(words, "a small red cat")) and len(vectors(still)) == 4
    assert words(*STILL, "--initial_phrase", "a red cat", "--num_vectors_per_token", "2", expect=2).err


@observes("weights")
def test_vectors_start_from_files(words: WordRuns, tmp_path: Path) -> None:
    trained = words("--init_word", "cat", "--num_vectors_per_token", "2", "--save_embedding_as", "webui", "diffusers")
    for name in ("x.pt", "x.safetensors", "webui/x.pt", "diffusers/x.safetensors"):
        again = words(*STILL, "--weights", str(trained.folder / name))
        assert np.array_equal(vectors(again), vectors(trained)), name
    wide = words(*START, model="sd2")
    wrong = words("--weights", str(wide.file), expect=2)
    assert "(64)" in wrong.err and "(32)" in wrong.err and not wrong.steps_were_made


@observes("base_embeddings")
def test_captions_may_use_frozen_embeddings(runs: Runs, words: WordRuns, tmp_path: Path) -> None:
    """One that has the vectors of two known words says the same as these."""
    file = tmp_path / "frozen.safetensors"
    save_file({"emb_params": rows(runs, "small cat")}, file)
    for each, more in ((runs, ("--network_train_unet_only",)), (words, ("--init_word", "cat"))):
        known, unknown = (each(*more, "--caption_prefix", prefix) for prefix in ("small cat ", "blorpy "))
        frozen = each(*more, "--caption_prefix", "blorpy ", "--base_embeddings", f"blorpy={file}")
        assert frozen.losses == pytest.approx(known.losses, rel=1e-6) != pytest.approx(unknown.losses, rel=1e-6)
        assert not [path for path in frozen.folder.glob("*") if "blorpy" in path.name]


@observes("embedding_lr")
def test_the_vectors_have_a_rate_of_their_own(runs: Runs, words: WordRuns) -> None:
    once = ("--init_word", "cat", "--optimizer_type", "SGD", "--max_grad_norm", "0", "--max_train_steps", "1")
    one, three = words(*once, "--learning_rate", "1"), words(*once, "--embedding_lr", "3")
    moved = [vectors(ran).astype(np.float64) - rows(words, "cat") for ran in (one, three)]
    assert np.abs(moved[0]).max() > 0 and np.allclose(3 * moved[0], moved[1], rtol=1e-3, atol=1e-8)
    assert (one.logged("lr/embedding"), three.logged("lr/embedding")) == ([1.0], [3.0])
    pivotal = pivot(runs, words, "--embedding_lr", "0.25")
    assert pivotal.logged("lr/embedding") == [0.25] * 2 and pivotal.logged("lr/unet") == [1e-2] * 2


def pivot(runs: Runs, words: WordRuns, *flags: str) -> Ran:
    """A LoRA and the word's vectors in one run."""
    data = ("--train_data_dir", str(words.root / "pictures"), "--token_string", "blorp", "--init_word", "cat")
    return runs(*data, "--network_train_unet_only", *flags)


@observes("ti_train_steps_ratio")
def test_after_their_share_of_steps_vectors_stay_as_they_are(runs: Runs, words: WordRuns) -> None:
    four, rule = ("--max_train_steps", "4"), ("--embedding_norm", "median", "--optimizer_args", "weight_decay=0.5")
    half = pivot(runs, words, *four, *rule, "--ti_train_steps_ratio", "0.5")
    short, whole = pivot(runs, words, *rule), pivot(runs, words, *four, *rule)
    name = "x-blorp.safetensors"
    assert np.array_equal(vectors(half, name), vectors(short, name))
    assert not np.array_equal(vectors(half, name), vectors(whole, name))
    assert not equal(part(half, "lora_unet"), part(short, "lora_unet"))
    assert half.losses[:3] == whole.losses[:3] and half.losses[3] != whole.losses[3]
    assert half.logged("lr/embedding") == [1e-2, 1e-2, 0, 0] and half.logged("lr/unet") == [1e-2] * 4
    assert "--max_train_steps" in words("--ti_train_steps_ratio", "0.5", expect=2).err


@observes("embedding_norm")
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_norms_are_kept_to_those_of_the_vocabulary(words: WordRuns, model: str) -> None:
    fast = ("--num_vectors_per_token", "3", "--init_word", "cat", "--learning_rate", "0.1", "--embedding_norm")
    free, clamped, median = (words(*fast, rule, model=model).weights for rule in ("off", "clamp", "median"))
    encoders = {"emb_params": "text_encoder"}
    if model == "sdxl":
        encoders = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    assert free.keys() == encoders.keys()
    for key, folder in encoders.items():
        low, middle, high = np.quantile(norms(table(words, model=model, folder=folder)), [0.01, 0.5, 0.99])
        assert norms(free[key]).max() > 1.5 * high
        assert ((norms(clamped[key]) >= low * (1 - 1e-6)) & (norms(clamped[key]) <= high * (1 + 1e-6))).all()
        assert norms(median[key]) == pytest.approx([middle] * 3, rel=1e-6)


@observes("use_object_template", "use_style_template")
@pytest.mark.parametrize(("kind", "templates"), [("object", OBJECT), ("style", STYLE)])
def test_captions_come_from_templates(words: WordRuns, captions: list[str], kind: str, templates: list[str]) -> None:
    many = ("--init_word", "cat", "--max_train_steps", "6")
    switched = words.fresh(*many, f"--use_{kind}_template")
    seen = captions.copy()
    assert {text for text in seen if text} <= {text.format("blorp") for text in templates} and len({*seen}) > 3
    assert equal(switched.weights, words.fresh(*many, "--caption_preset", kind).weights)
    captions.clear()
    plain = words.fresh(*many)
    assert all("tag" in text for text in captions if text) and plain.losses != switched.losses


@observes("save_embedding_as")
def test_more_layouts_are_written_beside_the_usual_one(runs: Runs, words: WordRuns) -> None:
    import torch

    usual = {path.name for path in words("--init_word", "cat").folder.rglob("x*") if path.is_file()}
    assert usual == {"x.pt", "x.safetensors", "x.log.jsonl"}
    every = ("--save_embedding_as", "webui", "diffusers", "bundle")
    ran = words("--init_word", "cat", *every)
    webui = torch.load(ran.folder / "webui" / "x.pt", weights_only=True)
    assert np.array_equal(webui["string_to_param"]["*"].numpy(), vectors(ran))
    assert np.array_equal(load_file(ran.folder / "diffusers" / "x.safetensors")["blorp"], vectors(ran))
    bundle = load_file(ran.folder / "x.bundle.safetensors")
    assert {key: tensor.shape for key, tensor in bundle.items()} == {"bundle_emb.blorp.string_to_param.*": (1, 32)}
    both = pivot(runs, words, *every)
    bundle = load_file(both.folder / "x.bundle.safetensors")
    word = {"bundle_emb.blorp.string_to_param.*": vectors(both, "x-blorp.safetensors")}
    assert equal(bundle, {**both.weights, **word})


@observes("scale_lr", "no_scale_lr")
def test_rates_are_multiplied_by_pictures_per_step(runs: Runs, words: WordRuns, tmp_path: Path) -> None:
    more = ("--init_word", "cat", "--train_batch_size", "2", "--gradient_accumulation_steps", "3")
    plain, scaled = words(*more), words(*more, "--scale_lr")
    assert plain.logged("lr/embedding") == [1e-2] * 2 and scaled.logged("lr/embedding") == pytest.approx([6e-2] * 2)
    assert equal(scaled.weights, words(*more, "--learning_rate", str(6e-2)).weights)
    rates = ("--unet_lr", "1e-3", "--embedding_lr", "1e-4", "--train_batch_size", "4", "--scale_lr")
    pivotal = pivot(runs, words, *rates)
    assert pivotal.logged("lr/unet") == pytest.approx([4e-3] * 2)
    assert pivotal.logged("lr/embedding") == pytest.approx([4e-4] * 2)
    file = tmp_path / "c.toml"
    file.write_text("scale_lr = true\n")
    told = words(*more, "--config_file", str(file))
    assert equal(told.weights, scaled.weights)
    assert equal(words(*more, "--config_file", str(file), "--no_scale_lr").weights, plain.weights)
    assert words("--scale_lr", "--no_scale_lr", expect=2).steps_were_made is False
