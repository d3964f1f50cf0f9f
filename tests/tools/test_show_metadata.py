"""tools/show_metadata.py: what it prints, and that a change of the text leaves tensors and their hashes alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.models.headers import read_header
from library.weights.files import read_metadata, read_tensors, save_safetensors
from library.weights.hashes import lora_hashes
from library.weights.save import save_lora
from tests.programs import tool

TAGS = {"4_mycat cat": {"mycat": 8, "sitting": 5, "grass": 5}, "1_cat": {"cat": 90}}
METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2",
    "ss_network_args": "{}",
    "ss_output_name": "mycat",
    "ss_sd_model_name": "/home/kim/models/sd15.safetensors",
    "ss_learning_rate": "0.0001",
    "ss_session_id": "4711",
    "ss_training_started_at": "1700000000.0",
    "ss_training_comment": "for my sister",
    "ss_dataset_dirs": json.dumps({"4_mycat cat": {"n_repeats": 4, "img_count": 10}}),
    "ss_reg_dataset_dirs": json.dumps({"1_cat": {"n_repeats": 1, "img_count": 100}}),
    "ss_tag_frequency": json.dumps(TAGS),
    "ss_of_another_program": "C:\\Users\\Kim\\pictures",
    "modelspec.title": "mycat",
    "modelspec.date": "2024-01-01T00:00:00",
}


@pytest.fixture(scope="module")
def main() -> Callable[..., int]:
    return tool("show_metadata")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """More than 1 MiB, so that the legacy hash is one of tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "lora_unet_a.lora_down.weight": torch.randn(64, 4096, generator=generator),
        "lora_unet_a.lora_up.weight": torch.randn(4096, 64, generator=generator).half(),
        "lora_unet_a.alpha": torch.tensor(2.0),
    }
    path = tmp_path / "lora.safetensors"
    save_lora(tensors, path, METADATA)
    return path


def test_elsewhere_than_on_a_terminal_it_is_sorted_json(
    main: Callable[..., int], lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(lora)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == read_metadata(lora)
    assert printed == json.dumps(read_metadata(lora), indent=4, sort_keys=True) + "\n"
    assert main([str(lora), "--parsed"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["ss_tag_frequency"] == TAGS
    assert parsed["ss_network_dim"] == "4"


def test_a_table_shortens_long_values(main: Callable[..., int], lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(lora), "--set", "modelspec.description=" + "word " * 100, "--in_place"]) == 0
    assert main([str(lora), "--table"]) == 0
    printed = capsys.readouterr().out
    assert "ss_network_module" in printed
    assert "500 characters" in printed.replace("\n", "")


@pytest.mark.parametrize(
    "flags",
    [
        ["--set", "modelspec.title=Cat é", "--set", "ss_output_name=a name that is longer"],
        ["--remove", "ss_t*", "--remove", "ss_session_id"],
        ["--strip", "private"],
    ],
)
def test_a_change_copies_tensors_byte_for_byte_and_keeps_hashes_right(
    main: Callable[..., int], lora: Path, tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "new" / "out.safetensors"
    before = lora.read_bytes()
    assert main([str(lora), *flags, "--save_to", str(out)]) == 0
    assert lora.read_bytes() == before
    data = 8 + int.from_bytes(before[:8], "little")
    assert out.read_bytes().endswith(before[data:])
    found = read_metadata(out)
    assert found != read_metadata(lora)
    again = lora_hashes(read_tensors(out), found)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == (again.model, again.legacy)
    assert found["sshs_legacy_hash"] != read_metadata(lora)["sshs_legacy_hash"]


def test_the_legacy_hash_of_a_header_of_megabytes(main: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    save_lora({"lora_unet_a.lora_up.weight": torch.ones(400, 100)}, path, {"ss_tag_frequency": "x" * (1 << 20)})
    for text in ("y" * (1 << 20), "y" * ((1 << 20) + 40_000), "y" * (1 << 21)):
        assert main([str(path), "--remove", "ss_*", "--set", f"ss_tag_frequency={text}", "--in_place"]) == 0
        found = read_metadata(path)
        assert found["sshs_legacy_hash"] == lora_hashes(read_tensors(path), found).legacy


def test_setting_and_removing(main: Callable[..., int], lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--set",
        "modelspec.title=Cat é",
        "--set",
        "ss_output_name=a=b",
        "--remove",
        "ss_t*",
        "--remove",
        "nothing",
    ]
    assert main([str(lora), *flags, "--in_place"]) == 0
    found = read_metadata(lora)
    assert found["modelspec.title"] == "Cat é"
    assert found["ss_output_name"] == "a=b"
    assert not [key for key in found if key.startswith("ss_t")]
    assert "--remove nothing" in capsys.readouterr().err


def test_stripping_what_is_private_leaves_what_loaders_need(main: Callable[..., int], lora: Path) -> None:
    assert main([str(lora), "--strip", "--in_place"]) == 0
    found = read_metadata(lora)
    text = json.dumps(found)
    for secret in ("sister", "mycat cat", "sitting", "4711", "1700000000", "kim", "Kim", "2024"):
        assert secret not in text, secret
    for key in ("ss_base_model_version", "ss_v2", "ss_network_module", "ss_network_dim", "ss_network_alpha"):
        assert found[key] == METADATA[key]
    assert found["ss_network_args"] == "{}"
    assert found["ss_sd_model_name"] == "sd15.safetensors"
    assert found["ss_learning_rate"] == "0.0001"
    assert found["modelspec.title"] == "mycat"


def test_stripping_all_leaves_what_tensors_cant_be_read_without(main: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "peft.safetensors"
    kept = {"format": "pt", "lora_adapter_metadata": '{"unet.lora_alpha": 2}'}
    save_safetensors(
        {"unet.a.lora_A.weight": torch.ones(2, 2)}, path, {"ss_v2": "False", "modelspec.title": "x"} | kept
    )
    assert main([str(path), "--strip", "all", "--in_place"]) == 0
    assert read_metadata(path) == kept


def test_any_safetensors_file_will_do(
    main: Callable[..., int], tiny_sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.safetensors"
    assert main([str(tiny_sd1_file), "--set", "modelspec.title=tiny", "--save_to", str(out)]) == 0
    assert {name: (one.dtype, one.shape) for name, one in read_header(out).entries.items()} == {
        name: (one.dtype, one.shape) for name, one in read_header(tiny_sd1_file).entries.items()
    }
    new, old = read_tensors(out), read_tensors(tiny_sd1_file)
    assert all(torch.equal(new[name], old[name]) for name in old)
    bare = tmp_path / "bare.safetensors"
    save_file({"emb_params": torch.ones(2, 768), "numbers": torch.ones(3, dtype=torch.uint16)}, bare)
    assert main([str(bare)]) == 0
    assert json.loads(capsys.readouterr().out) == {}
    assert main([str(bare), "--set", "ss_token_string=cat", "--in_place"]) == 0
    assert read_metadata(bare) == {"ss_token_string": "cat"}


def test_trigger_words(main: Callable[..., int], lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(lora), "--set", "modelspec.trigger_phrase=photo of mycat", "--in_place"]) == 0
    assert main([str(lora), "--trigger_words", "2"]) == 0
    found = [(one["text"], one["origin"], one["pictures"], one["share"]) for one in json.loads(capsys.readouterr().out)]
    assert found == [
        ("photo of mycat", "phrase", 0, None),
        ("mycat cat", "class", 10, 1.0),
        ("mycat", "tag", 8, 0.8),
        ("grass", "tag", 5, 0.5),
    ]
    assert main([str(lora), "--trigger_words", "2", "--table"]) == 0
    assert "80%" in capsys.readouterr().out


def test_trigger_words_of_a_training_from_a_config(
    main: Callable[..., int], lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subsets = [
        {"image_dir": "a", "img_count": 4, "class_tokens": "mycat", "is_reg": False},
        {"image_dir": "b", "img_count": 9, "class_tokens": "cat", "is_reg": True},
    ]
    datasets = [{"subsets": subsets, "tag_frequency": {"a": {"indoors": 3}, "b": {"cat": 9}}}]
    flags = ["--remove", "ss_*", "--set", f"ss_datasets={json.dumps(datasets)}", "--set", "ss_tag_frequency=None"]
    assert main([str(lora), *flags, "--in_place"]) == 0
    assert main([str(lora), "--trigger_words"]) == 0
    found = [(one["text"], one["origin"], one["pictures"]) for one in json.loads(capsys.readouterr().out)]
    assert found == [("mycat", "class", 4), ("indoors", "tag", 3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["FILE", "--set", "novalue", "--in_place"], "'novalue' is not KEY=VALUE"),
        (["FILE", "--set", "sshs_model_hash=0", "--in_place"], "sshs_model_hash is worked out from the tensors"),
        (["FILE", "--strip", "private"], "--save_to: is missing"),
        (["FILE", "--in_place"], "--in_place: nothing is to be changed"),
        (["FILE", "--set", "a=b", "--save_to", "x.ckpt"], "ends in .ckpt"),
        (["FILE", "--trigger_words", "-1"], "-1 is below 0"),
        (["FILE", "--model", "FILE"], "names a second file"),
        ([], "FILE: is missing"),
        (["missing.safetensors"], "there is no such file"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_read(
    main: Callable[..., int], lora: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    before = lora.read_bytes()
    assert main([str(lora) if flag == "FILE" else flag for flag in flags]) == 2
    assert message in capsys.readouterr().err
    assert lora.read_bytes() == before


def test_damaged_files_are_one_clear_line(
    main: Callable[..., int], lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora.write_bytes(lora.read_bytes()[:-100])
    assert main([str(lora), "--strip", "--in_place"]) == 2
    assert "is truncated" in capsys.readouterr().err
    lora.write_bytes(b"text")
    assert main([str(lora)]) == 2
    pickle = lora.with_suffix(".ckpt")
    torch.save({"a": torch.ones(1)}, pickle)
    assert main([str(pickle)]) == 2
    assert "is a pickle, and pickles have no metadata" in capsys.readouterr().err


def test_metadata_that_should_be_json_and_isnt(
    main: Callable[..., int], lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(lora), "--set", "ss_tag_frequency={broken", "--in_place"]) == 0
    assert main([str(lora), "--trigger_words"]) == 2
    assert "ss_tag_frequency should be JSON" in capsys.readouterr().err
