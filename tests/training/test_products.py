"""The files that runs of every kind leave: which, what stands in them and what they tell; a bad one replaces none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.weights.files import read_metadata
from tests.embedding_runs import LORA, names
from tests.pictures import make_pictures

pytestmark = pytest.mark.xdist_group("products")
Finder = Callable[[str], Path]
EVERY = ("--save_embedding_as", "webui", "diffusers", "bundle")
WIDTHS = {"sd1": {"emb_params": 32}, "sdxl": {"clip_l": 32, "clip_g": 64}}
BUNDLED = {"sd1": ("string_to_param.*",), "sdxl": ("clip_l", "clip_g")}
ONE = ("--token_string", "blorp")
TWO = ("--token_string", "blorp", "<tag0>", "--num_vectors_per_token", "1", "2")


class Saves:
    """What runs on two pictures left, by their arguments."""

    def __init__(self, models: Finder, root: Path) -> None:
        self.models, self.root = models, root
        self._kept: dict[tuple[str, ...], Path] = {}
        make_pictures(root / "pictures", count=2, name="blorp", sizes=((64, 64),))
        for text in root.rglob("*.txt"):
            text.write_text("a blorp, <tag0>, red\n")

    def __call__(self, *flags: str, model: str = "sd1") -> Path:
        """The output folder of a run of one step."""
        line = (model, *flags)
        if line not in self._kept:
            self._kept[line] = self.root / f"output{len(self._kept)}"
            assert self.run(self._kept[line], *flags, model=model) == 0
        return self._kept[line]

    def run(self, output: Path, *flags: str, model: str = "sd1") -> int:
        """The exit code of one."""
        from train_network import main as both
        from train_textual_inversion import main as alone

        main = both if "--network_module" in flags else alone
        return main(
            [
                *(
                    "--pretrained_model_name_or_path",
                    str(self.models(model)),
                    "--train_data_dir",
                    f"{self.root}/pictures",
                ),
                *(
                    "--output_dir",
                    str(output),
                    "--output_name",
                    "x",
                    "--resolution",
                    "64",
                    "--caption_extension",
                    ".txt",
                ),
                *("--learning_rate", "1e-2", "--seed", "3", "--max_train_steps", "1"),
                *("--max_data_loader_n_workers", "0", *flags),
            ]
        )


@pytest.fixture(scope="module")
def saves(tiny_models: Finder, tmp_path_factory: pytest.TempPathFactory) -> Saves:
    return Saves(tiny_models, tmp_path_factory.mktemp("products"))


def read(path: Path) -> dict[str, Tensor]:
    """A file's tensors by other programs' means; of a table around one, that one."""
    if path.suffix == ".safetensors":
        return load_file(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    if "string_to_param" in found:
        assert found["string_to_token"] == {"*": 265} and found["name"] and found["step"] == 1
        found = {"emb_params": found["string_to_param"]["*"]}
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def further(base: str, model: str) -> set[str]:
    """The names of one token's files in the layouts of A1111 and diffusers."""
    parts = ("",) if model == "sd1" else (".clip_l", ".clip_g")
    return {f"webui/{base}.pt", *(f"diffusers/{base}{part}.safetensors" for part in parts)}


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize(("kind", "endings"), [("", "pt"), ("pt", "pt"), ("ckpt", "ckpt"), ("safetensors", "")])
def test_an_only_token_has_the_name_of_the_run(saves: Saves, kind: str, endings: str, model: str) -> None:
    folder = saves(*ONE, *(("--save_model_as", kind) if kind else ()), *EVERY, model=model)
    usual = {"x.safetensors", *(f"x.{one}" for one in endings.split())}
    assert names(folder) == usual | further("x", model) | {"x.bundle.safetensors"}
    found = read(folder / "x.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: (1, width) for name, width in WIDTHS[model].items()
    }
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    for name in (*usual, "webui/x.pt"):
        assert equal(read(folder / name), found), name
    holds(folder, "x", "blorp", found, model)


def holds(folder: Path, base: str, token: str, found: dict[str, Tensor], model: str) -> None:
    """The files for diffusers, and the bundle, have a token's vectors."""
    for key, tensor in found.items():
        part = "" if model == "sd1" else f".{key}"
        assert equal(read(folder / f"diffusers/{base}{part}.safetensors"), {token: tensor})
    bundle = read(folder / "x.bundle.safetensors")
    for name, key in zip(BUNDLED[model], WIDTHS[model], strict=True):
        assert torch.equal(bundle[f"bundle_emb.{token}.{name}"], found[key])


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_several_tokens_have_files_of_their_own_and_one_bundle(saves: Saves, model: str) -> None:
    folder = saves(*TWO, *EVERY, model=model)
    expected = {"x.bundle.safetensors"}
    for base in ("x-blorp", "x-tag0"):
        expected |= {f"{base}.pt", f"{base}.safetensors"} | further(base, model)
    assert names(folder) == expected
    for base, token, count in (("x-blorp", "blorp", 1), ("x-tag0", "<tag0>", 2)):
        found = read(folder / f"{base}.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
            name: (count, width) for name, width in WIDTHS[model].items()
        }
        assert equal(read(folder / f"{base}.pt"), found) and equal(read(folder / f"webui/{base}.pt"), found)
        holds(folder, base, token, found, model)
    assert len(read(folder / "x.bundle.safetensors")) == 2 * len(WIDTHS[model])


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt"])
def test_a_network_with_its_word(saves: Saves, kind: str, model: str) -> None:
    folder = saves(*LORA, *ONE, "--save_model_as", kind, *EVERY, model=model)
    expected = {f"x.{kind}", "x-blorp.safetensors", "x.bundle.safetensors"} | further("x-blorp", model)
    assert names(folder) == expected
    network, word = read(folder / f"x.{kind}"), read(folder / "x-blorp.safetensors")
    assert network and all(name.startswith("lora_") for name in network)
    holds(folder, "x-blorp", "blorp", word, model)
    own = {name: f"bundle_emb.blorp.{part}" for name, part in zip(WIDTHS[model], BUNDLED[model], strict=True)}
    bundled = {bundle_name: word[name] for name, bundle_name in own.items()}
    assert equal(read(folder / "x.bundle.safetensors"), network | bundled)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("flags", [ONE, TWO, (*LORA, *ONE)], ids=["one", "two", "pivotal"])
def test_what_a_file_tells_of_its_use_is_so(
    saves: Saves, flags: tuple[str, ...], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saves(*flags, *EVERY, model=model)
    kind = StableDiffusionXLPipeline if model == "sdxl" else StableDiffusionPipeline
    for path in sorted(folder.rglob("*.safetensors")):
        told = read_metadata(path)
        if "usage_diffusers" not in told:
            assert path.name == "x.safetensors" and "--network_module" in flags
            continue
        if path.name.endswith(".bundle.safetensors"):
            assert "convert_embedding.py --to separate x.bundle.safetensors" in told["usage_diffusers"]
            assert "blorp" in told["usage_a1111"] and "x.bundle" in told["usage_comfyui"]
            continue
        token = "<tag0>" if "tag0" in path.name else "blorp"
        count = 2 if token == "<tag0>" else 1
        assert told["ss_token_string"] == token and told["ss_num_vectors_per_token"] == str(count)
        assert told["ss_base_model_version"] == {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0"}[model]
        assert told["modelspec.architecture"].endswith("/textual-inversion") and told["ss_steps"] == "1"
        assert not [name for name in told if name.startswith("ss_network_")]
        line, _, tail = told["usage_diffusers"].rpartition("; ")
        assert tail == f"write {token}"
        if path.name.endswith(".clip_g.safetensors") or path.name.endswith(".clip_l.safetensors"):
            assert told["usage_a1111"].startswith("no, ")
        else:
            assert path.stem in told["usage_a1111"] and f"embedding:{path.stem}" in told["usage_comfyui"]
        pipe: Any = kind.from_pretrained(saves.models(model), local_files_only=True)
        monkeypatch.chdir(path.parent)
        exec(line, {"pipe": pipe, "safetensors": safetensors})
        found = load_file(path)
        loaded = []
        for number in ("", "_2")[: len(WIDTHS[model])]:
            place = getattr(pipe, f"tokenizer{number}").convert_tokens_to_ids(token)
            table = getattr(pipe, f"text_encoder{number}").get_input_embeddings().weight
            loaded += [table[place : place + count].detach()] if place >= 49408 else []
        held = sorted(found.values(), key=lambda tensor: tensor.shape[1])
        assert len(loaded) == len(held) and all(map(torch.equal, loaded, held))


def test_without_metadata_only_what_loaders_need_is_told(saves: Saves) -> None:
    folder = saves(*LORA, *ONE, *EVERY, "--no_metadata")
    for name in ("x-blorp.safetensors", "diffusers/x-blorp.safetensors"):
        told = {key for key in read_metadata(folder / name) if not key.startswith("modelspec.")}
        assert told == {"ss_v2", "ss_base_model_version", "ss_token_string"}, name
    for name in ("x.safetensors", "x.bundle.safetensors"):
        of_all = read_metadata(folder / name)
        assert not [key for key in of_all if key.startswith("usage_")] and "ss_seed" not in of_all, name
    assert "usage_a1111" in read_metadata(saves(*LORA, *ONE, *EVERY, model="sd1") / "x-blorp.safetensors")
    assert equal(read(folder / "x-blorp.safetensors"), read(saves(*LORA, *ONE, *EVERY) / "x-blorp.safetensors"))


@pytest.mark.parametrize("flags", [ONE, (*LORA, *ONE)], ids=["alone", "pivotal"])
def test_numbers_are_written_in_the_precision_that_is_asked_for(saves: Saves, flags: tuple[str, ...]) -> None:
    whole, half = saves(*flags, *EVERY), saves(*flags, *EVERY, "--save_precision", "fp16")
    assert names(whole) == names(half)
    for name in names(whole):
        rounded = {key: tensor.to(torch.float16) for key, tensor in read(whole / name).items()}
        assert equal(read(half / name), rounded), name


@pytest.mark.parametrize("layouts", [(), ("webui",), ("diffusers",), ("bundle",)], ids=str)
def test_a_number_too_large_for_the_file_replaces_no_older_file(
    saves: Saves, layouts: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ("--save_embedding_as", *layouts) if layouts else ()
    assert saves.run(tmp_path / "out", *ONE, *more, "--save_precision", "fp16") == 0
    older = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    save_file({"emb_params": torch.full((1, 32), 1e5)}, tmp_path / "large.safetensors")
    capfd.readouterr()
    large = ("--weights", str(tmp_path / "large.safetensors"), "--learning_rate", "1e-9", "--save_precision", "fp16")
    assert saves.run(tmp_path / "out", *ONE, *more, *large) == 1
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == older
    assert not list((tmp_path / "out").rglob(".*"))
    said = capfd.readouterr().err
    assert "error: x.pt: the vectors of blorp are not finite in torch.float16" in said and ".writing" not in said


def test_a_network_and_its_word_are_replaced_together_or_not_at_all(saves: Saves, tmp_path: Path) -> None:
    half = (*LORA, *ONE, "--save_precision", "fp16", "--network_train_unet_only")
    assert saves.run(tmp_path / "out", *half) == 0
    older = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    save_file({"emb_params": torch.full((1, 32), 1e5)}, tmp_path / "large.safetensors")
    assert saves.run(tmp_path / "out", *half, "--weights", str(tmp_path / "large.safetensors"), "--seed", "9") == 1
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == older


def test_a_file_that_changes_nothing_is_named_once(
    saves: Saves, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "zeros.safetensors")
    small = ("--learning_rate", "1e-12", "--save_precision", "fp16", "--weights", str(tmp_path / "zeros.safetensors"))
    assert saves.run(tmp_path / "out", *LORA, *ONE, *small, "--network_train_unet_only") == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "still zero" in line or "all zero" in line]
    assert [line.partition("warning: ")[2].partition(" ")[0] for line in warnings] == [
        "x.safetensors:",
        "x-blorp.safetensors:",
    ]
    assert [line.count(".safetensors") for line in warnings] == [1, 1]
