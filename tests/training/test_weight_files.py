"""Which files a save writes, and what they are called."""

from pathlib import Path

import pytest

from library.options import parse
from library.options.scripts import TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION
from library.tokenizer.vocabulary import NewToken
from library.training.embedding_plan import EmbeddingPlan, PlannedToken
from library.training.weight_files import WeightFile, weight_files
from tests.pictures import make_pictures


def plan(*tokens: str) -> EmbeddingPlan:
    base = PlannedToken(NewToken("frozen"), "--base_embeddings", file=Path("frozen.pt"))
    return EmbeddingPlan(tuple(PlannedToken(NewToken(one, 2), "--token_string") for one in tokens), (base,), 1e-3)


def names(*flags: str, tokens: tuple[str, ...] = ("mycat",), encoders: int = 1, network: bool = False) -> list[str]:
    return [one.name for one in files(*flags, tokens=tokens, encoders=encoders, network=network)]


def files(
    *flags: str, tokens: tuple[str, ...] = ("mycat",), encoders: int = 1, network: bool = False
) -> tuple[WeightFile, ...]:
    own: tuple[str, ...] = ("--train_data_dir", "pictures", "--resolution", "64")
    own += ("--network_module", "networks.lora") if network else ()
    script = TRAIN_NETWORK if network else TRAIN_TEXTUAL_INVERSION
    options = parse([*own, *(("--token_string", *tokens) if tokens else ()), *flags], needs=(), script=script)
    return weight_files(options, plan(*tokens) if tokens else None, encoders, "cat")


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pictures in the folder that the command lines name."""
    make_pictures(tmp_path / "pictures", count=1)
    monkeypatch.chdir(tmp_path)


def test_a_network_alone_has_one_file() -> None:
    assert files(tokens=(), network=True) == (WeightFile("cat.safetensors", "network"),)
    assert names("--save_model_as", "ckpt", tokens=(), network=True) == ["cat.ckpt"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ["cat.pt", "cat.safetensors"]),
        (("--save_model_as", "ckpt"), ["cat.ckpt", "cat.safetensors"]),
        (("--save_model_as", "safetensors"), ["cat.safetensors"]),
    ],
)
def test_an_embedding_is_written_as_asked_and_as_safetensors(flags: tuple[str, ...], expected: list[str]) -> None:
    assert names(*flags) == expected


def test_several_tokens_have_files_of_their_own() -> None:
    found = files(tokens=("mycat", "<hat>"))
    assert [one.name for one in found] == ["cat-mycat.pt", "cat-mycat.safetensors", "cat-hat.pt", "cat-hat.safetensors"]
    assert [one.tokens for one in found] == [(NewToken("mycat", 2),)] * 2 + [(NewToken("<hat>", 2),)] * 2


def test_with_a_network_its_file_comes_first_and_embeddings_are_safetensors() -> None:
    assert names(network=True) == ["cat.safetensors", "cat-mycat.safetensors"]
    assert names("--save_model_as", "pt", network=True) == ["cat.pt", "cat-mycat.safetensors"]


def test_further_layouts_come_behind() -> None:
    every = ("--save_embedding_as", "bundle", "diffusers", "webui")
    assert names(*every, tokens=("mycat", "myhat"), network=True) == [
        *("cat.safetensors", "cat-mycat.safetensors", "cat-myhat.safetensors"),
        *("diffusers/cat-mycat.safetensors", "diffusers/cat-myhat.safetensors"),
        *("webui/cat-mycat.pt", "webui/cat-myhat.pt", "cat.bundle.safetensors"),
    ]
    last = files(*every, tokens=("mycat", "myhat"), network=True)[-1]
    assert last == WeightFile("cat.bundle.safetensors", "bundle", (NewToken("mycat", 2), NewToken("myhat", 2)), (0,))


def test_diffusers_has_a_file_for_each_text_encoder() -> None:
    found = files("--save_embedding_as", "diffusers", encoders=2)
    assert [(one.name, one.encoders) for one in found] == [
        ("cat.pt", (0, 1)),
        ("cat.safetensors", (0, 1)),
        ("diffusers/cat.clip_l.safetensors", (0,)),
        ("diffusers/cat.clip_g.safetensors", (1,)),
    ]


def test_no_two_files_have_one_name() -> None:
    found = names("--save_embedding_as", "webui", "diffusers", "bundle", tokens=("<cat>", "cat?", "CAT:"), encoders=2)
    assert len({name.casefold() for name in found}) == len(found)
