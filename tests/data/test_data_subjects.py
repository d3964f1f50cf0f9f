"""What templates are about where new tokens are trained, and pictures that lie in no `10_name` folder.

Real flags, folders and captions of the first epoch; no model.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.token_counts import first_showings
from library.data.token_use import problems, token_use
from library.errors import UserError
from library.options import Options, load_datasets, parse
from library.options.scripts import TRAIN_TEXTUAL_INVERSION
from library.options.templates import OBJECT, STYLE
from library.tokenizer.vocabulary import NewToken, Vocabulary
from library.training.prepare_data import Collector, Data, find_data

Run = Callable[..., Options]
OF_A_NETWORK = ("--network_module", "networks.lora")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Parses a command line of train_textual_inversion.py, or of train_network.py where it has a network."""

    def parse_with(*argv: str, tokens: tuple[str, ...] = ("mycat",)) -> Options:
        base = f"--pretrained_model_name_or_path m --output_dir {tmp_path}/out --resolution 64"
        named = ["--token_string", *tokens] if tokens else []
        full = [*base.split(), *named, *argv]
        return parse(full) if "--network_module" in argv else parse(full, script=TRAIN_TEXTUAL_INVERSION)

    return parse_with


@pytest.fixture
def folder(tmp_path: Path, make_picture: Callable[..., Path]) -> Path:
    """Two pictures, one with a caption."""
    make_picture(tmp_path / "in" / "one.png", caption="asleep on a chair")
    make_picture(tmp_path / "in" / "two.png")
    return tmp_path / "in"


def moved(folder: Path, name: str) -> Path:
    """The folder with its pictures in a sub-folder."""
    pictures = list(folder.iterdir())
    (folder / name).mkdir()
    for path in pictures:
        path.rename(folder / name / path.name)
    return folder


def data_of(options: Options) -> Data:
    collect = Collector()
    data = find_data(options, collect, 8, [])
    assert not collect.problems, collect.problems
    assert data is not None
    return data


def captions(options: Options) -> dict[str, str]:
    """The caption of each picture as epoch 1 shows it first, by the file's name."""
    plan = data_of(options).plan
    texts = first_showings(plan, seed=3)
    return {record.path.name: text for record, text in zip(plan.records, texts, strict=True)}


def refused(call: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        call()
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("4_cat", "mycat"),
        ("4", "mycat"),
        ("4_mycat", "mycat"),
        ("4_a MyCat, grey", "a MyCat, grey"),
        ("4_mycats", "mycat"),
        ("4_xmycat", "mycat"),
    ],
)
@pytest.mark.parametrize(("preset", "texts"), [("object", OBJECT), ("style", STYLE)])
def test_templates_are_about_the_token(
    run: Run, folder: Path, name: str, subject: str, preset: str, texts: tuple[str, ...]
) -> None:
    options = run("--train_data_dir", str(moved(folder, name)), "--caption_preset", preset)
    (subset,) = load_datasets(options)[0].subsets
    assert subset.class_tokens == (name.partition("_")[2] or None)
    wanted = {template.replace("{}", subject) for template in texts}
    assert set(captions(options).values()) <= wanted


@pytest.mark.parametrize("argv", [(), OF_A_NETWORK], ids=["alone", "with a network"])
def test_original_captions_follow_the_template(run: Run, folder: Path, argv: tuple[str, ...]) -> None:
    more = ("--caption_templates", "a photo of {}", "--keep_original_captions", *argv)
    options = run("--train_data_dir", str(moved(folder, "1_cat")), *more)
    assert captions(options) == {
        "one.png": "a photo of mycat, asleep on a chair",
        "two.png": "a photo of mycat, cat",
    }


def test_without_tokens_templates_are_about_the_class_tokens(run: Run, folder: Path) -> None:
    argv = ("--train_data_dir", str(moved(folder, "1_cat")), "--caption_templates", "a photo of {}", *OF_A_NETWORK)
    assert set(captions(run(*argv, tokens=())).values()) == {"a photo of cat"}


def test_without_templates_captions_stay_as_they_are(run: Run, folder: Path) -> None:
    options = run("--train_data_dir", str(moved(folder, "1_cat")))
    assert captions(options) == {"one.png": "asleep on a chair", "two.png": "cat"}


def dataset_file(tmp_path: Path, text: str) -> tuple[str, str]:
    (tmp_path / "d.toml").write_text(text.replace("@", str(tmp_path)), encoding="utf-8")
    return "--dataset_config", str(tmp_path / "d.toml")


TWO = """
[general]
caption_extension = ".txt"
caption_templates = ["a photo of {}"]
[[datasets]]
[[datasets.subsets]]
image_dir = "@/in"
class_tokens = "the mydog"
[[datasets.subsets]]
image_dir = "@/more"
"""


def test_several_tokens_are_told_apart_by_class_tokens(
    run: Run, folder: Path, tmp_path: Path, make_picture: Callable[..., Path]
) -> None:
    make_picture(tmp_path / "more" / "three.png", caption="a mycat")
    both = TWO + 'class_tokens = "mycat"\n'
    options = run(*dataset_file(tmp_path, both), tokens=("mycat", "mydog"))
    assert captions(options) == {
        "one.png": "a photo of the mydog", "two.png": "a photo of the mydog", "three.png": "a photo of mycat",
    }  # fmt: skip


@pytest.mark.parametrize("line", ["", 'class_tokens = "cat"', 'class_tokens = "mycats"'])
def test_one_of_several_tokens_must_be_named(
    run: Run, folder: Path, tmp_path: Path, make_picture: Callable[..., Path], line: str
) -> None:
    make_picture(tmp_path / "more" / "three.png", caption="a mycat")
    argv = dataset_file(tmp_path, f"{TWO}{line}\n")
    (problem,) = refused(lambda: run(*argv, tokens=("mycat", "mydog")))
    assert problem.startswith(f"{tmp_path}/d.toml:10 image_dir: templates need a subject")
    assert "(mycat, mydog)" in problem
    assert "10_mycat" in problem and 'class_tokens = "mycat"' in problem
    kept = f"{TWO}{line}\ncustom_attributes = {{diff_output_preservation = true}}\n"
    for text in (kept, f"{TWO}{line}\nis_reg = true\n"):
        shown = captions(run(*dataset_file(tmp_path, text), *OF_A_NETWORK, tokens=("mycat", "mydog")))
        assert shown["three.png"] == "a photo of " + (line.split('"')[1] if line else "a mycat")


def test_folders_that_name_no_token_are_refused_with_several(run: Run, folder: Path) -> None:
    argv = ("--train_data_dir", str(moved(folder, "1_cat")), "--caption_preset", "object")
    (problem,) = refused(lambda: run(*argv, tokens=("mycat", "mydog")))
    assert problem.startswith(f"{folder}/1_cat: templates need a subject")


def test_a_metadata_file_has_no_class_tokens(run: Run, folder: Path) -> None:
    (folder / "m.json").write_text('{"one.png": {"caption": "asleep"}}', encoding="utf-8")
    argv = ("--in_json", str(folder / "m.json"), "--caption_preset", "object")
    assert captions(run(*argv))["one.png"] in [text.replace("{}", "mycat") for text in OBJECT]
    (problem,) = refused(lambda: run(*argv, tokens=("mycat", "mydog")))
    assert problem.startswith("--in_json: templates need a subject")


@pytest.mark.parametrize("argv", [(), OF_A_NETWORK], ids=["alone", "with a network"])
def test_pictures_in_no_folder_are_one_subset(run: Run, folder: Path, argv: tuple[str, ...]) -> None:
    options = run("--train_data_dir", str(folder), "--dataset_repeats", "7", *argv)
    (subset,) = load_datasets(options)[0].subsets
    assert (subset.image_dir, subset.num_repeats, subset.class_tokens) == (folder, 7, "mycat")
    data = data_of(options)
    assert data.plan.samples_per_epoch == 14
    assert captions(options) == {"one.png": "asleep on a chair", "two.png": "mycat"}
    assert any("its 2 pictures are in no folder like 10_name; each is shown 7 times" in x for x in options.notices)


def test_a_command_line_of_another_program_needs_no_folders(run: Run, folder: Path) -> None:
    argv = ("--train_data_dir", str(folder), "--placeholder_token", "<cat-toy>", "--learnable_property", "object")
    options = run(*argv, "--repeats", "5", tokens=())
    plan = data_of(options).plan
    assert plan.samples_per_epoch == 10
    token = NewToken("<cat-toy>")
    assert token_use(plan, Vocabulary((token,)), 1).count(token) == 2
    assert set(captions(options).values()) <= {text.replace("{}", "<cat-toy>") for text in OBJECT}


def test_sub_folders_count_only_where_asked_for(run: Run, folder: Path, make_picture: Callable[..., Path]) -> None:
    make_picture(folder / "deep" / "three.png", caption="a mycat")
    plain = run("--train_data_dir", str(folder))
    assert set(captions(plain)) == {"one.png", "two.png"}
    assert any("--recursive isn't given: the folders deep" in line for line in plain.notices)
    deep = run("--train_data_dir", str(folder), "--recursive")
    assert set(captions(deep)) == {"one.png", "two.png", "three.png"}
    assert not any("--recursive" in line for line in deep.notices)


def test_several_tokens_in_no_folder(run: Run, folder: Path) -> None:
    tokens = ("mycat", "mydog")
    argv = ("--train_data_dir", str(folder))
    assert captions(run(*argv, tokens=tokens)) == {"one.png": "asleep on a chair", "two.png": ""}
    use = token_use(data_of(run(*argv, tokens=tokens)).plan, Vocabulary(tuple(map(NewToken, tokens))), 1)
    assert len(list(problems(use, tuple(map(NewToken, tokens))))) == 2
    (problem,) = refused(lambda: run(*argv, "--caption_preset", "object", tokens=tokens))
    assert problem.startswith(f"{folder}: templates need a subject")


def test_numbered_folders_count_before_loose_pictures(
    run: Run, folder: Path, make_picture: Callable[..., Path]
) -> None:
    make_picture(folder / "2_mycat" / "three.png")
    options = run("--train_data_dir", str(folder))
    assert captions(options) == {"three.png": "mycat"}
    assert any("in no folder like 10_name: 2 pictures" in line for line in options.notices)


@pytest.mark.parametrize("misspelt", [(), ("--tokenstring", "mycat")])
def test_a_flat_folder_is_no_error_of_its_own_where_the_token_is_missing(
    run: Run, folder: Path, misspelt: tuple[str, ...]
) -> None:
    told = refused(lambda: run("--train_data_dir", str(folder), *misspelt, tokens=()))
    assert len(told) == 1 + len(misspelt) // 2
    assert told[-1].startswith("--token_string: is missing")


def test_a_flat_folder_with_flags_of_new_tokens_may_lack_only_their_names(run: Run, folder: Path) -> None:
    argv = ("--train_data_dir", str(folder), *OF_A_NETWORK)
    (line,) = refused(lambda: run(*argv, "--init_word", "cat", tokens=()))
    assert line.endswith(
        f"move the pictures into {folder}/10_name, or add --token_string: new words do without such a folder"
    )
    (line,) = refused(lambda: run(*argv, tokens=()))
    assert line.endswith(f"move the pictures into {folder}/10_name")


@pytest.mark.parametrize("tokens", [("mycat", "mycat"), ("mycat", "MyCat")])
def test_a_token_that_is_named_twice_is_one_subject(run: Run, folder: Path, tokens: tuple[str, ...]) -> None:
    argv = ("--train_data_dir", str(moved(folder, "1_thing")), "--use_object_template")
    assert {text.lower() for text in captions(run(*argv, tokens=tokens)).values()} <= {
        text.replace("{}", "mycat").lower() for text in OBJECT
    }


@pytest.mark.parametrize("name", ["a/b", "<cat>", "cat:", "cat."])
def test_folders_are_named_only_like_tokens_that_they_can_have(run: Run, folder: Path, name: str) -> None:
    tokens = (name, "mydog")
    argv = ("--train_data_dir", str(moved(folder, "1_thing")), "--use_object_template")
    (line,) = refused(lambda: run(*argv, tokens=tokens))
    assert line.endswith(f'; write class_tokens = "{name}" in a --dataset_config')


@pytest.mark.parametrize("what", ["no token", "regularization", "no pictures", "0 repeats"])
def test_other_folders_need_numbered_ones_as_ever(run: Run, folder: Path, what: str) -> None:
    argv, tokens = ["--train_data_dir", str(folder)], ["mycat"]
    if what == "no token":
        argv, tokens = [*argv, *OF_A_NETWORK], []
    elif what == "regularization":
        (folder.parent / "train" / "1_mycat").mkdir(parents=True)
        argv = ["--train_data_dir", str(folder.parent / "train"), "--reg_data_dir", str(folder)]
    elif what == "no pictures":
        moved(folder, "mycat")
    else:
        (folder / "0_old").mkdir()
    assert any(
        "holds no folder named like 10_name" in line for line in refused(lambda: run(*argv, tokens=tuple(tokens)))
    )
