"""Two scripts, one set of flags: what each has, needs and takes for granted."""

import shlex
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import Options, parse, setup_parser
from library.options.registry import FLAGS, flags_of_script
from library.options.scripts import SCRIPTS, TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION, Script
from tests.pictures import make_pictures


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    pictures = make_pictures(tmp_path / "made", count=2, repeats=1)
    words = "--pretrained_model_name_or_path m --token_string blorptoken --caption_prefix blorptoken --resolution 64"
    return [*words.split(), "--train_data_dir", str(pictures), "--output_dir", str(tmp_path / "out")]


def embedding(*words: str) -> Options:
    return parse(words, script=TRAIN_TEXTUAL_INVERSION)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=lambda script: script.name)
def test_each_script_says_what_it_needs(script: Script) -> None:
    with pytest.raises(UserError) as caught:
        parse([], script=script)
    missing = [problem for problem in caught.value.problems if problem.wrong == "is missing"]
    assert [problem.where for problem in missing] == [f"--{name}" for name in (*script.needs, "train_data_dir")]
    assert [problem.advice for problem in missing[:-1]] == list(script.needs.values())


def test_a_flag_of_the_other_script_belongs_to_it(base: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        embedding(*base, "--network_dim", "8", "--unet_lr=1", "--stop_text_encoder_training", "3", "--xyzzy")
    told = {problem.where: problem.advice for problem in caught.value.problems}
    assert told == {
        **dict.fromkeys(
            ("--network_dim", "--unet_lr", "--stop_text_encoder_training"), "it belongs to train_network.py"
        ),
        "--xyzzy": "see --help",
    }


def test_a_file_serves_both_scripts(base: list[str], tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('network_module = "networks.lora"\nnetwork_dim = 8\nunet_lr = 1e-3\nlearning_rate = 5e-4\n')
    options = embedding(*base, "--config_file", str(file))
    told = [line for line in options.notices if "no effect" in line]
    owner = "flags of train_network.py have no effect here and are ignored"
    assert told == [f"{file}: {owner}: network_dim, network_module, unet_lr"]
    assert options.network == Options().network and options.optimizer.unet_lr is None
    assert options.optimizer.learning_rate == 5e-4
    both = parse([*base, "--config_file", str(file)])
    assert both.network.network_dim == 8 and not [line for line in both.notices if "no effect" in line]


def test_the_end_of_embeddings_in_a_file_for_both_scripts(base: list[str], tmp_path: Path) -> None:
    file = tmp_path / "both.toml"
    file.write_text("ti_train_steps_ratio = 0.5\n")
    options = embedding(*base, "--config_file", str(file))
    (line,) = [line for line in options.notices if "ti_train_steps_ratio" in line]
    assert line == f"{file}:1 ti_train_steps_ratio: left out, because only embeddings are trained"
    assert options.embeddings.ti_train_steps_ratio is None
    with pytest.raises(UserError, match="--ti_train_steps_ratio"):
        embedding(*base, "--ti_train_steps_ratio", "0.5")


def test_a_script_has_defaults_of_its_own(base: list[str]) -> None:
    options = embedding(*base)
    assert options.output.save_model_as == "pt" and options.script == "train_textual_inversion"
    assert "save_model_as" not in options.explicit and options.effective()["save_model_as"] == "pt"
    assert embedding(*base, "--save_model_as", "safetensors").output.save_model_as == "safetensors"
    network = parse([*base, "--network_module", "networks.lora"])
    assert network.output.save_model_as == "safetensors" and network.script == "train_network"


def test_what_is_effective_are_flags_of_the_script(base: list[str]) -> None:
    shown = embedding(*base).effective()
    assert set(shown) == {name for name, flag in flags_of_script("train_textual_inversion").items() if not flag.secret}
    assert "network_dim" not in shown and "unet_lr" not in shown and "token_string" in shown


def test_a_printed_command_names_the_script(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--save_model_as", "safetensors", "--init_word", "cat", "--use_object_template")
    with pytest.raises(SystemExit) as end:
        embedding(*base, *more, "--print_command")
    printed = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    assert end.value.code == 0 and printed[:3] == ["accelerate", "launch", "train_textual_inversion.py"]
    assert embedding(*printed[3:]).effective() == embedding(*base, *more).effective()
    assert printed[printed.index("--save_model_as") + 1] == "safetensors"
    assert "--use_object_template" not in printed and "--caption_preset" in printed


def test_a_written_file_holds_what_differs_from_the_scripts_defaults(base: list[str], tmp_path: Path) -> None:
    for name, value, written in (("a", "safetensors", True), ("b", "pt", False)):
        file = tmp_path / f"{name}.toml"
        with pytest.raises(SystemExit):
            embedding(*base, "--save_model_as", value, "--output_config", "--config_file", str(file))
        assert ("save_model_as" in file.read_text(encoding="utf-8")) == written
        assert embedding("--config_file", str(file)).output.save_model_as == value


def test_help_and_the_public_parser_are_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        embedding("--help")
    shown = capsys.readouterr().out
    assert "--network_dim" not in shown and "--token_string" in shown and "--placeholder_token" in shown
    assert "(default: pt)" in shown and "--token_string TOKEN --train_data_dir PATH" in " ".join(shown.split())
    parser = setup_parser(TRAIN_TEXTUAL_INVERSION)
    assert parser.parse_args([]).save_model_as == "pt"
    assert set(vars(parser.parse_args([]))) == set(flags_of_script("train_textual_inversion"))
    assert set(vars(setup_parser().parse_args([]))) == set(FLAGS) == set(flags_of_script(TRAIN_NETWORK.name))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--initializer_tok", "--initializer_token"),
        ("--trigger_word", "--trigger_term"),
        ("--placeholder_tok", "--placeholder_token"),
        ("--token_strng", "--token_string"),
    ],
)
def test_names_of_other_programs_are_near_ones_too(base: list[str], typed: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        embedding(*base, typed, "cat")
    assert [str(problem) for problem in caught.value.problems] == [f"{typed}: unknown option; did you mean {meant}?"]
    file = tmp_path / "c.toml"
    file.write_text(f"{typed[2:]} = 'cat'\n")
    with pytest.raises(UserError, match=f"unknown option; did you mean {meant[2:]}"):
        embedding(*base, "--config_file", str(file))


@pytest.mark.parametrize("before", [("--seed", "2"), ("--seed", "2", "--num_vectors_per_token", "2")])
def test_the_value_of_an_unknown_flag_is_none_of_another_one(base: list[str], before: tuple[str, ...]) -> None:
    for argv in ((*before, "--network_dim", "2"), ("--network_dim", "2", *before)):
        with pytest.raises(UserError) as caught:
            embedding(*base, *argv)
        (problem,) = caught.value.problems
        assert str(problem) == "--network_dim: unknown option; it belongs to train_network.py"


def test_a_word_behind_a_switch_is_told_though_it_is_the_value_of_a_flag_too(base: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        embedding(*base, "--seed", "2", "--lowram", "2")
    (problem,) = caught.value.problems
    assert str(problem).startswith("--lowram: takes no value, but '2' follows")
