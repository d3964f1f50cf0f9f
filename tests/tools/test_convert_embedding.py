"""tools/convert_embedding.py: no number changes on the way from any layout to any other, into a LoRA's file and out."""

import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.weights.embeddings import read_embedding, write_embedding
from library.weights.files import read_metadata
from library.weights.hashes import lora_hashes
from library.weights.save import save_lora
from tests.programs import ROOT, tool

SCRIPT = ROOT / "tools/convert_embedding.py"
L = torch.arange(24, dtype=torch.float32).reshape(3, 8) / 7 - 1
G = torch.arange(36, dtype=torch.float32).reshape(3, 12) / 5 + 1
METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_token_string": "<cat>",
    "ss_network_module": "networks.lora",
    "modelspec.architecture": "stable-diffusion-v1/textual-inversion",
    "modelspec.trigger_phrase": "<cat>",
    "modelspec.hash_sha256": "old",
    "usage_a1111": "old",
    "other": "kept in a LoRA",
}
LORA_METADATA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "2",
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "other": "kept",
}


def convert(*words: object) -> int:
    """The tool's `main`."""
    return tool("convert_embedding")([str(word) for word in words])


def lora(path: Path, width: int = 8) -> dict[str, Tensor]:
    """A LoRA on a layer that takes text of this width."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    down, up = torch.randn(2, width).half(), torch.randn(4, 2).half()
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_lora(tensors, path, LORA_METADATA)
    return tensors


def same(path: Path, *expected: Tensor, token: str | None = None) -> None:
    found = read_embedding(path, str(path), token).vectors
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_round_the_houses_with_one_text_encoder(tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    write_embedding(start, [L], "kohya", "<cat>", None, METADATA)
    steps = [
        ("webui", "a.pt"),
        ("diffusers", "b.bin"),
        ("kohya", "c.pt"),
        ("bundle", "d.safetensors"),
        ("diffusers", "e.safetensors"),
        ("kohya", "f.safetensors"),
    ]
    paths = [start, *(tmp_path / name for _, name in steps)]
    for (layout, _), (before, after) in zip(steps, pairwise(paths), strict=True):
        assert convert("--to", layout, "--token", "<cat>", before, after) == 0
        same(after, L)
        assert read_embedding(after, "here").layout == layout
    webui = torch.load(paths[1], weights_only=True)
    assert webui["name"] == "<cat>" and list(webui["string_to_param"]) == ["*"]
    assert list(torch.load(paths[2], weights_only=True)) == ["<cat>"]
    assert list(load_file(paths[-1])) == ["emb_params"]


def test_two_text_encoders_and_their_two_files_for_diffusers(tmp_path: Path) -> None:
    start = tmp_path / "start.pt"
    write_embedding(start, [L, G], "kohya", "<cat>", None, {})
    assert convert("--to", "diffusers", "--token", "<cat>", start, tmp_path / "d.safetensors") == 0
    files = [tmp_path / "d.clip_g.safetensors", tmp_path / "d.clip_l.safetensors"]
    assert sorted(tmp_path.glob("d.*")) == files
    for path, vectors in zip(files, (G, L), strict=True):
        assert torch.equal(load_file(path)["<cat>"], vectors)
        number = "_2" if path == files[0] else ""
        assert f"text_encoder=pipe.text_encoder{number}," in read_metadata(path)["usage_diffusers"]
    assert convert("--to", "kohya", *files, tmp_path / "again.safetensors") == 0
    same(tmp_path / "again.safetensors", L, G)
    assert read_embedding(tmp_path / "again.safetensors", "here").token == "<cat>"
    assert convert("--to", "webui", tmp_path / "again.safetensors", tmp_path / "w.pt") == 0
    assert torch.load(tmp_path / "w.pt", weights_only=True).keys() == {"clip_l", "clip_g"}


def test_the_text_of_a_file_goes_along_as_far_as_it_stays_true(tmp_path: Path) -> None:
    start, end = tmp_path / "start.safetensors", tmp_path / "end.safetensors"
    write_embedding(start, [L], "kohya", "<cat>", None, METADATA)
    assert convert("--to", "kohya", start, end) == 0
    found = read_metadata(end)
    assert found.pop("usage_a1111") == "put the file into embeddings/ and write end"
    assert {name: text for name, text in found.items() if not name.startswith("usage_")} == {
        "ss_base_model_version": "sd_v1",
        "ss_token_string": "<cat>",
        "ss_num_vectors_per_token": "3",
        "modelspec.architecture": "stable-diffusion-v1/textual-inversion",
        "modelspec.trigger_phrase": "<cat>",
    }
    assert convert("--to", "kohya", "--token", "dog", start, end) == 0
    found = read_metadata(end)
    assert (found["ss_token_string"], found["modelspec.trigger_phrase"]) == ("dog", "dog")


def test_a_file_without_a_token_is_called_after_itself(tmp_path: Path) -> None:
    torch.save({"emb_params": L}, tmp_path / "mycat.pt")
    assert convert("--to", "diffusers", tmp_path / "mycat.pt", tmp_path / "x.safetensors") == 0
    assert list(load_file(tmp_path / "x.safetensors")) == ["mycat"]


@pytest.mark.parametrize("encoders", [1, 2])
def test_into_a_lora_and_out_again(encoders: int, tmp_path: Path) -> None:
    vectors = {"cat": (L, G)[:encoders], "<dog>": (L + 1, G + 1)[:encoders]}
    tensors = lora(tmp_path / "style.safetensors", sum(one.shape[1] for one in vectors["cat"]))
    files = []
    for number, (token, some) in enumerate(vectors.items()):
        files.append(tmp_path / f"{number}.safetensors")
        write_embedding(files[-1], some, "kohya", token, None, {"ss_token_string": token})
    bundled = tmp_path / "style.bundle.safetensors"
    assert convert("--to", "bundle", "--lora", tmp_path / "style.safetensors", *files, bundled) == 0
    parts = ("clip_g", "clip_l") if encoders == 2 else ("string_to_param.*",)
    keys = {f"bundle_emb.{token}.{part}" for token in vectors for part in parts}
    assert load_file(bundled).keys() == tensors.keys() | keys
    found = read_metadata(bundled)
    assert LORA_METADATA.items() <= found.items()
    assert found["usage_a1111"].endswith("<lora:style.bundle:1> cat <dog>")
    assert found["sshs_model_hash"] == lora_hashes(load_file(bundled), found).model

    assert convert("--to", "kohya", "--token", "<dog>", bundled, tmp_path / "dog.pt") == 0
    same(tmp_path / "dog.pt", *vectors["<dog>"])

    assert convert("--to", "separate", bundled, tmp_path / "out") == 0
    names = ["style-cat.safetensors", "style-dog.safetensors", "style.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    before, after = tmp_path / "style.safetensors", tmp_path / "out/style.safetensors"
    assert read_metadata(after) == read_metadata(before)
    assert load_file(after).keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(after).items())
    for token in vectors:
        path = tmp_path / f"out/style-{token.strip('<>')}.safetensors"
        same(path, *vectors[token])
        found = read_metadata(path)
        assert (found["ss_token_string"], found["ss_base_model_version"]) == (token, "sd_v1")
        assert found["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
        assert "ss_network_module" not in found and "sshs_model_hash" not in found


def test_a_bundle_of_embeddings_alone(tmp_path: Path) -> None:
    torch.save({"emb_params": L}, tmp_path / "a.pt")
    torch.save({"emb_params": L + 1}, tmp_path / "b.pt")
    out = tmp_path / "both.safetensors"
    assert convert("--to", "bundle", "--token=x", "--token=y.z", tmp_path / "a.pt", tmp_path / "b.pt", out) == 0
    same(out, L, token="x")
    same(out, L + 1, token="y_z")
    assert convert("--to", "separate", out, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "both-x.safetensors",
        "both-y_z.safetensors",
    ]


def test_halves_of_several_embeddings_find_each_other(tmp_path: Path) -> None:
    """In the order in which a shell lists them; metadata that tell of two text encoders don't disturb."""
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    for number, token in enumerate(("cat", "dog")):
        for part, vectors in (("clip_g", G), ("clip_l", L)):
            save_file({token: vectors + number}, tmp_path / f"{token}.{part}.safetensors", metadata)
    files = sorted(tmp_path.iterdir(), key=lambda path: (path.suffixes, path.name))
    both = tmp_path / "both.safetensors"
    assert convert("--to", "bundle", *files, both) == 0
    same(both, L, G, token="cat")
    same(both, L + 1, G + 1, token="dog")
    assert convert("--to", "kohya", *files[1::2], tmp_path / "dog.safetensors") == 0
    same(tmp_path / "dog.safetensors", L + 1, G + 1)


HALF, OTHER = "cat.clip_l.safetensors", "cat.clip_g.safetensors"
BAD = {
    "no embedding": (["--to", "webui", "lora.safetensors", "o.pt"], "is a LoRA without embeddings"),
    "no file": (["--to", "webui", "none.pt", "o.pt"], "no such embedding file"),
    "the ending": (
        ["--to", "webui", "a.pt", "o.safetensors"],
        "o.safetensors: ends in .safetensors; webui files are .pt, .bin or .ckpt",
    ),
    "no ending": (["--to", "kohya", "a.pt", "o"], "o: has no ending; kohya files are .safetensors, .pt, .bin or .ckpt"),
    "a bundle's ending": (["--to", "bundle", "a.pt", "o.pt"], "ends in .pt; bundle files are .safetensors"),
    "several tokens": (
        ["--to", "kohya", "two.safetensors", "o.pt"],
        "several tokens (x, y); name one, such as --token x, or use",
    ),
    "a truncated file": (
        ["--to", "kohya", "short.pt", "o.pt"],
        "short.pt: the file holds only 8 bytes, it is truncated",
    ),
    "a truncated bundle": (["--to", "separate", "short.pt", "o"], "holds only 8 bytes, it is truncated"),
    "one truncated of two": (["--to", "bundle", "a.pt", "short.pt", "o.safetensors"], "holds only 8 bytes"),
    "a pickle that runs": (
        ["--to", "kohya", "unsound.pt", "o.pt"],
        "unsound.pt: the pickle needs os.system, which could run code; it is not read; take it as .safetensors\n",
    ),
    "one half": (
        ["--to", "kohya", HALF, "o.pt"],
        f"{HALF}: is the clip_l half of an SDXL embedding; give {OTHER}, too",
    ),
    "half in a bundle": (["--to", "bundle", HALF, "a.pt", "o.safetensors"], f"half of an SDXL embedding; give {OTHER}"),
    "halves of two": (["--to", "kohya", HALF, OTHER, "o.pt"], f"but {OTHER} has another token, or another number"),
    "an unknown token": (["--to", "kohya", "--token", "z", "two.safetensors", "o.pt"], "none of which is 'z'"),
    "two embeddings": (["--to", "kohya", "a.pt", "b.pt", "o.pt"], "is another embedding"),
    "tokens too many": (["--to", "kohya", "--token=x", "--token=y", "a.pt", "o.pt"], "stands twice"),
    "tokens too few": (["--to", "bundle", "--token=x", "a.pt", "b.pt", "o.safetensors"], "1 tokens for 2 embeddings"),
    "the same token": (
        ["--to", "bundle", "--token=x", "--token=x", "a.pt", "b.pt", "o.safetensors"],
        "a second embedding of x",
    ),
    "families": (["--to", "bundle", "a.pt", "xl.pt", "o.safetensors"], "another family than the first"),
    "a LoRA's family": (
        ["--to", "bundle", "--lora", "wide.safetensors", "a.pt", "o.safetensors"],
        "takes text of 20 numbers, the embeddings make 8",
    ),
    "no LoRA": (["--to", "bundle", "--lora", "two.safetensors", "a.pt", "o.safetensors"], "is no LoRA"),
    "a LoRA elsewhere": (["--to", "kohya", "--lora", "lora.safetensors", "a.pt", "o.pt"], "has no meaning"),
    "no bundle": (["--to", "separate", "a.pt", "o"], "is no bundle but one embedding (kohya)"),
    "no folder": (["--to", "separate", "two.safetensors", "a.pt"], "is a file"),
    "tokens apart": (["--to", "separate", "--token", "x", "two.safetensors", "o"], "has no meaning"),
    "two bundles": (["--to", "separate", "two.safetensors", "two.safetensors", "o"], "one file too many"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_cannot_convert_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"emb_params": L}, "a.pt")
    torch.save({"emb_params": L + 1}, "b.pt")
    torch.save({"clip_l": L, "clip_g": G}, "xl.pt")
    lora(Path("lora.safetensors"))
    lora(Path("wide.safetensors"), 20)
    save_file({"bundle_emb.x.string_to_param.*": L, "bundle_emb.y.string_to_param.*": L + 1}, "two.safetensors")
    Path("short.pt").write_bytes(b"12345678")
    with zipfile.ZipFile("unsound.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    for name, vectors in ((HALF, L), (OTHER, G[:2])):
        save_file({"cat": vectors}, name, {"ss_base_model_version": "sdxl_base_v1-0"})
    before = sorted(tmp_path.iterdir())
    words, says = BAD[case]
    assert convert(*words) == 2
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_token_is_not_bundled_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora(tmp_path / "lora.safetensors")
    torch.save({"emb_params": L}, tmp_path / "cat.pt")
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    assert convert("--to", "bundle", "--lora", tmp_path / "lora.safetensors", tmp_path / "cat.pt", once) == 0
    assert convert("--to", "bundle", "--lora", once, tmp_path / "cat.pt", twice) == 2
    assert "has bundle_emb.cat.string_to_param.* already" in capsys.readouterr().err
    assert not twice.exists()


def test_a_bundle_is_not_overwritten_by_its_own_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora(tmp_path / "lora.safetensors")
    torch.save({"emb_params": L}, tmp_path / "cat.pt")
    made = tmp_path / "made.safetensors"
    assert convert("--to", "bundle", "--lora", tmp_path / "lora.safetensors", tmp_path / "cat.pt", made) == 0
    content = made.read_bytes()
    assert convert("--to", "separate", made, tmp_path) == 2
    assert "is the bundle itself" in capsys.readouterr().err
    assert made.read_bytes() == content
