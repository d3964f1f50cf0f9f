"""Ready settings: what they set, what wins over them, and the repeats and the command that follow from them."""

import shlex
import tomllib
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import Options, load_datasets, parse, presets
from library.options.registry import FLAGS, flags_of_script
from library.options.scripts import TRAIN_TEXTUAL_INVERSION
from tests.pictures import make_pictures

QUICKSTARTS = {"quickstart", "quickstart-embedding"} & set(presets.names())
KINDS = sorted(set(presets.names()) - QUICKSTARTS)
NEEDED = ("--pretrained_model_name_or_path", "m.safetensors", "--network_module", "networks.lora")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A dataset file with a subset that names no repeats, and one that does."""
    free = make_pictures(tmp_path / "free", count=5, repeats=1) / "1_thing"
    named = make_pictures(tmp_path / "named", count=4, repeats=1) / "1_thing"
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{free}'\n[[datasets.subsets]]\nimage_dir = '{named}'\n"
    path = tmp_path / "d.toml"
    path.write_text(text + "num_repeats = 3\n", encoding="utf-8")
    return path


def arguments(config: Path, *more: str) -> list[str]:
    return [*NEEDED, "--dataset_config", str(config), "--output_dir", str(config.parent / "out"), *more]


def embedding_arguments(config: Path, *more: str) -> list[str]:
    place = ("--dataset_config", str(config), "--output_dir", str(config.parent / "out"))
    return [*NEEDED[:2], *place, *more]


def test_there_are_the_presets_that_the_docs_name() -> None:
    kinds = {"character", "style-soft", "style-strong", "low-cost", "competition", "low-memory", "illustrious"}
    kinds |= {"embedding-object", "embedding-style", "pivotal"}
    assert kinds | QUICKSTARTS == set(presets.names())


@pytest.mark.parametrize("name", KINDS)
def test_a_preset_is_valid_and_says_nothing_without_effect(name: str, config: Path) -> None:
    options = parse(arguments(config, "--preset", name, "--resolution", "512"))
    assert not [line for line in options.notices if "no effect" in line]


@pytest.mark.parametrize("name", KINDS)
def test_a_preset_works_in_the_script_of_embeddings(name: str, config: Path) -> None:
    """What it says of networks, and of text encoders that are frozen, is left out with a line each."""
    words = ("--preset", name, "--resolution", "512", "--token_string", "blorptoken")
    options = parse(embedding_arguments(config, *words), script=TRAIN_TEXTUAL_INVERSION)
    content = tomllib.loads((presets.FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    foreign = sorted(key for key in content if key in FLAGS and key not in flags_of_script(options.script))
    told = [line for line in options.notices if "no effect" in line]
    owner = "flags of train_network.py have no effect here and are ignored"
    assert told == ([f"--preset {name}: {owner}: {', '.join(foreign)}"] if foreign else [])
    assert not options.explicit & set(foreign)
    assert options.network == Options().network and not options.caching.cache_text_encoder_outputs
    dropped = [line for line in options.notices if "left out, because" in line and "embeddings are trained" in line]
    assert len(dropped) == len({"cache_text_encoder_outputs", "ti_train_steps_ratio"} & set(content))


def test_presets_of_embeddings(config: Path) -> None:
    words = ("--resolution", "512", "--token_string", "blorptoken", "--preset")
    thing = parse(embedding_arguments(config, *words, "embedding-object"), script=TRAIN_TEXTUAL_INVERSION)
    style = parse(embedding_arguments(config, *words, "embedding-style"), script=TRAIN_TEXTUAL_INVERSION)
    assert thing.dataset.caption_preset == "object" and style.dataset.caption_preset == "style"
    assert thing.optimizer.learning_rate > style.optimizer.learning_rate
    assert thing.embeddings.num_vectors_per_token == (2,) and style.embeddings.num_vectors_per_token == (4,)
    assert not thing.dataset.flip_aug and style.dataset.flip_aug
    both = parse(arguments(config, *words, "pivotal"))
    assert both.embeddings.embedding_lr == 1e-3 and both.embeddings.ti_train_steps_ratio == 0.5
    assert both.network.network_dim == 16 and both.optimizer.unet_lr == 1e-4
    frozen = parse(arguments(config, *words, "pivotal,low-memory"))
    assert frozen.network.network_train_unet_only and not frozen.caching.cache_text_encoder_outputs


def test_a_cache_that_was_asked_for_outside_of_a_preset_stays(config: Path) -> None:
    words = ("--resolution", "512", "--token_string", "blorptoken", "--preset", "low-memory")
    with pytest.raises(UserError, match="--cache_text_encoder_outputs: "):
        parse(arguments(config, *words, "--cache_text_encoder_outputs"))


def test_numbers_of_the_field(config: Path) -> None:
    character = parse(arguments(config, "--preset", "character", "--resolution", "512"))
    rates = character.optimizer
    assert rates.unet_lr == 1e-4 and rates.text_encoder_lr == (1e-5,) and rates.lr_scheduler_num_cycles == 3
    assert character.network.network_alpha * 2 == character.network.network_dim == 32
    assert not character.dataset.flip_aug and character.dataset.keep_tokens == 1
    soft = parse(arguments(config, "--preset", "style-soft", "--resolution", "512"))
    strong = parse(arguments(config, "--preset", "style-strong", "--resolution", "512"))
    assert soft.network.network_train_unet_only and not strong.network.network_train_unet_only
    assert soft.loss.min_snr_gamma == 20 and strong.loss.min_snr_gamma == 3
    assert soft.dataset.flip_aug and strong.loss.multires_noise_iterations == 10


def test_files_and_flags_win_and_later_presets_win(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("network_dim = 8\nmin_snr_gamma = 1\n", encoding="utf-8")
    words = (
        "--preset",
        "character,low-memory",
        "--config_file",
        str(file),
        "--network_dim",
        "4",
        "--resolution",
        "512",
    )
    options = parse(arguments(config, *words))
    assert options.network.network_dim == 4 and options.loss.min_snr_gamma == 1
    assert options.dataset.train_batch_size == 1 and options.optimizer.unet_lr == 1e-4
    assert options.where("unet_lr") == "preset character: unet_lr"


def test_repeats_make_epochs_of_the_presets_length(config: Path) -> None:
    """2000 steps of 2 in 10 epochs are 400 samples an epoch: 4 x 3 are there, 5 pictures make up the rest."""
    options = parse(arguments(config, "--preset", "character", "--resolution", "512"))
    assert options.training.max_train_steps == 2000
    assert [subset.num_repeats for subset in load_datasets(options)[0].subsets] == [round((400 - 12) / 5), 3]
    (line,) = [line for line in options.notices if "--dataset_repeats" in line]
    assert "78 for 5 pictures" in line


@pytest.mark.parametrize(("processes", "flags"), [(1, ("4",)), (2, ("2",)), (4, ("1",))])
def test_repeats_count_the_batches_that_make_a_step(
    config: Path, monkeypatch: pytest.MonkeyPatch, processes: int, flags: tuple[str]
) -> None:
    """2000 steps of 4 batches of 2 in 10 epochs are 1600 samples an epoch."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    words = ("--preset", "character", "--resolution", "512", "--gradient_accumulation_steps", *flags)
    (dataset,) = load_datasets(parse(arguments(config, *words)))
    assert [subset.num_repeats for subset in dataset.subsets] == [round((1600 - 12) / 5), 3]


def test_repeats_leave_out_what_is_held_out(config: Path) -> None:
    """Of 5 pictures 2 are held out (1.5, rounded up), of 4 pictures 1: 3 x n + 3 x 3 are trained."""
    words = ("--preset", "character", "--resolution", "512", "--validation_split", "0.3")
    options = parse(arguments(config, *words))
    (dataset,) = load_datasets(options)
    assert [subset.num_repeats for subset in dataset.subsets] == [round((400 - 9) / 3), 3]
    assert any("130 for 3 pictures" in line for line in options.notices)


def test_the_batches_of_a_dataset_that_is_only_looked_at_count_for_nothing(config: Path) -> None:
    seen = make_pictures(config.parent / "seen", count=2, repeats=1) / "1_thing"
    more = f"[[datasets]]\nbatch_size = 8\n[[datasets.subsets]]\nimage_dir = '{seen}'\nvalidation_split = 1.0\n"
    config.write_text(config.read_text(encoding="utf-8") + more, encoding="utf-8")
    dataset, _ = load_datasets(parse(arguments(config, "--preset", "character", "--resolution", "512")))
    assert [subset.num_repeats for subset in dataset.subsets] == [78, 3]


def test_repeats_and_steps_that_were_given_stay(config: Path) -> None:
    words = ("--preset", "character", "--resolution", "512", "--dataset_repeats", "2", "--max_train_epochs", "3")
    options = parse(arguments(config, *words))
    assert options.dataset.dataset_repeats == 2 and options.training.max_train_epochs == 3
    assert "max_train_steps" not in options.explicit


def test_a_copy_of_a_preset_works_as_config_file(config: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_text((presets.FOLDER / "character.toml").read_text(encoding="utf-8"), encoding="utf-8")
    by_file = parse(arguments(config, "--config_file", str(copy), "--resolution", "512"))
    by_name = parse(arguments(config, "--preset", "character", "--resolution", "512"))
    assert {**by_file.effective(), "config_file": None} == {**by_name.effective(), "preset": None}


def test_a_wrong_name_and_a_wrong_table_are_told(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no preset charakter; did you mean character"):
        parse(arguments(config, "--preset", "charakter"))
    file = tmp_path / "c.toml"
    file.write_text("[preset]\nsteps = 0\nepochs = 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"\[preset\] is no table of steps and epochs"):
        parse(arguments(config, "--config_file", str(file)))


def test_the_printed_command_gives_the_same_options(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'metadata_title = "it\'s mine"\nhuggingface_token = "hidden"\nmore_resolutions = [[640, 384], [768, 768]]\n'
        "stop_text_encoder_training = -1\n",
        encoding="utf-8",
    )
    words = ("--preset", "character,low-memory", "--config_file", str(file), "--resolution", "512,640")
    with pytest.raises(SystemExit) as end:
        parse(arguments(config, *words, "--print_command"))
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "hidden" not in shown
    printed = shlex.split(shown.replace("\\\n", " "))
    assert printed[:3] == ["accelerate", "launch", "train_network.py"]
    again, before = parse(printed[3:]).effective(), parse(arguments(config, *words)).effective()
    assert {**again, "preset": None, "config_file": None} == {**before, "preset": None, "config_file": None}


def test_a_start_from_a_file_gives_way_to_a_resume_and_a_typed_one_does_not(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("initial_step = 3\n", encoding="utf-8")
    words = ("--resolution", "512", "--resume", "latest")
    said = parse(arguments(config, *words, "--config_file", str(file))).notices
    assert [line for line in said if "initial_step: has no effect with --resume" in line]
    with pytest.raises(UserError, match="--initial_step: can't be combined with --resume"):
        parse(arguments(config, *words, "--initial_step", "3"))
