"""The registry against the flags of sd-scripts (flags.tsv), and the docs and the help made from it."""

import ast
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import Options, parse, setup_parser
from library.options.registry import FLAGS, flags_of_script
from library.options.scripts import TRAIN_TEXTUAL_INVERSION

_OURS = {
    *("deterministic", "trust_foreign_caches", "resume_schedule", "dry_run", "text_encoder", "variant"),
    *("ignore_model_hash", "text_memo_mb", "exact_crop_conditioning", "recursive", "caption_from"),
    *("shuffle_caption_delimiter", "caption_preset", "caption_templates", "keep_original_captions"),
    *("aspect_ratio_buckets", "bucket_choice", "more_resolutions", "max_crop_loss", "skip_small_images"),
    *("skip_bad_images", "verify_images", "keep_in_memory", "latent_sampling"),
    *("stop_text_encoder_training", "early_stopping_patience", "ignore_memory_check", "list_optimizers"),
    *("legacy_ztsnr_weights", "masked_loss_normalize", "gradient_checkpointing_every"),
    *("gradient_checkpointing_attention_only", "offload_text_encoders", "offload_during_sampling"),
    *("sample_images_per_prompt", "preview_prompts", "log_norms", "preset", "print_command"),
    *("initial_phrase", "base_embeddings", "embedding_lr", "ti_train_steps_ratio", "embedding_norm"),
    *("save_embedding_as", "scale_lr", "no_scale_lr"),
}
_ONE_FOR_EACH_TOKEN = {"token_string", "num_vectors_per_token", "init_word", "weights"}
"""One value in sd-scripts, and here one for each of several tokens; the number of vectors may follow from files."""
_SHAPES = {"flag": {"flag"}, "int": {"int"}, "float": {"float"}, "int_or_float": {"steps"}, "Path": {"path"}}
_TEXTS = {"str", "path", "size"}


def _theirs(script: str = "network") -> list[dict[str, str]]:
    with (Path(__file__).parent / "flags.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [row for row in rows if {script, f"sdxl_{script}"} & set(row["scripts"].split(","))]


def _names(script: str) -> set[str]:
    return {row["flag"].removeprefix("--") for row in _theirs(script)}


def test_every_flag_of_their_scripts_is_known_and_no_other() -> None:
    assert _names("network") | _names("ti") | _OURS == set(FLAGS)
    assert (len(_theirs()), len(_theirs("ti"))) == (196, 170)


def test_the_script_of_embeddings_has_every_flag_of_theirs() -> None:
    """Besides, it has those of the network script that aren't about networks."""
    ours = set(flags_of_script("train_textual_inversion"))
    assert _names("ti") <= ours
    lacking = set(FLAGS) - ours
    assert all(FLAGS[name].group == "network" or name in TRAIN_TEXTUAL_INVERSION.lacks for name in lacking)


@pytest.mark.parametrize(
    ("script", "row"),
    [
        pytest.param(ours, row, id=f"{theirs} {row['flag']}")
        for ours, theirs in (("train_network", "network"), ("train_textual_inversion", "ti"))
        for row in _theirs(theirs)
    ],
)
def test_type_default_and_choices_are_those_of_sd_scripts(script: str, row: dict[str, str]) -> None:
    flag = flags_of_script(script)[row["flag"].removeprefix("--")]
    several = flag.name in _ONE_FOR_EACH_TOKEN
    assert flag.default == ast.literal_eval(row["default"]) or (several and flag.default is None)
    assert flag.many == ("nargs" in row["type"] or several)
    assert flag.shape in _SHAPES.get(row["type"].split("[")[0], _TEXTS)
    if row["choices"]:
        assert set(flag.choices) == {choice for choice in json.loads(row["choices"]) if choice is not None}
    else:
        assert not flag.choices or flag.name == "lr_scheduler"


@pytest.mark.parametrize(
    "name", [row["flag"].removeprefix("--") for row in _theirs() if row["scripts"].split(",")[0].startswith("sdxl")]
)
def test_flags_that_only_the_sdxl_script_has_count_for_every_family(name: str) -> None:
    assert FLAGS[name].kind in ("honoured", "equivalent")


def test_every_flag_says_what_it_is_and_why_it_is_refused() -> None:
    for flag in FLAGS.values():
        assert flag.text, flag.name
        assert flag.kind == "honoured" or flag.why, flag.name
        assert flag.needs is None or flag.needs in FLAGS, flag.name


def test_defaults_make_options_with_every_flag() -> None:
    effective = Options().effective()
    assert set(effective) == {name for name, flag in FLAGS.items() if not flag.secret}
    assert effective["max_train_steps"] == 1600
    json.dumps(effective)


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.kind == "refused" and not flag.needs])
def test_a_refused_flag_refuses_with_its_reason(name: str) -> None:
    flag = FLAGS[name]
    value = {"flag": [], "int": ["3"], "float": ["0.5"], "steps": ["3"], "path": ["x"], "str": ["x"]}[flag.shape]
    with pytest.raises(UserError) as caught:
        parse([flag.option, *value])
    (problem,) = [problem for problem in caught.value.problems if problem.where == flag.option]
    assert f"{problem.wrong}; {problem.advice}".strip("; ") == flag.why


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--dynamo_backend", "nvprims_nvfuser"), ("--dynamo_backend", "ofi")],
)
def test_a_value_that_nothing_stands_behind_refuses(flag: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([flag, value])
    assert f"{flag}: {value} can't be used" in str(caught.value)


def test_the_public_parser_has_types_and_defaults() -> None:
    namespace = setup_parser().parse_args(
        ["--network_dim", "8", "--text_encoder_lr", "1e-4", "2e-4", "--network_args", "a=1", "b=2"]
    )
    assert namespace.network_dim == 8
    assert namespace.text_encoder_lr == [1e-4, 2e-4]
    assert namespace.network_args == ["a=1", "b=2"]
    assert namespace.learning_rate == 2e-6
    assert namespace.shuffle_caption is False


def test_docs_are_up_to_date(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/write_docs.py", "--check"], cwd=repo_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (repo_root / "docs" / "options.md").read_text(encoding="utf-8")
    assert all(f"`--{name}`" in page for name in FLAGS)


def test_parsing_imports_nothing_heavy(repo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "2_cat").mkdir(parents=True)
    script = f"""
import sys
from library.options import load_datasets, parse
options = parse("--pretrained_model_name_or_path m --output_dir {tmp_path}/out --network_module networks.lora "
                "--train_data_dir {tmp_path}/pictures --resolution 512".split())
assert load_datasets(options)[0].subsets[0].num_repeats == 2
heavy = {{"torch", "diffusers", "transformers", "accelerate", "cv2", "numpy", "networks"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()


def test_help_is_grouped_and_exits_with_0(repo_root: Path) -> None:
    script = "from library.options import parse; parse(['--help'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    titles = [
        "Pictures and captions:",
        "Network:",
        "Accepted, with nothing to do:",
        "Known from sd-scripts, but refused:",
    ]
    positions = [done.stdout.index(title) for title in titles]
    assert positions == sorted(positions)
    assert all(f"--{name}" in done.stdout for name in FLAGS)
    assert max(map(len, done.stdout.splitlines())) < 200
