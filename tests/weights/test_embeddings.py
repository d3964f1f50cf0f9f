"""Embedding files: every layout in use is read, four are written, and what is written is what was meant."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.embedding_layouts import file_bases, tensor_names
from library.errors import UserError
from library.models.embedding_files import read_embedding_header
from library.weights.check import BadWeightsError
from library.weights.embeddings import (
    bundle_tensors,
    check_embedding_file,
    layout_files,
    read_embedding,
    read_embeddings,
    write_embedding,
)
from library.weights.files import read_metadata

L = torch.arange(24, dtype=torch.float32).reshape(3, 8) / 7 - 1
G = torch.arange(36, dtype=torch.float32).reshape(3, 12) / 5 + 1
LORA = {"lora_unet_x.lora_down.weight": torch.zeros(2, 3), "lora_te_y.lora_up.weight": torch.zeros(3, 2)}


class Old(nn.Module):
    """Makes a table of parameters as the first programs for embeddings did."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        self.table = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})


def table(**more: Any) -> dict[str, Any]:
    """What A1111 saves."""
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(L)}, "name": "cat", "step": 7, **more}


# name of the file, its content, the vectors, the token, the layout
Case = tuple[str, Any, tuple[Tensor, ...], str | None, str]
CASES: dict[str, Case] = {
    "sd-scripts": ("a.pt", {"emb_params": L}, (L,), None, "kohya"),
    "sd-scripts, SDXL": ("a.pt", {"clip_g": G, "clip_l": L}, (L, G), None, "kohya"),
    "sd-scripts, safetensors": ("a.safetensors", {"emb_params": L}, (L,), None, "kohya"),
    "half numbers": ("a.safetensors", {"emb_params": L.half()}, (L.half().float(),), None, "kohya"),
    "brain numbers": ("a.pt", {"emb_params": L.bfloat16()}, (L.bfloat16().float(),), None, "kohya"),
    "turned": ("a.pt", {"emb_params": L.T.contiguous().T}, (L,), None, "kohya"),
    "OneTrainer": ("a.safetensors", {"emp_params": L}, (L,), None, "kohya"),
    "one vector": ("a.pt", {"emb_params": L[0]}, (L[:1],), None, "kohya"),
    "one encoder's name": ("a.safetensors", {"clip_l": L}, (L,), None, "kohya"),
    "diffusers, pivotal": ("a.safetensors", {"text_encoders_0": L, "text_encoders_1": G}, (L, G), None, "kohya"),
    "A1111": ("a.pt", table(sd_checkpoint=None), (L,), "cat", "webui"),
    "A1111, .bin": ("a.bin", table(), (L,), "cat", "webui"),
    "the first of all": (
        "a.pt",
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": Old(**{"*": L}).table},
        (L,),
        None,
        "webui",
    ),
    "diffusers": ("learned_embeds.bin", {"<cat>": L}, (L,), "<cat>", "diffusers"),
    "diffusers, one vector": ("learned_embeds.bin", {"<cat>": L[1]}, (L[1:2],), "<cat>", "diffusers"),
    "diffusers, a vector each": (
        "a.safetensors",
        {"cat_2": L[2], "cat": L[0], "cat_1": L[1]},
        (L,),
        "cat",
        "diffusers",
    ),
    "a bare tensor": ("a.pt", L, (L,), None, "diffusers"),
    "a bare vector": ("a.bin", L[2], (L[2:],), None, "diffusers"),
    "a bundle": ("a.safetensors", {**LORA, "bundle_emb.cat.string_to_param.*": L}, (L,), "cat", "bundle"),
    "a bundle, SDXL": (
        "a.safetensors",
        {**LORA, "bundle_emb.my.cat.clip_g": G, "bundle_emb.my.cat.clip_l": L},
        (L, G),
        "my.cat",
        "bundle",
    ),
    "a bundle of a file as it was": ("a.pt", {**LORA, "bundle_emb.cat.emb_params": L}, (L,), "cat", "bundle"),
    "a bundle of a file of diffusers": ("a.pt", {"bundle_emb.cat.<my.cat>": L[0]}, (L[:1],), "cat", "bundle"),
    "safetensors by another name": ("a.bin", {"emb_params": L}, (L,), None, "kohya"),
}


def save(path: Path, content: Any, *, old: bool = False) -> Path:
    """By torch or by safetensors themselves."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32 and not mine.requires_grad
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_layout_is_read_and_its_header_says_the_same(case: str, old: bool, tmp_path: Path) -> None:
    name, content, vectors, token, layout = CASES[case]
    path = tmp_path / name
    if case == "safetensors by another name":
        save_file(content, path)
    else:
        save(path, content, old=old and case != "the first of all")
    found = read_embedding(path, "here")
    same(found.vectors, vectors)
    assert (found.token, found.layout) == (token, layout)
    header = read_embedding_header(path, "here")
    assert header.shapes == tuple((one.shape[0], one.shape[1]) for one in vectors)
    assert (header.token, header.layout) == (token, layout)
    assert header.tokens == (() if token is None else (token,))
    assert (header.vectors, header.widths) == (vectors[0].shape[0], tuple(one.shape[1] for one in vectors))


def test_the_token_chooses_in_a_file_of_several(tmp_path: Path) -> None:
    bundle = {**bundle_tensors({"cat": [L], "Dog": [L + 1]}), **LORA}
    path = save(tmp_path / "lora.safetensors", bundle)
    same(read_embedding(path, "here", "cat").vectors, (L,))
    same(read_embedding(path, "here", "dog").vectors, (L + 1,))
    assert [one.token for one in read_embeddings(path, "here")] == ["Dog", "cat"]
    header = read_embedding_header(path, "here", "cat")
    assert (header.token, set(header.tokens)) == ("cat", {"cat", "Dog"})
    for token in (None, "cow"):
        for read in (read_embedding, read_embedding_header):
            with pytest.raises(UserError, match=r"several tokens .*cat") as raised:
                read(path, "here", token)
            assert str(raised.value).startswith("here: ")
    only = save(tmp_path / "one.bin", {"<cat>": L})
    same(read_embedding(only, "here", "another name").vectors, (L,))
    two = save(tmp_path / "two.bin", {"<cat>": L, "<dog>": L[0], "<dog>_1": L[1]})
    same(read_embedding(two, "here", "<dog>").vectors, (L[:2],))


def test_tokens_with_dots_in_bundles(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", bundle_tensors({"my.cat": [L], "my.dog": [L + 1]}))
    same(read_embedding(path, "here", "my.dog").vectors, (L + 1,))
    with pytest.raises(ValueError, match="can't tell my_cat"):
        bundle_tensors({"my.cat": [L], "my_cat": [L]})


def test_vectors_behind_the_text_encoder_are_told_and_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = save(tmp_path / "a.safetensors", {"clip_l": L, "clip_g": G, "clip_l_out": L + 1, "clip_g_out": G + 1})
    same(read_embedding(both, "--weights a").vectors, (L, G))
    assert "--weights a: clip_g_out, clip_l_out is ignored" in capsys.readouterr().err
    assert read_embedding_header(both, "here").shapes == ((3, 8), (3, 12))
    bundled = {"bundle_emb.a.b.clip_l": L, "bundle_emb.a.b.clip_g": G, "bundle_emb.a.b.clip_l_out": L + 1}
    same(read_embedding(save(tmp_path / "b.safetensors", bundled), "here").vectors, (L, G))


BAD: dict[str, tuple[str, Any, str]] = {
    "a LoRA": ("a.safetensors", LORA, "is a LoRA without embeddings"),
    "no vectors": ("a.pt", {"name": "cat", "step": 3}, "holds no vectors"),
    "whole numbers": ("a.safetensors", {"emb_params": torch.arange(6).reshape(2, 3)}, "holds no vectors"),
    "a model": ("a.safetensors", {"x.weight": torch.zeros(2, 3), "x.bias": torch.zeros(2)}, "is no embedding"),
    "convolutions": ("a.ckpt", {"x": torch.zeros(2, 3, 1, 1)}, "is no embedding"),
    "three dimensions": ("a.pt", {"emb_params": L[None]}, r"shape \[1, 3, 8\]"),
    "none at all": ("a.pt", {"emb_params": L[:0]}, r"shape \[0, 8\]"),
    "other counts": ("a.pt", {"clip_l": L[:2], "clip_g": G}, "2 for clip_l and 3 for clip_g"),
    "SD3": ("a.safetensors", {"clip_l": L, "clip_g": G, "t5xxl": G}, "t5xxl beside clip_l and clip_g"),
    "Flux": ("a.safetensors", {"clip_l": L, "t5": G}, "clip_l and t5"),
    "a strange bundle": ("a.safetensors", {"bundle_emb.cat.t5": L}, "unknown kind"),
    "half a mixture": (
        "a.safetensors",
        {"bundle_emb.cat.clip_l": L, "bundle_emb.cat.string_to_param.*": L + 1},
        "don't go together",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_embedding_is_refused_alike_by_both_readers(case: str, tmp_path: Path) -> None:
    name, content, says = BAD[case]
    path = save(tmp_path / name, content)
    for read in (read_embedding, read_embedding_header):
        with pytest.raises(UserError, match=says) as raised:
            read(path, "--weights x")
        (problem,) = raised.value.problems
        assert problem.where == "--weights x" and problem.advice


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_damaged_and_missing_files_are_refused(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / name, {"emb_params": L})
    path.write_bytes(path.read_bytes()[:-30])
    for read in (read_embedding, read_embedding_header):
        with pytest.raises(UserError, match=r"truncated|can't be read|damaged"):
            read(path, "here")
        with pytest.raises(UserError, match="there is no such"):
            read(tmp_path / "none.pt", "here")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(number: float, tmp_path: Path) -> None:
    bad = L.clone()
    bad[1, 2] = number
    with pytest.raises(UserError, match="not finite"):
        read_embedding(save(tmp_path / "a.pt", {"emb_params": bad}), "here")


class Evil:
    """Would run a program when unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.made = (call, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.made


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_pickle_never_runs(old: bool, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = save(tmp_path / "a.bin", {"<cat>": L, "x": Evil(os.system, f"touch {mark}")}, old=old)
    for read in (read_embedding, read_embedding_header):
        with pytest.raises(UserError, match="could run code"):
            read(path, "here")
    assert not mark.exists()


def test_the_files_are_what_each_program_looks_for(tmp_path: Path) -> None:
    """The rows of INTEROP's tables: names, shapes and nothing besides."""

    def write(name: str, layout: Any, *vectors: Tensor) -> Path:
        assert write_embedding(tmp_path / name, vectors, layout, "<my cat>", None, {"ss_steps": "12"}) == []
        return tmp_path / name

    kohya = torch.load(write("k.pt", "kohya", L), weights_only=True)
    assert kohya.keys() == {"emb_params"} and torch.equal(kohya["emb_params"], L)
    kohya = load_file(write("k.safetensors", "kohya", L, G))
    assert kohya.keys() == {"clip_l", "clip_g"} and torch.equal(kohya["clip_g"], G)
    webui = torch.load(write("webui/w.pt", "webui", L), weights_only=True)
    assert list(webui["string_to_param"]) == ["*"] and torch.equal(webui["string_to_param"]["*"], L)
    assert (webui["string_to_token"], webui["name"], webui["step"]) == ({"*": 265}, "<my cat>", 12)
    assert webui["sd_checkpoint"] is None
    webui = torch.load(write("webui/x.pt", "webui", L, G), weights_only=True)
    assert {name: tuple(t.shape) for name, t in webui.items()} == {"clip_l": (3, 8), "clip_g": (3, 12)}
    diffusers = load_file(write("diffusers/d.safetensors", "diffusers", G))
    assert diffusers.keys() == {"<my cat>"} and torch.equal(diffusers["<my cat>"], G)
    bundle = load_file(write("b.safetensors", "bundle", L, G))
    assert bundle.keys() == {"bundle_emb.<my cat>.clip_l", "bundle_emb.<my cat>.clip_g"}
    with pytest.raises(ValueError, match="one text encoder"):
        write("d.safetensors", "diffusers", L, G)
    assert tensor_names("bundle", "my.cat", 1) == ("bundle_emb.my_cat.string_to_param.*",)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("a.pt", "kohya"), ("a.safetensors", "kohya"), ("a.pt", "webui"), ("a.safetensors", "bundle")],
)
@pytest.mark.parametrize("encoders", [1, 2])
def test_what_is_written_is_read_again(
    name: str, layout: Any, dtype: torch.dtype | None, encoders: int, tmp_path: Path
) -> None:
    vectors = tuple(nn.Parameter(one.clone()) for one in (L, G)[:encoders])
    write_embedding(tmp_path / name, vectors, layout, "cat", dtype, {})
    expected = tuple(one.detach().to(dtype or torch.float32).float() for one in vectors)
    found = read_embedding(tmp_path / name, "here")
    same(found.vectors, expected)
    assert found.layout == ("kohya" if (layout, encoders) == ("webui", 2) else layout)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_only_safetensors_carry_metadata_and_bytes_are_the_same_again(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        write_embedding(tmp_path / name, [L], "kohya", "cat", None, {"ss_token_string": "cat", "é": "ü"})
    assert read_metadata(tmp_path / "a.safetensors") == {"ss_token_string": "cat", "é": "ü"}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert read_embedding(tmp_path / "a.safetensors", "here").token == "cat"
    assert read_embedding_header(tmp_path / "a.safetensors", "here").token == "cat"


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_bad_file_does_not_replace_a_good_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_embedding(path, [L], "kohya", "cat", None, {})
    before = path.read_bytes()
    with pytest.raises(BadWeightsError, match=rf"{name}.*not finite"):
        write_embedding(path, [L * 1e6], "kohya", "cat", torch.float16, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_check_finds_other_shapes_and_tells_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert write_embedding(path, [torch.cat([L, L[:1] * 0])], "kohya", "cat", None, {}) == [
        f"{path}: 1 of its vectors are all zero"
    ]
    assert len(check_embedding_file(path, [(4, 8)])) == 1
    with pytest.raises(BadWeightsError, match=r"\(4, 8\).*\(3, 8\)"):
        check_embedding_file(path, [(3, 8)])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadWeightsError, match="can't be read"):
        check_embedding_file(path, [(4, 8)])
    two = save(tmp_path / "two.safetensors", {**bundle_tensors({"cat": [L], "dog": [L[:1]]}), **LORA})
    assert check_embedding_file(two, [(1, 8)], "dog") == []


def test_names_of_files() -> None:
    assert layout_files("cat", "kohya", 2, ".pt") == (("cat.pt", (0, 1)), ("cat.safetensors", (0, 1)))
    assert layout_files("cat", "kohya", 1) == (("cat.safetensors", (0,)),)
    assert layout_files("cat", "webui", 1) == (("webui/cat.pt", (0,)),)
    assert layout_files("cat", "diffusers", 1) == (("diffusers/cat.safetensors", (0,)),)
    assert layout_files("cat", "diffusers", 2) == (
        ("diffusers/cat.clip_l.safetensors", (0,)),
        ("diffusers/cat.clip_g.safetensors", (1,)),
    )
    assert layout_files("cat", "bundle", 2) == (("cat.bundle.safetensors", (0, 1)),)


def test_tokens_in_names_of_files() -> None:
    assert file_bases("run", ["<cat>"], alone=True) == ("run",)
    assert file_bases("run", ["<cat>"], alone=False) == ("run-cat",)
    assert file_bases("run", ["000002", "step9", "Best-x"], alone=False) == (
        *("run-token-000002", "run-token-step9", "run-token-Best-x"),
    )
    assert file_bases("run", ["<cat>", "CAT", "a/b:c", "???"], alone=True) == (
        "run-cat",
        "run-CAT-2",
        "run-a_b_c",
        "run-token",
    )
