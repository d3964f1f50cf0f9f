"""tools/extract_lora_from_dylora.py: every file computes what the training computed with so many ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from library.models.lora_targets import LoraTarget
from library.weights.files import read_metadata
from library.weights.hashes import lora_hashes
from library.weights.loras.lora import read, write
from library.weights.save import save_lora
from networks import dylora, lora
from networks.lora_args import LoraArgs
from networks.lora_layers import RandomContext
from tests import lora_files
from tests.networks.tiny_families import fill, forward, load_text_encoder, load_unet
from tests.programs import ROOT, tool

SCRIPT = ROOT / "tools/extract_lora_from_dylora.py"
METADATA = {
    "ss_network_module": "networks.dylora",
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_network_args": json.dumps({"dropout": None, "unit": "2", "conv_dim": "8", "conv_alpha": "2"}),
    "ss_training_comment": "None",
    "ss_v2": "False",
    "modelspec.title": "thing",
    "modelspec.hash_sha256": "old",
}


def extract(*words: object) -> int:
    """The tool's `main`."""
    return tool("extract_lora_from_dylora")([str(word) for word in words])


@pytest.fixture
def trained(tiny_sd1: Path, tmp_path: Path) -> Path:
    """A file as a training leaves it: rank 8, alpha 4, convolutions with alpha 2."""
    unet, text_encoder = load_unet(tiny_sd1), load_text_encoder(tiny_sd1)
    args: dict[str, Any] = {"unit": "2", "conv_dim": "8", "conv_alpha": "2"}
    network = dylora.create_network(1.0, 8, 4.0, None, text_encoder, unet, **args)
    network.apply_to(text_encoder, unet)
    fill(network)
    network.save_weights(tmp_path / "trained.safetensors", None, METADATA)
    return tmp_path / "trained.safetensors"


def test_a_file_for_every_multiple_of_the_unit(trained: Path, tmp_path: Path) -> None:
    assert extract("--model", trained, "--save_to", tmp_path / "out/cut.safetensors") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"cut-{rank:04d}.safetensors" for rank in (2, 4, 6)
    ]
    whole = load_file(trained)
    for rank in (2, 4, 6):
        path = tmp_path / f"out/cut-{rank:04d}.safetensors"
        tensors, metadata = load_file(path), read_metadata(path)
        assert tensors.keys() == whole.keys()
        for key, tensor in tensors.items():
            if key.endswith("down.weight"):
                assert torch.equal(tensor, whole[key][:rank])
            elif key.endswith("up.weight"):
                assert torch.equal(tensor, whole[key][:, :rank])
            else:
                assert float(tensor) == pytest.approx(float(whole[key]) * (rank / 8) ** 0.5)
        hashes = lora_hashes(tensors, metadata)
        assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == (hashes.model, hashes.legacy)
        assert metadata["sshs_model_hash"] != read_metadata(trained)["sshs_model_hash"]
        assert metadata["ss_network_dim"] == str(rank)
        assert float(metadata["ss_network_alpha"]) == pytest.approx(4 * (rank / 8) ** 0.5)
        arguments = json.loads(metadata["ss_network_args"])
        assert arguments["conv_dim"] == str(rank)
        assert float(arguments["conv_alpha"]) == pytest.approx(2 * (rank / 8) ** 0.5)
        assert metadata["ss_training_comment"] == f"split from DyLoRA, rank 8 to {rank}"
        assert metadata["modelspec.title"] == "thing"
        assert "modelspec.hash_sha256" not in metadata


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_a_cut_file_is_the_function_that_was_trained(kind: str, tmp_path: Path) -> None:
    """Layer by layer: for every block that a training forward may draw."""
    size = () if kind == "linear" else (3, 3)
    base = torch.nn.Linear(5, 7) if kind == "linear" else torch.nn.Conv2d(5, 7, 3, padding=1)
    base.requires_grad_(False)
    target = LoraTarget("lora_unet_x", "unet", "x", 5, 7, "linear" if kind == "linear" else "3x3")
    context = RandomContext(1, 0, 0, (0,))
    layer = dylora.DyloraLayer(target, base, 8, 3.0, LoraArgs(8, 3.0), context)
    layer.unit = 2
    fill(layer, 1.0)
    names = {"alpha": layer.alpha, "lora_down.weight": layer.lora_down.weight, "lora_up.weight": layer.lora_up.weight}
    file = tmp_path / "one.safetensors"
    save_lora({f"lora_unet_x.{name}": tensor.detach() for name, tensor in names.items()}, file, METADATA)
    assert extract("--model", file, "--save_to", tmp_path / "cut.safetensors") == 0
    x = torch.randn(2, 5, *((4, 4) if size else ()))
    plain = base(x)
    layer.attach()
    seen = set()
    for context.index in range(24):
        kept = layer._block() + 2
        seen.add(kept)
        if kept < 8:
            tensors = load_file(tmp_path / f"cut-{kept:04d}.safetensors")
            down, up = tensors["lora_unet_x.lora_down.weight"], tensors["lora_unet_x.lora_up.weight"]
            delta = float(tensors["lora_unet_x.alpha"]) / kept * (up.flatten(1) @ down.flatten(1))
            added = x @ delta.T if not size else torch.nn.functional.conv2d(x, delta.view(7, 5, 3, 3), padding=1)
            torch.testing.assert_close(base(x) - plain, added, rtol=1e-4, atol=1e-4)
    assert seen == {2, 4, 6, 8}


def test_our_network_and_diffusers_load_a_cut_file(trained: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    assert extract("--model", trained, "--save_to", tmp_path / "cut.safetensors", "--unit", 4) == 0
    path = tmp_path / "cut-0004.safetensors"
    unet, text_encoder = load_unet(tiny_sd1), load_text_encoder(tiny_sd1)
    network, _ = lora.create_network_from_weights(1.0, path, None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    network.load_weights(path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.load_lora_weights(path)
    expected = forward(pipeline.unet, pipeline.text_encoder)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-4, atol=1e-4)


def test_alphas_of_lycoris_stay_and_torch_files_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "lora_unet_x.lora_down.weight": torch.randn(4, 3),
        "lora_unet_x.lora_up.weight": torch.randn(3, 4),
        "lora_unet_x.alpha": torch.tensor(2.0),
    }
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "dylora", "block_size": "2"}'}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert extract("--model", tmp_path / "a.safetensors", "--save_to", tmp_path / "b.pt") == 0
    cut = torch.load(tmp_path / "b-0002.pt", weights_only=True)
    assert cut["lora_unet_x.alpha"] == 2.0
    assert not (tmp_path / "b-0001.pt").exists()
    assert "its metadata" not in capsys.readouterr().err
    torch.save(tensors, tmp_path / "c.ckpt")
    assert extract("--model", tmp_path / "c.ckpt", "--save_to", tmp_path / "d.safetensors") == 0
    assert "c.ckpt: its metadata don't say how it was trained" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("d-*")) == [f"d-000{rank}.safetensors" for rank in (1, 2, 3)]


@pytest.mark.parametrize(
    ("change", "words", "says"),
    [
        ("", ["--unit", "8"], "below the file's rank 8"),
        ("", ["--unit", "0"], "--unit"),
        ("", ["--save_to", "x.bin"], "ends in .bin"),
        ("missing", [], "no such weight file"),
        ("other", [], "LoHa"),
    ],
)
def test_what_it_cannot_cut_is_one_line(
    change: str, words: list[str], says: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "none.safetensors" if change == "missing" else trained
    if change == "other":
        save_file({"lora_unet_x.hada_w1_a": torch.zeros(1)}, model)
    before = set(tmp_path.iterdir())
    assert extract("--model", model, "--save_to", tmp_path / "cut.safetensors", *words) == 2
    assert says in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("module", "args", "words", "says"),
    [
        ("networks.lora", {}, [], "was trained by networks.lora"),
        ("networks.lora_fa", {"unit": "2"}, ["--unit", "2"], "was trained by networks.lora_fa"),
        ("lycoris.kohya", {"algo": "LoCon"}, [], "was trained by lycoris.kohya algo=locon"),
        ("lycoris.kohya", {}, [], "was trained by lycoris.kohya algo=lora"),
        ("lycoris.kohya", {"algo": "dylora"}, ["--unit", "2"], "units of 4"),
        ("networks.dylora", {"unit": "2"}, ["--unit", "3"], "3, but the file was trained in units of 2"),
        ("networks.dylora", {"unit": "4"}, ["--unit", "2"], "2, but the file was trained in units of 4"),
        ("networks.dylora", {}, ["--unit", "3"], None),
        ("networks.dylora", {"unit": "2"}, ["--unit", "4"], None),
    ],
)
def test_what_contradicts_the_metadata_is_refused(
    module: str,
    args: dict[str, str],
    words: list[str],
    says: str | None,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = {"ss_network_module": module, "ss_network_args": json.dumps(args)}
    save_file(load_file(trained), trained, told)
    assert extract("--model", trained, "--save_to", tmp_path / "cut.safetensors", *words) == (2 if says else 0)
    error = capsys.readouterr().err
    assert (says or "rank") in error
    assert "metadata" not in error
    assert bool(list(tmp_path.glob("cut*"))) == (says is None)


def test_any_layout_is_cut_and_kept(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.safetensors"
    write(read(trained), path, layout="peft")
    for model in (trained, path):
        assert extract("--model", model, "--save_to", tmp_path / f"{model.stem}-cut.safetensors", "--unit", 4) == 0
    ours, cut = (read(tmp_path / f"{model.stem}-cut-0004.safetensors") for model in (trained, path))
    assert cut.layout == "peft"
    assert cut.modules.keys() == ours.modules.keys()
    for name, module in cut.modules.items():
        assert module.alpha == pytest.approx(ours.modules[name].alpha)
        assert all(torch.equal(tensor, ours.modules[name].leaves[leaf]) for leaf, tensor in module.leaves.items())
    save_file(load_file(path), path)
    assert extract("--model", path, "--save_to", tmp_path / "other.safetensors") == 2
    assert "is a file of peft, which trains no DyLoRA" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["place", "pickle", "nan", "factors", "folder"])
def test_damage_is_one_line(what: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, target = trained, tmp_path / "cut.safetensors"
    if what == "place":
        target = trained / "x.safetensors"
    elif what == "pickle":
        model = tmp_path / "a.pt"
        model.write_bytes(b"abc")
    elif what == "nan":
        lora_files.damage(trained, "nan")
    elif what == "folder":
        model = tmp_path
    else:
        key = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
        save_file(load_file(trained) | {key: torch.ones(7, 64, 1, 1)}, trained, METADATA)
    assert extract("--model", model, "--save_to", target) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    assert not list(tmp_path.glob("cut*"))
