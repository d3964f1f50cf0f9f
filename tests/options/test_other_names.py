"""Names of diffusers, invokeai-ti and invoke-training: what becomes of each, and whose defaults count."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.options import Options, parse
from library.options.flags import Flag
from library.options.foreign import FOREIGN
from library.options.other_names import OTHER_NAMES
from library.options.registry import FLAGS
from library.options.scripts import TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION, Script
from library.training.steps import Clock, SavePlan
from tests.pictures import make_pictures


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a flat folder `pictures`, as diffusers' scripts want it."""
    (make_pictures(tmp_path / "made", count=3, repeats=1) / "1_thing").rename(tmp_path / "pictures")
    return tmp_path


def embedding(place: Path, *words: str, script: Script = TRAIN_TEXTUAL_INVERSION) -> Options:
    paths = ("--train_data_dir", str(place / "pictures"), "--output_dir", str(place / "out"))
    return parse(["--pretrained_model_name_or_path", "m.safetensors", *paths, *words], script=script)


def mine(place: Path, *words: str) -> Options:
    return embedding(place, "--token_string", "blorptoken", "--resolution", "512", *words)


def wrong(place: Path, *words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        mine(place, *words)
    return [str(problem) for problem in caught.value.problems]


def test_no_name_is_a_flag_of_ours_or_a_key_that_is_ignored() -> None:
    assert not set(OTHER_NAMES) & (set(FLAGS) | set(FOREIGN))
    for name, one in OTHER_NAMES.items():
        assert set(one.targets) <= set(FLAGS), name
        assert bool(one.targets) == (one.flag.kind == "honoured"), name
        assert one.flag.kind == "honoured" or one.flag.why, name


def test_the_command_line_of_diffusers_example_runs(place: Path) -> None:
    """https://github.com/huggingface/diffusers/blob/main/examples/textual_inversion/README.md"""
    line = (
        f"--pretrained_model_name_or_path=sd15 --train_data_dir={place}/pictures --learnable_property=object "
        "--placeholder_token=<cat-toy> --initializer_token=toy --resolution=512 --train_batch_size=1 "
        "--gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr "
        f"--lr_scheduler=constant --lr_warmup_steps=0 --push_to_hub --hub_model_id=me/cat --output_dir={place}/out"
    )
    options = parse(shlex.split(line), script=TRAIN_TEXTUAL_INVERSION)
    assert options.embeddings.token_string == ("<cat-toy>",) and options.embeddings.init_word == ("toy",)
    assert options.dataset.caption_preset == "object" and options.dataset.dataset_repeats == 100
    assert options.optimizer.learning_rate == pytest.approx(2e-3)
    assert options.hub.huggingface_repo_id == "me/cat"
    assert (options.training.max_train_steps, options.training.max_train_epochs) == (3000, None)


def test_a_command_line_of_invokeai_ti_runs(place: Path) -> None:
    line = (
        f"--model=m.safetensors --train_data_dir={place}/pictures --output_dir={place}/out --trigger_term=blorptoken "
        "--initializer_token=* --learnable_property=style --repeats=10 --num_train_epochs=20 --center_crop "
        "--save_steps=50 --checkpointing_steps=50 --resume_from_checkpoint=latest --only_save_embeds "
        "--enable_xformers_memory_efficient_attention --mixed_precision=no --seed=1 --adam_beta1=0.8 "
        "--adam_weight_decay=0.02 --adam_epsilon=1e-7 --report_to=tensorboard --allow_tf32 --local_rank=-1"
    )
    options = parse(shlex.split(line), script=TRAIN_TEXTUAL_INVERSION)
    assert options.model.pretrained_model_name_or_path == "m.safetensors" and options.model.xformers
    assert options.dataset.caption_preset == "style" and options.dataset.dataset_repeats == 10
    assert options.dataset.resolution == (512, 512) and options.optimizer.learning_rate == 1e-4
    assert options.training.max_train_epochs == 20 and options.training.resume == "latest"
    assert options.output.save_every_n_steps == 50 and options.output.save_state
    assert options.optimizer.optimizer_args == ("betas=0.8,0.999", "weight_decay=0.02", "eps=1e-07")
    assert options.logging.log_with == "tensorboard" and options.logging.logging_dir == place / "out" / "logs"
    for name in ("center_crop", "only_save_embeds", "allow_tf32", "local_rank"):
        assert [line for line in options.notices if line.startswith(f"--{name}: nothing to do: ")], name
    (line,) = [line for line in options.notices if "taken for granted" in line]
    assert "--learning_rate 0.0001, --resolution 512, --save_embedding_as diffusers;" in line


def _value(flag: Flag) -> str:
    if flag.choices:
        return str(flag.choices[0])
    return {"int": "7", "float": "0.5"}.get(flag.shape, "latest" if flag.name.startswith("resume") else "word")


RENAMED = [name for name, one in OTHER_NAMES.items() if one.renames]


@pytest.mark.parametrize("name", RENAMED)
def test_a_renamed_flag_says_the_same_as_ours(name: str, place: Path) -> None:
    (ours,) = OTHER_NAMES[name].targets
    flag = OTHER_NAMES[name].flag
    value = [] if flag.shape == "flag" else [_value(flag)]
    if name == "initial_embedding_file":
        (place / "e.pt").write_bytes(b"")
        value = [str(place / "e.pt")]
    words = ["--network_module", "networks.lora", "--resolution", "512"]
    words += [] if ours == "token_string" else ["--token_string", "blorptoken"]
    words += ["--embedding_lr", "0.5"] if ours == "unet_lr" else []
    pictures = ["--train_data_dir", str(place / "pictures"), "--output_dir", str(place / "out")]
    words += pictures + ([] if ours == "pretrained_model_name_or_path" else ["--pretrained_model_name_or_path", "m"])
    theirs = _outcome([*words, f"--{name}", *value])
    assert theirs == _outcome([*words, f"--{ours}", *value])
    assert theirs != _outcome(words)


def _outcome(words: list[str]) -> Any:
    """The options, or what is wrong with them, wherever they were said."""
    try:
        options = parse(words)
        return {name: options.value(name) for name in FLAGS}
    except UserError as error:
        return [(problem.wrong, problem.advice) for problem in error.problems]


@pytest.mark.parametrize("name", [name for name, one in OTHER_NAMES.items() if one.flag.kind == "refused"])
def test_a_refused_name_says_what_to_use(name: str, place: Path) -> None:
    flag = OTHER_NAMES[name].flag
    found = wrong(place, f"--{name}", *([] if flag.shape == "flag" else ["x"]))
    assert found == [f"--{name}: {flag.why}"]


def test_two_names_of_one_flag_contradict_each_other(place: Path) -> None:
    assert wrong(place, "--trigger_term", "other") == [
        "--trigger_term: says the same as --token_string; leave out one of the two"
    ]
    assert wrong(place, "--save_every_n_steps", "3", "--save_steps", "2")[0].startswith("--save_steps: says the same")
    assert wrong(place, "--use_object_template", "--learnable_property", "style") == [
        "--use_object_template: --learnable_property asks for other templates; leave out one of the two"
    ]
    assert wrong(place, "--use_object_template", "--use_style_template")
    assert wrong(place, "--optimizer_args", "eps=1e-6", "--adam_epsilon", "1e-7") == [
        "--adam_epsilon: --optimizer_args says eps, too; leave out one of the two"
    ]


@pytest.mark.parametrize("preset", ["object", "style"])
def test_the_switches_of_sd_scripts_are_values_of_caption_preset(preset: str, place: Path) -> None:
    assert mine(place, f"--use_{preset}_template").dataset.caption_preset == preset
    options = mine(place, f"--use_{preset}_template", "--caption_preset", preset)
    assert options.dataset.caption_preset == preset and f"use_{preset}_template" not in options.explicit


def test_a_command_line_wins_over_a_file_whatever_the_names(place: Path) -> None:
    file = place / "c.toml"
    file.write_text('repeats = 3\nplaceholder_token = "theirs"\nnum_vectors = 2\n[model]\nclip_skip = 2\n')
    both = mine(place, "--config_file", str(file), "--repeats", "5")
    assert both.dataset.dataset_repeats == 5 and both.embeddings.token_string == ("blorptoken",)
    assert both.embeddings.num_vectors_per_token == (2,) and both.model.clip_skip == 2
    assert both.where("num_vectors_per_token") == f"{file}:3 num_vectors"
    alone = embedding(place, "--config_file", str(file))
    assert alone.embeddings.token_string == ("theirs",) and alone.optimizer.learning_rate == 1e-4


def test_what_is_typed_wins_over_what_a_file_says_in_other_names(place: Path) -> None:
    file = place / "c.toml"
    file.write_text(
        'use_object_template = true\nsave_steps = 3\nreport_to = "wandb"\nadam_epsilon = 1e-3\n'
        'adam_weight_decay = 0.5\nhub_model_id = "me/theirs"\npush_to_hub = true\n'
    )
    words = ["--caption_preset", "style", "--save_every_n_steps", "5", "--report_to", "tensorboard"]
    words += ["--optimizer_args", "eps=1e-6", "--huggingface_repo_id", "me/mine", "--config_file", str(file)]
    options = mine(place, *words)
    assert options.dataset.caption_preset == "style" and options.output.save_every_n_steps == 5
    assert options.logging.log_with == "tensorboard" and options.hub.huggingface_repo_id == "me/mine"
    assert options.optimizer.optimizer_args == ("eps=1e-6", "weight_decay=0.5")
    file.write_text('optimizer_args = ["eps=1e-6", "weight_decay=0.5"]\nhuggingface_repo_id = "me/theirs"\n')
    words = ["--adam_epsilon", "1e-7", "--push_to_hub", "--hub_model_id", "me/mine", "--config_file", str(file)]
    options = mine(place, *words)
    assert options.optimizer.optimizer_args == ("weight_decay=0.5", "eps=1e-07")
    assert options.hub.huggingface_repo_id == "me/mine"


def test_epochs_of_diffusers_count_only_without_steps(place: Path) -> None:
    file = place / "c.toml"
    file.write_text("max_train_steps = 30\n")
    assert mine(place, "--num_train_epochs", "4").training.max_train_epochs == 4
    typed = mine(place, "--num_train_epochs", "4", "--max_train_steps", "9")
    assert (typed.training.max_train_epochs, typed.training.max_train_steps) == (None, 9)
    assert "--num_train_epochs: has no effect, because max_train_steps counts" in typed.notices
    assert mine(place, "--num_train_epochs", "4", "--config_file", str(file)).training.max_train_epochs == 4
    file.write_text("num_train_epochs = 30\n")
    steps = mine(place, "--max_train_steps", "9", "--config_file", str(file))
    assert (steps.training.max_train_epochs, steps.training.max_train_steps) == (None, 9)


def test_files_and_states_have_one_interval(place: Path) -> None:
    options = mine(place, "--save_steps", "200", "--checkpointing_steps", "500", "--checkpoints_total_limit", "3")
    output = options.output
    assert (output.save_every_n_steps, output.save_state, output.save_last_n_steps_state) == (200, True, 400)
    assert [line for line in options.notices if "every 200 steps" in line]
    only = mine(place, "--save_steps", "200", "--checkpoints_total_limit", "3")
    assert (only.output.save_every_n_steps, only.output.save_state) == (200, False)
    assert "--checkpoints_total_limit: has no effect without --checkpointing_steps" in only.notices


def test_a_single_state_of_every_step_is_refused(place: Path) -> None:
    (line,) = wrong(place, "--checkpointing_steps", "1", "--checkpoints_total_limit", "1")
    assert line.startswith("--checkpoints_total_limit: of states that are saved after every step, the last two are")
    for steps, limit in ((1, 2), (2, 1), (5, 1), (1, 5), (3, 4)):
        flags = ("--checkpointing_steps", str(steps), "--checkpoints_total_limit", str(limit))
        output = mine(place, *flags).output
        plan = SavePlan("x", every_n_steps=steps, last_n_steps_state=output.save_last_n_steps_state, save_state=True)
        there: set[str] = set()
        for step in range(1, 40 * steps):
            for save in (one for one in plan.due(step, Clock(1, 1, 1000)) if one.kind == "step"):
                there = (there | {save.stem}) - set(save.expired_states)
        assert len(there) == limit


def test_a_repository_counts_where_it_is_pushed_to(place: Path) -> None:
    assert mine(place, "--push_to_hub", "--huggingface_repo_id", "me/x").hub.huggingface_repo_id == "me/x"
    alone = mine(place, "--hub_model_id", "me/x")
    assert alone.hub.huggingface_repo_id is None
    assert "--hub_model_id: has no effect without --push_to_hub" in alone.notices
    assert mine(place, "--push_to_hub").hub.huggingface_repo_id == "out"
    assert mine(place, "--push_to_hub", "--hub_model_id", "cat").hub.huggingface_repo_id == "cat"
    (line,) = wrong(place, "--push_to_hub", "--output_dir", str(place / "my out"))
    assert line.startswith("--push_to_hub: 'my out' is no name of a repository; ")
    words = ["--pretrained_model_name_or_path", "m", "--train_data_dir", str(place / "pictures"), "--resolution", "512"]
    with pytest.raises(UserError) as caught:
        parse([*words, "--token_string", "blorptoken", "--push_to_hub"], script=TRAIN_TEXTUAL_INVERSION)
    missing = "--push_to_hub: names no repository; add --hub_model_id USER/NAME"
    assert missing in [str(problem) for problem in caught.value.problems]


def test_previews_of_a_command_line_of_diffusers(place: Path) -> None:
    words = ("--placeholder_token", "<cat-toy>", "--validation_prompt", "a photo of <cat-toy>")
    typed = embedding(place, *words, "--num_validation_images", "2", "--validation_steps", "50")
    assert typed.sampling.preview_prompts == ("a photo of <cat-toy>",) and typed.sampling.sample_prompts is None
    assert (typed.sampling.sample_images_per_prompt, typed.sampling.sample_every_n_steps) == (2, 50)
    assert not [line for line in typed.notices if "has no effect" in line]
    assert typed.where("preview_prompts") == "--validation_prompt"
    granted = embedding(place, *words)
    assert (granted.sampling.sample_images_per_prompt, granted.sampling.sample_every_n_steps) == (4, 100)
    (line,) = [line for line in granted.notices if "taken for granted" in line]
    assert "--sample_images_per_prompt 4, --sample_every_n_steps 100," in line
    by_epochs = embedding(place, *words, "--validation_epochs", "3").sampling
    assert (by_epochs.sample_every_n_steps, by_epochs.sample_every_n_epochs) == (None, 3)
    without = embedding(place, *words[:2]).sampling
    assert (without.sample_images_per_prompt, without.sample_every_n_steps) == (1, None)


def test_a_prompt_of_several_words_is_one_value(place: Path) -> None:
    assert wrong(place, "--validation_prompt", "a", "photo")[0] == (
        "command line: 'photo' belongs to no option; quote values that hold spaces"
    )
    file = place / "c.toml"
    file.write_text('validation_prompt = "a photo"\nsample_at_first = true\n')
    options = mine(place, "--config_file", str(file))
    assert options.sampling.preview_prompts == ("a photo",)
    assert options.where("preview_prompts") == f"{file}:1 validation_prompt"
    ours = mine(place, "--preview_prompts", "a --w 64", "b", "--config_file", str(file))
    assert ours.sampling.preview_prompts == ("a --w 64", "b")


def test_typed_prompts_are_prompts_of_previews(place: Path) -> None:
    assert not [
        line for line in mine(place, "--preview_prompts", "a", "--sample_at_first").notices if "sample_" in line
    ]
    assert "--preview_prompts: has no effect without --sample_every_n_epochs or _steps" in (
        mine(place, "--preview_prompts", "a").notices
    )
    assert wrong(place, "--validation_steps", "3") == [
        "--validation_steps: previews need prompts; add --sample_prompts FILE or --preview_prompts TEXT"
    ]


def test_trackers_of_others(place: Path) -> None:
    assert mine(place, "--report_to", "none").logging.log_with is None
    assert mine(place, "--report_to", "tensorboard", "--logging_dir", "x").logging.logging_dir == Path("x")
    assert "'comet_ml' is not among tensorboard, wandb, all" in wrong(place, "--report_to", "comet_ml")[0]


def test_defaults_of_a_command_line_of_diffusers(place: Path) -> None:
    options = embedding(place, "--placeholder_token", "blorptoken")
    assert options.dataset.resolution == (512, 512) and options.optimizer.learning_rate == 1e-4
    assert options.dataset.dataset_repeats == 100 and options.dataset.caption_preset == "object"
    (line,) = [line for line in options.notices if "taken for granted" in line]
    assert line.startswith("--placeholder_token: ") and line.endswith("; --token_string goes without")
    assert not [line for line in mine(place).notices if "taken for granted" in line]
    own = ("--caption_templates", "a {}", "--embedding_lr", "1e-3", "--preset", "embedding-style")
    mixed = embedding(place, "--placeholder_token", "blorptoken", *own[:4])
    assert mixed.dataset.caption_preset is None and mixed.embeddings.embedding_lr == 1e-3
    assert "learning_rate" not in mixed.explicit
    paced = embedding(place, "--placeholder_token", "blorptoken", *own[4:])
    assert paced.dataset.caption_preset == "style" and paced.optimizer.learning_rate == 1e-3
    assert paced.dataset.dataset_repeats == round(3000 * 4 / 15 / 3)


def test_defaults_of_others_are_none_of_the_network_scripts_or_of_a_dataset_file(place: Path) -> None:
    file = place / "d.toml"
    file.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{place}/pictures'\n")
    words = ["--pretrained_model_name_or_path", "m", "--output_dir", str(place / "out"), "--placeholder_token", "bt"]
    words += ["--dataset_config", str(file), "--caption_prefix", "bt"]
    options = parse(words, script=TRAIN_TEXTUAL_INVERSION)
    assert options.explicit & {"resolution", "dataset_repeats", "caption_preset", "learning_rate"} == {"learning_rate"}
    saves = {"save_embedding_as", "save_state", "save_every_n_steps"}
    assert saves <= options.explicit
    both = parse([*words, "--network_module", "networks.lora"], script=TRAIN_NETWORK)
    assert not both.explicit & {"resolution", "dataset_repeats", "caption_preset", "learning_rate", *saves}


def test_saves_of_a_command_line_of_diffusers(place: Path) -> None:
    """Their two scripts save a state every 500 steps and files for diffusers; what is said otherwise counts."""
    words = ("--trigger_term", "blorptoken")
    output = embedding(place, *words).output
    assert (output.save_every_n_steps, output.save_state) == (500, True)
    assert embedding(place, *words).embeddings.save_embedding_as == ("diffusers",)
    (line,) = [line for line in embedding(place, *words).notices if "taken for granted" in line]
    assert "--save_embedding_as diffusers, --save_state, --save_every_n_steps 500;" in line
    typed = line.partition("with this name: ")[2].partition("; ")[0].replace(",", "")
    assert embedding(place, "--token_string", "blorptoken", *typed.split()).output == output
    files = embedding(place, *words, "--save_steps", "70", "--save_embedding_as", "webui")
    assert (files.output.save_every_n_steps, files.output.save_state) == (70, True)
    assert files.embeddings.save_embedding_as == ("webui",)
    states = embedding(place, *words, "--checkpointing_steps", "90").output
    assert (states.save_every_n_steps, states.save_state) == (90, True)
    assert embedding(place, *words, "--checkpoints_total_limit", "3").output.save_last_n_steps_state == 1000
    epochs = embedding(place, *words, "--save_every_n_epochs", "2").output
    assert (epochs.save_every_n_epochs, epochs.save_every_n_steps) == (2, None)
    ours = mine(place)
    assert (ours.output.save_every_n_steps, ours.output.save_state) == (None, False)
    assert ours.embeddings.save_embedding_as is None


def test_what_is_lost_but_no_training_is_a_line(place: Path) -> None:
    options = mine(place, "--save_as_full_pipeline", "--root_dir", str(place))
    for name, why in (("save_as_full_pipeline", "only embeddings are saved;"), ("root_dir", "models are files,")):
        assert [line for line in options.notices if line.startswith(f"--{name}: not done: {why}")], name
    for words in (("--tokenizer_name", "x"), ("--revision", "fp16")):
        assert wrong(place, *words)[0].startswith(f"{words[0]}: ")


def test_names_of_others_have_no_short_forms_and_take_none_from_ours(place: Path) -> None:
    assert mine(place, "--learn", "0.25").optimizer.learning_rate == 0.25
    assert mine(place, "--num_vec", "3").embeddings.num_vectors_per_token == (3,)
    assert wrong(place, "--placeholder", "x")[0].startswith("--placeholder: unknown option")


def test_a_name_for_a_flag_that_the_script_lacks_belongs_to_the_other(place: Path) -> None:
    assert wrong(place, "--unet_learning_rate", "1") == [
        "--unet_learning_rate: unknown option; it belongs to train_network.py"
    ]


def test_a_value_that_makes_no_sense_is_told_under_the_name_that_was_typed(place: Path) -> None:
    assert wrong(place, "--adam_beta1", "x", "--checkpointing_steps", "0") == [
        "--checkpointing_steps: 0 is out of range: it must be at least 1",
        "--adam_beta1: 'x' is no number",
    ]
    (line,) = wrong(place, "--only_save_embeds", "yes")
    assert line.startswith("--only_save_embeds: takes no value, but 'yes' follows")
    assert wrong(place, "--num_vectors", "x") == ["--num_vectors: 'x': wanted: whole numbers"]


def test_defaults_of_a_name_that_lost_do_not_count(place: Path) -> None:
    file = place / "c.toml"
    file.write_text('trigger_term = "blorptoken"\n')
    words = ("--config_file", str(file), "--resolution", "64", "--caption_prefix", "zorbtoken")
    options = embedding(place, *words, "--token_string", "zorbtoken")
    assert options.embeddings.token_string == ("zorbtoken",) and options.dataset.dataset_repeats == 1
    assert not [line for line in options.notices if "taken for granted" in line]
    (line,) = [line for line in embedding(place, *words).notices if "taken for granted" in line]
    assert "--trigger_term" in line


def test_templates_of_the_command_line_win_over_those_of_a_preset(place: Path) -> None:
    options = mine(place, "--preset", "embedding-object", "--caption_templates", "my {} there")
    assert options.dataset.caption_templates == ("my {} there",) and options.dataset.caption_preset is None
    file = place / "c.toml"
    file.write_text('caption_templates = ["a {} here"]\n')
    options = mine(place, "--config_file", str(file), "--use_style_template")
    assert options.dataset.caption_preset == "style" and not options.dataset.caption_templates
