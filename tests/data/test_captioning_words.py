"""How captions are drawn, and what is taken out of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.data.captioning.captioner import _Drawing, kind_of, needed_files, without_writing
from library.errors import UserError


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    names = [f"{number}.png" for number in range(4000)]
    scores = probabilities.log().expand(len(names), 4)
    drawn = _Drawing(7, names, 0.8)(torch.zeros(len(names), 3, dtype=torch.long), scores).argmax(1)
    shares = np.bincount(drawn.numpy(), minlength=4) / len(names)
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)


def test_draws_belong_to_a_picture_and_a_place() -> None:
    scores, begun = torch.zeros(2, 50), torch.zeros(2, 3, dtype=torch.long)
    both = _Drawing(7, ["a", "b"], 1.0)(begun, scores)
    assert torch.equal(_Drawing(7, ["b"], 1.0)(begun[:1], scores[:1])[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(_Drawing(7, ["a"], 1.0)(torch.zeros(1, 4, dtype=torch.long), scores[:1])[0], both[0])
    assert not torch.equal(_Drawing(8, ["a"], 1.0)(begun[:1], scores[:1])[0], both[0])


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("a cat with the words hello on it", "a cat"),
        ('a cat with the words "hello you" on the front of a box', "a cat"),
        ("a sign that says stop on it, in the rain", "a sign, in the rain"),
        ("a girl with a sign that says ' i'm here '", "a girl"),
        ("a shirt and the number 12 on his back", "a shirt"),
        ("a box with the name tom", "a box"),
        ("a book with word magic on it", "a book"),
        ("the name of the rose", "the name of the rose"),
        ("a girl with the flowers in her hair", "a girl with the flowers in her hair"),
    ],
)
def test_writing_is_taken_out(caption: str, left: str) -> None:
    assert without_writing(caption) == left


def test_files_of_captioners(tmp_path: Path) -> None:
    names = ["README.md", "config.json", "vocab.txt", "tokenizer.json", "pytorch_model.bin", "tf_model.h5"]
    assert needed_files(names) == ["config.json", "tokenizer.json", "vocab.txt", "pytorch_model.bin"]
    assert needed_files([*names, "model.safetensors"])[-1] == "model.safetensors"
    assert needed_files(["config.json", "model.safetensors"]) == []
    for text, said in (
        ("{}", "no config.json that names a model_type"),
        ('{"model_type": "llama"}', "model_type is llama"),
        ('{"model_type": "blip"}', "lacks model.safetensors"),
        ("{", "can't be read"),
    ):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            kind_of(tmp_path, "--model_id")
