"""The new look: twelve pictures of it, a judge that sees it and nothing else, and a measure that hears the token."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from library.models.inspect import inspect
from library.models.load import load as model_of
from library.quickstart.architecture import MODEL_FOLDER, load_folder
from library.quickstart.compare_pivotal import WAYS, row
from library.quickstart.judge_look import judge_look, mean_look
from library.quickstart.measure import denoising_loss
from library.quickstart.measure_embedding import LookFigures, rows_of_samples, table, with_embedding
from library.quickstart.pictures import (
    LOOK_HELD_OUT,
    LOOK_OTHER_SHAPES,
    LOOK_TRAINING,
    Sized,
    look_prompts,
    old_pictures,
)
from library.quickstart.scenes import COLOURS, NEW_LOOK, SHAPES, STRIPES, Scene, draw
from library.quickstart.words import tokens
from library.tokenizer import clip_tokenizer
from library.tokenizer.vocabulary import NewToken, Vocabulary
from tests.watched_rows import rows_hash, watch_rows

TABLE = "embeddings.token_embedding.weight"


@pytest.mark.parametrize(
    "pictures",
    [LOOK_TRAINING, LOOK_HELD_OUT, LOOK_OTHER_SHAPES, look_prompts()],
    ids=["training", "held out", "other shapes", "prompts"],
)
def test_the_judge_sees_the_whole_look_in_every_drawn_one(pictures: tuple[Sized, ...]) -> None:
    assert [judge_look(sized.draw(), sized.scene.shape).score for sized in pictures] == [1.0] * len(pictures)


def test_nothing_of_the_old_world_has_the_look() -> None:
    for sized in old_pictures():
        verdict = judge_look(sized.draw(), sized.scene.shape)
        assert (verdict.shape, verdict.turquoise, verdict.stripes) == (True, False, False)


def test_each_part_of_the_look_counts_by_itself() -> None:
    drawn = draw(Scene("heart", NEW_LOOK, "blue", size="large"), 128, 128)
    flat = draw(Scene("heart", "green", "blue", size="large"), 128, 128)
    inside = np.abs(flat.astype(int) - COLOURS["green"]).max(axis=2) < 12
    plain = np.where(inside[..., None], np.mean(STRIPES, axis=0).astype(np.uint8), flat)
    assert dataclasses.astuple(judge_look(plain, "heart")) == (True, True, False)
    assert dataclasses.astuple(judge_look(drawn, "circle"))[:2] == (False, True)
    red = np.ascontiguousarray(drawn[..., ::-1])
    assert dataclasses.astuple(judge_look(red, "heart")) == (True, False, True)
    assert judge_look(np.full_like(drawn, 90), "heart").score == 0
    assert mean_look([drawn, plain], "heart") == pytest.approx(5 / 6)


def test_the_look_cuts_its_stripes_to_the_shape() -> None:
    """Outside the shape nothing is turquoise, and both stripes are inside."""
    for shape in SHAPES:
        scene = Scene(shape, NEW_LOOK, "orange", size="large")
        drawn = draw(scene, 128, 128, jitter=0)
        plain = draw(dataclasses.replace(scene, colour="black"), 128, 128, jitter=0)
        outside = np.abs(plain.astype(int) - COLOURS["orange"]).max(axis=2) < 6
        assert np.abs(drawn[outside].astype(int) - COLOURS["orange"]).max() < 12
        for stripe in STRIPES:
            assert (np.abs(drawn.astype(int) - stripe).max(axis=2) < 8).mean() > 0.02


def test_captions_hold_the_token_which_clip_does_not_know() -> None:
    assert len(clip_tokenizer().encode(NEW_LOOK).ids) > 1
    assert all(sized.caption.split().count(NEW_LOOK) == 1 for sized in (*LOOK_TRAINING, *LOOK_HELD_OUT))
    assert LOOK_TRAINING[0].captioned("green") == "a large green heart on a blue background, on the left"


def test_held_out_hearts_share_neither_background_nor_place_nor_size_with_training() -> None:
    for name in ("background", "place", "size"):
        seen = {getattr(sized.scene, name) for sized in LOOK_TRAINING}
        assert seen.isdisjoint(getattr(sized.scene, name) for sized in (*LOOK_HELD_OUT, *LOOK_OTHER_SHAPES))
    assert all(sized.scene.shape != "heart" for sized in LOOK_OTHER_SHAPES)


def test_the_measure_hears_the_token_as_transformers_does(tmp_path: Path) -> None:
    """Hidden states of a caption with three vectors equal those of transformers' own way to add tokens."""
    vectors = torch.from_numpy(np.random.default_rng(1).normal(0, 0.8, (3, 64)).astype(np.float32))
    save_file({"emb_params": vectors}, tmp_path / "e.safetensors")
    caption = LOOK_HELD_OUT[0].caption
    base = load_folder()
    before = rows_hash(base.text_encoder)
    parts = with_embedding(base, tmp_path / "e.safetensors")
    with torch.no_grad():
        found = parts.text_encoder(tokens([caption], parts.vocabulary)).last_hidden_state

    tokenizer = CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer")
    names = [NEW_LOOK, f"{NEW_LOOK}1", f"{NEW_LOOK}2"]
    tokenizer.add_tokens(names)
    encoder = CLIPTextModel.from_pretrained(MODEL_FOLDER / "text_encoder").float().eval()
    encoder.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(names)] = vectors
        text = caption.replace(NEW_LOOK, " ".join(names))
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        true = encoder(ids).last_hidden_state
    assert torch.equal(ids, tokens([caption], parts.vocabulary))
    assert (found - true).abs().max() < 1e-5
    assert rows_hash(parts.text_encoder) == before


def test_the_hash_is_that_of_the_files_rows() -> None:
    parts = load_folder()
    stored = load_file(MODEL_FOLDER / "text_encoder/model.safetensors")[TABLE].float()
    assert rows_hash(parts.text_encoder) == hashlib.sha256(stored.numpy().tobytes()).hexdigest()
    with torch.no_grad():
        parts.text_encoder.get_input_embeddings().weight[77, 3] += 1e-3
    assert rows_hash(parts.text_encoder) != hashlib.sha256(stored.numpy().tobytes()).hexdigest()


def test_watched_rows_are_those_of_the_model_that_trains() -> None:
    model = model_of(inspect(str(MODEL_FOLDER)), with_unet=False, with_vae=False)
    with watch_rows() as rows:
        assert rows.after() == []
        model.join_embeddings(Vocabulary((NewToken(NEW_LOOK, 2),)), [[torch.zeros(2, 64)]])
    assert rows.before == rows.after() == [rows_hash(load_folder().text_encoder)]
    model.embedding_table(0)[7, 0] += 1
    assert rows.after() != rows.before
    model.join_embeddings(Vocabulary(), [[]])
    assert len(rows.before) == 1


def test_a_known_words_vector_is_as_good_as_the_word(tmp_path: Path) -> None:
    base = load_folder()
    (place,) = clip_tokenizer().encode("green").ids
    rows = base.text_encoder.get_input_embeddings().weight.detach()
    save_file({"emb_params": rows[place : place + 1].clone()}, tmp_path / "e.safetensors")
    pictures = LOOK_HELD_OUT[:1]
    green, red = (denoising_loss(base, pictures, [pictures[0].captioned(word)]) for word in ("green", "red"))
    found = denoising_loss(with_embedding(base, tmp_path / "e.safetensors"), pictures)
    assert found == pytest.approx(green, rel=1e-4)
    assert found < 0.5 * red


def test_tables_and_grids_have_a_column_or_row_for_each_model() -> None:
    drawn = tuple(sized.draw() for sized in look_prompts())
    one, other = LookFigures(0.1, 0.2, 0.3, 0.4, 0.5, drawn), LookFigures(0.01, 0.02, 0.03, 0.04, 1.0, drawn)
    text = table([("base", one), ("trained", other)])
    assert "| denoising loss, 6 held-out hearts in the new look | 0.1000 | 0.0100 |" in text
    assert "| new look in 20 samples, 0 to 1 | 0.5000 | 1.0000 |" in text
    assert rows_of_samples([one, other]).shape == (3 * 132, 10 * 132, 3)
    assert row(2, "embedding", other) == "| 2 | embedding | 0.0100 | 0.0200 | 0.0300 | 0.0400 | 1.00 |"


def test_the_ways_differ_in_what_they_train_and_say() -> None:
    assert len({(way.lora, way.embedding, way.word) for way in WAYS}) == len(WAYS) == 4
    for way in WAYS:
        assert ("--network_module" in way.flags()) == way.lora
        assert ("--token_string" in way.flags()) == way.embedding
        assert way.script.name == ("train_network" if way.lora else "train_textual_inversion")
