"""Reading LoRA files of other programs, and writing them in each layout: the same modules, numbers and alphas."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.weights.loras.forms import delta
from library.weights.loras.lora import LAYOUTS, Layout, Lora, family_of, read, write
from library.weights.loras.peft import SETTINGS
from tests import lora_files
from tests.programs import tool

Finder = Callable[[str], Path]
FAMILIES = ("sd1", "sd2", "sdxl")
EXACT: tuple[Layout, ...] = ("kohya", "kohya-diffusers", "peft")


PATTERNS = {"rank_pattern": {"to_q": 2, "mlp.fc1": 3}, "alpha_pattern": {"attn1.to_k": 7, "layers.1.mlp.fc2": 1.5}}


def same(ours: Lora, others: Lora) -> None:
    """The same modules with the same bits."""
    assert ours.modules.keys() == others.modules.keys()
    for name, module in ours.modules.items():
        other = others.modules[name]
        assert module.alpha == other.alpha, name
        assert module.leaves.keys() == other.leaves.keys(), name
        for leaf, tensor in module.leaves.items():
            assert tensor.dtype == other.leaves[leaf].dtype, name
            assert torch.equal(tensor, other.leaves[leaf]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_sd_scripts_own(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    path = lora_files.write_kohya(tmp_path / "k.safetensors", tiny_models(family), conv_rank=2)
    raw, lora = load_file(path), read(path)
    assert lora.layout == "kohya"
    assert set(lora.modules) == {key.partition(".")[0] for key in raw}
    assert {module.alpha for module in lora.modules.values()} == {2.0}
    assert lora.metadata == lora_files.metadata_of(path)
    found = family_of(lora)
    assert found is not None
    assert found.name == family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_and_back_is_the_same_bits(
    family: str, dtype: torch.dtype, tiny_models: Finder, tmp_path: Path
) -> None:
    path = tmp_path / "k.safetensors"
    lora = read(lora_files.write_kohya(path, tiny_models(family), conv_rank=3, alpha=1.5, dtype=dtype))
    for layout in EXACT:
        write(lora, tmp_path / "other.safetensors", layout=layout)
        again = read(tmp_path / "other.safetensors")
        assert again.layout == ("kohya" if family != "sdxl" and layout == "kohya-diffusers" else layout)
        same(lora, again)
        write(again, tmp_path / "back.safetensors", layout="kohya")
        first, last = load_file(path), load_file(tmp_path / "back.safetensors")
        assert first.keys() == last.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor.float() if key.endswith("alpha") else tensor, last[key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dora_keeps_its_magnitudes(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    lora = read(lora_files.write_dora(tmp_path / "d.safetensors", tiny_models(family), conv_rank=2))
    for layout in EXACT:
        write(lora, tmp_path / "other.safetensors", layout=layout)
        same(lora, read(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="is a DoRA, which the older layout of diffusers has no keys for"):
        write(lora, tmp_path / "older.safetensors", layout="diffusers")
    assert not (tmp_path / "older.safetensors").exists()


def test_sdxl_in_blocks_of_diffusers_is_read_as_its_own(tiny_sdxl: Path, tmp_path: Path) -> None:
    ours = read(lora_files.write_kohya(tmp_path / "k.safetensors", tiny_sdxl, conv_rank=2))
    other = lora_files.write_kohya(tmp_path / "d.safetensors", tiny_sdxl, conv_rank=2, blocks="diffusers", metadata={})
    theirs = read(other)
    assert theirs.layout == "kohya-diffusers"
    same(ours, theirs)
    write(theirs, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(other).keys()


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("sd1", {"conv": True, "alpha": 3.0}),
        ("sd1", {"use_rslora": True}),
        ("sd2", {"adapter_metadata": False}),
        ("sdxl", PATTERNS),
    ],
)
def test_a_file_of_peft_means_what_diffusers_makes_of_it(
    family: str, config: dict[str, Any], tiny_models: Finder, tmp_path: Path
) -> None:
    folder = tiny_models(family)
    path = lora_files.write_peft(tmp_path / "p.safetensors", folder, **config)
    lora = read(path)
    assert lora.layout == "peft"
    means_the_same(lora, lora_files.applied(path, folder), folder)


@pytest.mark.parametrize(("family", "processors"), [("sd1", False), ("sdxl", True)])
def test_older_files_of_diffusers(family: str, processors: bool, tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models(family)
    path = lora_files.write_old_diffusers(tmp_path / "o.safetensors", folder, processors=processors)
    lora = read(path)
    assert lora.layout == "diffusers"
    means_the_same(lora, lora_files.applied(path, folder), folder)
    write(lora, tmp_path / "again.safetensors")
    same(lora, read(tmp_path / "again.safetensors"))
    newer = load_file(lora_files.write_old_diffusers(tmp_path / "n.safetensors", folder))
    written = load_file(tmp_path / "again.safetensors")
    assert {key for key in newer if key.startswith("unet.")} == {key for key in written if key.startswith("unet.")}


def means_the_same(lora: Lora, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Each module's change is the difference of the model's weights, and nothing else differs."""
    base = lora_files.base_weights(folder)
    changed = set()
    for name, part, path, _ in lora_files.targets(folder, conv=True):
        if name in lora.modules:
            key = f"{part}.{path}.weight"
            found = delta(lora.modules[name])
            assert found is not None
            torch.testing.assert_close(found.float().view(base[key].shape), weights[key] - base[key], rtol=0, atol=1e-5)
            changed.add(key)
    assert len(changed) == len(lora.modules)
    assert changed == {key for key, tensor in base.items() if not torch.equal(tensor, weights[key])}


def test_the_level_text_model_may_be_there_or_not(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = lora_files.write_peft(tmp_path / "p.safetensors", tiny_sdxl)
    tensors, metadata = load_file(path), lora_files.metadata_of(path)
    for old, new in (
        ("text_encoder.text_model.", "text_encoder."),
        ("text_encoder.enc", "text_encoder.text_model.enc"),
    ):
        renamed = {key.replace(old, new): tensor for key, tensor in tensors.items()}
        save_file(renamed, tmp_path / "other.safetensors", metadata)
        same(read(path), read(tmp_path / "other.safetensors"))


def test_other_words_for_the_same(tiny_sd1: Path, tmp_path: Path) -> None:
    """peft's own saves, dotted paths with other programs' leaves, `lora_te1_`, a text encoder without its level."""
    path = lora_files.write_peft(tmp_path / "p.safetensors", tiny_sd1, adapter_metadata=False)
    tensors = load_file(path)
    ours = read(path)
    kohya = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    for rename in (
        lambda key: key.replace("unet.", "unet.base_model.model.").replace(".lora_A.", ".lora_A.default."),
        lambda key: key.replace("lora_A.weight", kohya["lora_A.weight"]).replace("lora_B.weight", "lora_up.weight"),
        lambda key: key.replace("text_encoder.", "text_encoder_1."),
    ):
        save_file({rename(key): tensor for key, tensor in tensors.items()}, tmp_path / "other.safetensors")
        same(ours, read(tmp_path / "other.safetensors"))
    file = lora_files.write_kohya(tmp_path / "k.safetensors", tiny_sd1)
    for old, new in (("lora_te_", "lora_te1_"), ("lora_te_text_model_", "lora_te_"), ("lora_unet_", "lycoris_")):
        renamed = {key.replace(old, new): tensor for key, tensor in load_file(file).items()}
        save_file(renamed, tmp_path / "other.safetensors", lora_files.metadata_of(file))
        same(read(file), read(tmp_path / "other.safetensors"))


def test_pickles_are_read_and_written(tiny_sd1: Path, tmp_path: Path) -> None:
    lora = read(lora_files.write_kohya(tmp_path / "k.pt", tiny_sd1))
    assert lora.metadata == {}
    write(lora, tmp_path / "again.ckpt")
    same(lora, read(tmp_path / "again.ckpt"))
    with pytest.raises(UserError, match="has no metadata, in which the layout peft keeps alphas"):
        write(lora, tmp_path / "peft.pt", layout="peft")
    write(lora, tmp_path / "diffusers.pt", layout="diffusers")
    assert read(tmp_path / "diffusers.pt").modules.keys() == lora.modules.keys()


def test_a_large_file_is_announced(tiny_sd1: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    lora = read(lora_files.write_kohya(tmp_path / "k.safetensors", tiny_sd1))
    write(lora, tmp_path / "small.safetensors")
    assert not capsys.readouterr().err
    monkeypatch.setattr("library.weights.loras.lora._SLOW", 10)
    write(lora, tmp_path / "large.safetensors")
    assert "writing large.safetensors" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")
def test_only_pefts_layout_has_its_settings(tiny_sd1: Path, tmp_path: Path) -> None:
    path = lora_files.write_peft(tmp_path / "p.safetensors", tiny_sd1, rank=4, alpha=2.0, rank_pattern={"to_q": 2})
    lora = read(path)
    for layout in LAYOUTS:
        write(lora, tmp_path / "other.safetensors", layout=layout)
        told = lora_files.metadata_of(tmp_path / "other.safetensors")
        assert (SETTINGS in told) == (layout == "peft")
        assert told["format"] == "pt"
        if layout == "peft":
            settings = json.loads(told[SETTINGS])
            assert settings["unet.r"] == 4
            assert set(settings["unet.rank_pattern"].values()) == {2}
            assert settings["text_encoder.lora_alpha"] == 2


@pytest.mark.parametrize("algo", ["loha", "lokr", "locon"])
def test_layouts_without_keys_for_a_kind_refuse_it(algo: str, tiny_sd1: Path, tmp_path: Path) -> None:
    more = {"use_tucker": True, "only": "resnets_0_conv1"} if algo == "locon" else {"only": "attn2_to_k"}
    lora = read(lora_files.write_lycoris(tmp_path / "l.safetensors", tiny_sd1, algo, **more))
    write(lora, tmp_path / "same.safetensors", layout="kohya-diffusers")
    same(lora, read(tmp_path / "same.safetensors"))
    without: tuple[Layout, ...] = ("peft", "diffusers")
    for layout in without:
        with pytest.raises(UserError, match=f"no plain LoRA.*and the layout {layout} has no keys for them"):
            write(lora, tmp_path / "other.safetensors", layout=layout)


def test_embeddings_in_a_bundle_stay(tiny_sd1: Path, tmp_path: Path) -> None:
    path = lora_files.write_kohya(tmp_path / "k.safetensors", tiny_sd1)
    bundled = {"bundle_emb.cat.string_to_param.*": torch.ones(2, 32)}
    save_file(load_file(path) | bundled, path, lora_files.metadata_of(path))
    lora = read(path)
    assert lora.rest.keys() == bundled.keys()
    write(lora, tmp_path / "again.safetensors")
    assert read(tmp_path / "again.safetensors").rest.keys() == bundled.keys()
    with pytest.raises(UserError, match="has embeddings, for which the layout peft has no place"):
        write(lora, tmp_path / "p.safetensors", layout="peft")


def up(width: int = 4) -> dict[str, torch.Tensor]:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    return {f"{name}.lora_up.weight": torch.ones(8, width), f"{name}.lora_down.weight": torch.ones(4, 8)}


PEFT = {"unet.mid_block.x.lora_A.weight": torch.ones(4, 8), "unet.mid_block.x.lora_B.weight": torch.ones(8, 4)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({"model.diffusion_model.out.2.weight": torch.ones(1)}, {}, "is a base model, not a LoRA"),
        ({"emb_params": torch.ones(2, 32)}, {}, "is an embedding"),
        ({"conv_in.weight": torch.ones(2, 32)}, {}, "conv_in.weight is not a key of a LoRA"),
        (up() | {"lora_unet_x.what": torch.ones(1)}, {}, "lora_unet_x.what is not a key of a LoRA"),
        (up(3), {}, "has factors that don't fit"),
        ({"lora_unet_x.lora_down.weight": torch.ones(4, 8)}, {}, "lora_unet_x lacks lora_up.weight"),
        ({"lora_unet_x.alpha": torch.ones(())}, {}, "lora_unet_x lacks lora_down.weight"),
        ({"lora_unet_x.hada_w1_a": torch.ones(4, 8)}, {}, "lora_unet_x lacks hada_w1_b"),
        (up() | {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(2)}, {}, "alpha is 2 numbers"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(1, 1)}, {}, "is made for Flux"),
        (up() | {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4)}, {}, "that don't fit"),
        (up() | {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 0)}, {}, r"shape \(4, 0\)"),
        ({key: tensor.long() for key, tensor in up().items()}, {}, "has a lora_(up|down).weight of int64"),
        (up() | {"lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight": torch.ones(4, 5, 3, 3)}, {}, "don't fit"),
        ({f"lora_unet_x.hada_w{n}_{ab}": torch.ones(4, 2 + n) for n in (1, 2) for ab in "ab"}, {}, "don't fit"),
        ({f"lora_unet_x.hada_w{n}_{ab}": torch.ones(n * n, 4) for n in (1, 2) for ab in "ab"}, {}, "don't fit"),
        ({"lora_unet_x.lokr_w1": torch.ones(4), "lora_unet_x.lokr_w2": torch.ones(4, 4)}, {}, "don't fit"),
        (PEFT, {SETTINGS: "{"}, "are no JSON"),
        (PEFT, {SETTINGS: "[]"}, "are no JSON object"),
        (PEFT, {SETTINGS: '{"unet.lora_alpha": "four"}'}, "have unet.lora_alpha = four"),
    ],
)
def test_what_is_no_lora_is_named(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], says: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match=says) as error:
        read(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["truncated", "header", "missing_up"])
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_damaged_files_are_named(how: lora_files.Damage, layout: str, tiny_sd1: Path, tmp_path: Path) -> None:
    write_one = lora_files.write_kohya if layout == "kohya" else lora_files.write_peft
    path = lora_files.damage(write_one(tmp_path / "x.safetensors", tiny_sd1), how)
    with pytest.raises(UserError) as error:
        read(path)
    assert "x.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_under_two_names_is_refused(tmp_path: Path) -> None:
    twice = {key.replace("lora_unet_", "lycoris_"): tensor.clone() for key, tensor in up().items()}
    save_file(up() | twice, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="holds lora_unet_mid_block_attentions_0_proj_in twice"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("version", ["None", "sd_v1", "SDXL 1.0", "stable-diffusion-xl-base-1.0", ""])
def test_metadata_dont_rename_what_names_tell(version: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    """And what other programs list the file by is written right."""
    told = {"ss_base_model_version": version, "ss_v2": "True", "a": "b"} if version else {}
    path = lora_files.write_kohya(tmp_path / "k.safetensors", tiny_sdxl, metadata=told)
    lora = read(path)
    assert lora.modules.keys() == {key.partition(".")[0] for key in load_file(path)}
    write(lora, tmp_path / "new.safetensors")
    found = lora_files.metadata_of(tmp_path / "new.safetensors")
    assert (found["ss_base_model_version"], found["ss_v2"]) == ("sdxl_base_v1-0", "False")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2.0")
    assert (found["ss_output_name"], found.get("a")) == ("new", told.get("a"))


def test_hashes_of_an_older_file_and_unknown_families(tiny_sd1: Path, tmp_path: Path) -> None:
    lora = read(lora_files.write_kohya(tmp_path / "k.safetensors", tiny_sd1))
    write(lora, tmp_path / "new.safetensors", layout="peft")
    found = lora_files.metadata_of(tmp_path / "new.safetensors")
    assert "modelspec.hash_sha256" not in found
    assert found["sshs_model_hash"] != lora.metadata["sshs_model_hash"]
    assert found["ss_output_name"] == "tiny"
    attention = {name: module for name, module in lora.modules.items() if "_attn1_" in name}
    assert family_of(lora.with_modules(attention, {})) is None
    write(lora.with_modules(attention, {}), tmp_path / "new.safetensors")
    assert "ss_base_model_version" not in lora_files.metadata_of(tmp_path / "new.safetensors")


def test_the_first_text_encoder_of_sdxl_alone_comes_back(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = lora_files.write_kohya(tmp_path / "k.safetensors", tiny_sdxl, metadata={})
    only = {key: tensor for key, tensor in load_file(path).items() if key.startswith("lora_te1_")}
    save_file(only, path)
    write(read(path), tmp_path / "p.safetensors", layout="peft")
    write(read(tmp_path / "p.safetensors"), tmp_path / "k2.safetensors", layout="kohya")
    assert load_file(tmp_path / "k2.safetensors").keys() == only.keys()


@pytest.mark.parametrize("scale", [0.1, 1e4])
def test_files_of_eight_bits_are_written(scale: float, tiny_sd1: Path, tmp_path: Path) -> None:
    path = lora_files.write_kohya(tmp_path / "k.safetensors", tiny_sd1, dtype=torch.float8_e5m2, scale=scale)
    write(read(path), tmp_path / "p.safetensors", layout="peft")
    assert {tensor.dtype for tensor in load_file(tmp_path / "p.safetensors").values()} == {torch.float8_e5m2}


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_itself_saves(rslora: bool, tiny_sd1: Path, tmp_path: Path, capsys: Any) -> None:
    """Its settings stand in a file beside it, and count as they do for peft."""
    unet: Any = lora_files.parts(lora_files.pipeline(tiny_sd1))["unet"]
    patterns = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 7}}
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["to_k", "to_v"], use_rslora=rslora, **patterns)
    model: Any = get_peft_model(unet, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    found = read(tmp_path / "adapter_model.safetensors").modules
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "get_delta_weight")}
    assert len(found) == len(layers)
    for name, layer in layers.items():
        ours = delta(found[f"lora_unet_{name.replace('.', '_')}"])
        assert ours is not None
        torch.testing.assert_close(ours.float(), layer.get_delta_weight("default"), rtol=1e-5, atol=1e-5)
    loaded: Any = lora_files.pipeline(tiny_sd1)
    loaded.load_lora_weights(tmp_path, weight_name="adapter_model.safetensors")
    assert not any(hasattr(module, "lora_A") for module in loaded.unet.modules())
    capsys.readouterr()
    assert tool("check_lora")([str(tmp_path / "adapter_model.safetensors"), "--json"]) == 1
    assert not any(one["taken"] for one in json.loads(capsys.readouterr().out)[0]["programs"].values())
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config.json: its settings are no JSON object"):
        read(tmp_path / "adapter_model.safetensors")


def test_numbers_that_are_not_finite_are_not_written(tiny_sd1: Path, tmp_path: Path) -> None:
    lora = read(lora_files.damage(lora_files.write_kohya(tmp_path / "x.safetensors", tiny_sd1), "nan"))
    with pytest.raises(UserError, match=r"x.safetensors: 1 of its tensors are not finite.*the file is damaged"):
        write(lora, tmp_path / "y.safetensors")
    alpha = {name: replace(module, alpha=float("nan")) for name, module in lora.modules.items()}
    with pytest.raises(UserError, match=r"x.safetensors: .*\.alpha; the file is damaged"):
        write(lora.with_modules(dict([*alpha.items()][-1:]), {}), tmp_path / "y.safetensors", layout="peft")
    good = read(lora_files.write_kohya(tmp_path / "x.safetensors", tiny_sd1, scale=1e5))
    with pytest.raises(UserError, match=r"not finite.*use bf16 or float"):
        write(good, tmp_path / "y.safetensors", dtype=torch.float16)
    write(good, tmp_path / "y.safetensors", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="has no known ending"):
        write(good, tmp_path / "y.bin")
