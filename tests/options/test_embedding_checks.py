"""What must hold between the flags of embeddings, and between them and others; runs with and without a network."""

from pathlib import Path
from typing import Any

import pytest

from library.options import checks, embedding_checks, optimizer_checks, run_checks
from library.options.embeddings import Embeddings
from library.options.registry import FLAGS, GROUPS, Options
from library.options.scripts import TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION, Script

ALONE, PIVOTAL = TRAIN_TEXTUAL_INVERSION, TRAIN_NETWORK


def options(script: Script = ALONE, **flags: Any) -> Options:
    """Options of a script, of which only these flags were set."""
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for name, value in flags.items():
        groups[FLAGS[name].group][name] = value
    made = {name: GROUPS[name](**members) for name, members in groups.items()}
    return Options.model_validate({**made, "script": script.name, "explicit": frozenset(flags)})


def wrong(script: Script = ALONE, **flags: Any) -> list[str]:
    return [str(problem) for problem in embedding_checks.problems(options(script, **flags))]


def all_wrong(script: Script, **flags: Any) -> list[str]:
    """What every check says, but for flags that are missing."""
    return [
        str(problem) for problem in checks.check(options(script, **flags), frozenset({"train_data_dir"}), ()).problems
    ]


def told(script: Script = ALONE, **flags: Any) -> list[str]:
    return checks.check(options(script, **flags), frozenset(), ()).notices


@pytest.mark.parametrize("script", [ALONE, PIVOTAL], ids=lambda one: one.name)
def test_a_plain_run_has_no_problem(script: Script) -> None:
    flags = {"token_string": ("mycat",), "init_word": ("cat",), "learning_rate": 1e-3}
    network = {"network_module": "networks.lora"} if script is PIVOTAL else {}
    assert all_wrong(script, **flags, **network) == []
    assert told(script, **flags, **network) == []


def test_without_tokens_there_is_nothing_to_check() -> None:
    assert wrong(init_word=("cat", "dog"), ti_train_steps_ratio=0.5, learning_rate=0.0) == []
    assert not [*embedding_checks.notices(options())]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            {"init_word": ("cat",)},
            "--init_word: 1 value for 2 tokens; give one for each token, in the order of --token",
        ),
        ({"initial_phrase": ("a", "b", "c")}, "--initial_phrase: 3 values for 2 tokens"),
        ({"num_vectors_per_token": (1, 2, 3)}, "--num_vectors_per_token: 3 values for 2 tokens"),
        ({"num_vectors_per_token": (3,)}, None),
        ({"num_vectors_per_token": (3, 4)}, None),
        ({"init_word": ("cat", "dog")}, None),
        (
            {"init_word": ("cat", "dog"), "initial_phrase": ("", "a dog")},
            "--init_word, --initial_phrase: each says what the vectors of two start from; give one of them",
        ),
        ({"init_word": ("cat", ""), "initial_phrase": ("", "a dog")}, None),
        ({"init_word": ("cat", "."), "initial_phrase": ("", "a")}, "what the vectors of two start from"),
    ],
)
def test_values_belong_to_tokens_in_their_order(flags: dict[str, Any], problem: str | None) -> None:
    found = wrong(token_string=("one", "two"), **flags)
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]


def test_a_phrase_without_quotes_is_explained() -> None:
    (line,) = wrong(token_string=("mycat",), initial_phrase=("a", "fluffy", "dog"))
    assert line == "--initial_phrase: 3 values for 1 token; words of one phrase stand in quotes: " + (
        "--initial_phrase 'a fluffy dog'"
    )


def test_files_must_be_there(tmp_path: Path) -> None:
    there, missing = tmp_path / "there.pt", tmp_path / "missing.pt"
    there.touch()
    assert wrong(token_string=("one", "two"), weights=(there, missing)) == [f"--weights: there is no file {missing}"]
    assert wrong(token_string=("one", "two"), weights=(there, Path())) == []
    found = wrong(base_embeddings=(f"a={there}", f"b={missing}", str(there), "nothing", f"={there}"))
    assert found == [
        f"--base_embeddings: there is no file {missing}",
        f"--base_embeddings: '{there}' is no TOKEN=FILE; such as there={there}",
        "--base_embeddings: 'nothing' is no TOKEN=FILE; such as mycat=mycat.safetensors",
        f"--base_embeddings: '={there}' names no token; write the token that captions use before the =",
    ]


def test_base_embeddings_are_read_to_the_first_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = embedding_checks.base_pairs(options(base_embeddings=("a=x=y.pt", " b = ~/c.pt ")))
    assert found == (("a", Path("x=y.pt")), ("b", tmp_path / "c.pt"))


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"learning_rate": 0.0, "embedding_lr": 1e-3}, None),
        ({"learning_rate": 1e-3, "embedding_lr": 0.0}, "--embedding_lr"),
    ],
)
def test_vectors_need_a_learning_rate(flags: dict[str, float], where: str | None) -> None:
    found = all_wrong(ALONE, token_string=("mycat",), **flags)
    assert [line.partition(": ")[0] for line in found] == ([where] if where else [])


def test_a_run_must_not_go_on_when_nothing_is_left_to_train() -> None:
    (line,) = wrong(token_string=("mycat",), ti_train_steps_ratio=0.5)
    assert line.startswith("--ti_train_steps_ratio: nothing would be trained after it, because there is no network")
    assert wrong(token_string=("mycat",), ti_train_steps_ratio=1.0) == []
    assert wrong(PIVOTAL, token_string=("mycat",), ti_train_steps_ratio=0.5) == []


@pytest.mark.parametrize("name", ["full_fp16", "full_bf16"])
def test_vectors_stay_in_float32(name: str) -> None:
    flags = {"token_string": ("mycat",), name: True, "mixed_precision": name[-4:]}
    assert wrong(ALONE, **flags) == []
    assert f"--{name}: has no effect, vectors of embeddings stay in float32" in told(ALONE, **flags)
    (line,) = wrong(PIVOTAL, **flags)
    assert line.startswith(f"--{name}: can't be used with --token_string") and "train_textual_inversion.py" in line
    del flags["token_string"]
    assert wrong(PIVOTAL, **flags) == []


@pytest.mark.parametrize("disk", ["", "_to_disk"])
def test_text_that_changes_is_not_cached(disk: str) -> None:
    network = {"network_module": "networks.lora", "network_train_unet_only": True}
    flags = {"cache_text_encoder_outputs": True, **({f"cache_text_encoder_outputs{disk}": True} if disk else {})}
    for script, more in ((ALONE, {}), (PIVOTAL, network)):
        (line,) = all_wrong(script, token_string=("mycat",), **flags, **more)
        assert line.startswith(
            f"--cache_text_encoder_outputs{disk}: what text encoders make of captions can't be cached"
        )
    assert all_wrong(PIVOTAL, **flags, **network) == []


def test_frozen_embeddings_can_be_cached(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    file.touch()
    flags = {"base_embeddings": (f"a={file}",), "cache_text_encoder_outputs": True, "network_train_unet_only": True}
    assert all_wrong(PIVOTAL, network_module="networks.lora", **flags) == []


@pytest.mark.parametrize(
    "flags",
    [
        {"network_train_unet_only": True, "network_train_text_encoder_only": True},
        {"unet_lr": 0.0, "text_encoder_lr": (0.0,)},
        {"unet_lr": 0.0, "network_train_unet_only": True},
    ],
)
def test_a_network_beside_vectors_must_be_trained(flags: dict[str, Any]) -> None:
    (line,) = all_wrong(PIVOTAL, token_string=("mycat",), embedding_lr=1e-3, network_module="networks.lora", **flags)
    assert "of the network" in line and line.endswith("for embeddings alone: train_textual_inversion.py")
    (line,) = all_wrong(PIVOTAL, network_module="networks.lora", **flags)
    assert "of the network" not in line and "train_textual_inversion" not in line


def test_vectors_go_on_when_adapters_of_text_encoders_stop() -> None:
    flags = {"stop_text_encoder_training": 5, "network_train_text_encoder_only": True}
    assert "nothing would be trained after it" in str(*run_checks.problems(options(PIVOTAL, **flags)))
    assert not [*run_checks.problems(options(PIVOTAL, token_string=("mycat",), **flags))]
    half = options(PIVOTAL, token_string=("mycat",), ti_train_steps_ratio=0.5, **flags)
    assert "nothing would be trained after it" in str(*run_checks.problems(half))


def test_an_optimizer_of_one_learning_rate_counts_the_vectors() -> None:
    flags = {"optimizer_type": "DAdaptAdam", "token_string": ("mycat",), "learning_rate": 1.0}
    network = {"network_module": "networks.lora"}
    one_rate = {"embedding_lr": 1.0}
    for script, more in ((ALONE, {}), (PIVOTAL, network)):
        assert not [
            p for p in optimizer_checks.problems(options(script, **flags, **one_rate, **more)) if "one" in p.wrong
        ]
    (problem,) = [
        problem
        for problem in optimizer_checks.problems(options(PIVOTAL, **flags, embedding_lr=0.5, **network))
        if "takes one learning rate" in problem.wrong
    ]
    assert problem.where == "--embedding_lr" and "0.5, 1" in problem.wrong
    alone = options(ALONE, **flags, embedding_lr=0.5)
    assert not [problem for problem in optimizer_checks.problems(alone) if "takes one learning rate" in problem.wrong]


def test_a_schedule_ends_below_the_rate_of_the_vectors() -> None:
    flags = {"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=1e-4",), "token_string": ("mycat",)}
    assert not [*optimizer_checks.problems(options(ALONE, **flags, learning_rate=1e-3))]
    (problem,) = optimizer_checks.problems(options(ALONE, **flags, learning_rate=1e-3, embedding_lr=1e-5))
    assert "lr_end=0.0001 is not below the learning rate 1e-05" in problem.wrong


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({}, "--learning_rate: 2e-06 is very low for the vectors of --token_string"),
        ({"learning_rate": 1e-3, "embedding_lr": 1e-6}, "--embedding_lr: 1e-06 is very low for the vectors"),
        ({"learning_rate": 1e-3}, None),
        ({"scale_lr": True}, None),
        ({"optimizer_type": "Adafactor", "lr_scheduler": "adafactor"}, None),
    ],
)
def test_learning_rates_made_for_networks_are_mentioned(flags: dict[str, Any], line: str | None) -> None:
    lines = told(token_string=("mycat",), init_word=("cat",), **flags)
    assert [one for one in lines if "very low" in one] == [one for one in lines if line and one.startswith(line)]
    assert any("very low" in one for one in lines) == (line is not None)


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"learning_rate": 0.1}, "--learning_rate"),
        ({"learning_rate": 1e-3, "embedding_lr": 0.5}, "--embedding_lr"),
        ({"learning_rate": 1.0, "optimizer_type": "Lion"}, "--learning_rate"),
        ({"learning_rate": 1.0, "scale_lr": True}, "--learning_rate"),
        ({"learning_rate": 1.0, "optimizer_type": "Adam"}, "--learning_rate"),
        ({"learning_rate": 0.09}, None),
        ({"learning_rate": 1.0, "optimizer_type": "Prodigy"}, None),
        ({"learning_rate": 1.0, "optimizer_type": "DAdaptAdam"}, None),
        ({"learning_rate": 1.0, "optimizer_type": "SGDNesterov"}, None),
        ({"learning_rate": 1.0, "optimizer_type": "SGD"}, None),
        ({"learning_rate": 1.0, "optimizer_type": "some.package.Optimizer"}, None),
        ({"learning_rate": 1.0, "optimizer_type": "Adafactor", "lr_scheduler": "adafactor"}, None),
    ],
)
def test_learning_rates_that_leave_nothing_of_the_start_are_mentioned(flags: dict[str, Any], where: str | None) -> None:
    lines = [one for one in told(token_string=("mycat",), init_word=("cat",), **flags) if "very high" in one]
    assert len(lines) == (where is not None)
    assert where is None or lines[0].startswith(
        f"{where}: {max(flags.get('embedding_lr', 0), 0) or flags['learning_rate']:g}"
    )
    assert not [one for one in told(PIVOTAL, **flags) if "very high" in one]


def test_a_state_has_the_vectors_already(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"token_string": ("mycat",), "learning_rate": 1e-3}
    line = "has no effect with --resume, the vectors come from the state"
    for name, value in (("init_word", "cat"), ("initial_phrase", "a cat"), ("weights", tmp_path / "x.pt")):
        start = {**flags, name: (value,)}
        assert told(**start, resume=str(tmp_path)) == [f"--{name}: {line}"]
        assert not [one for one in told(**start, resume="latest") if line in one]
    assert told(**flags, resume=str(tmp_path)) == []


def test_captions_of_a_dataset_class_are_not_looked_at() -> None:
    flags: dict[str, Any] = {"init_word": ("cat", "dog"), "learning_rate": 1e-3, "dataset_class": "some.Class"}
    assert told(token_string=("mycat", "mydog"), **flags) == [
        "--dataset_class: its captions can't be looked at beforehand; they must hold mycat and mydog"
    ]
    assert not [one for one in told(PIVOTAL, dataset_class="some.Class") if "beforehand" in one]


def test_lines_about_starts_rates_and_captions() -> None:
    assert told(token_string=("a1", "b2", "c3"), init_word=("", "x", ""), learning_rate=1e-3) == [
        "--token_string: the vectors of a1 and c3 start at random; they learn sooner from a word for what the pictures "
        "show (--init_word)"
    ]
    lines = told(token_string=("a1",), init_word=("x",), learning_rate=1e-3, embedding_lr=1e-3, text_memo_mb=8)
    assert lines == [
        "--text_memo_mb: has no effect while embeddings are trained",
        "--learning_rate: has no effect, because embedding_lr counts",
    ]
    flags = {"token_string": ("a1",), "init_word": ("x",), "ti_train_steps_ratio": 0.5, "learning_rate": 1e-3}
    assert told(PIVOTAL, **flags, network_train_unet_only=True, text_memo_mb=8) == []


def test_a_start_of_a_token_that_has_none() -> None:
    made = options(token_string=("a1", "b2"), init_word=("x",))
    assert embedding_checks.starts(made, 0) == {"init_word": "x"} and embedding_checks.starts(made, 1) == {}
    assert Embeddings().weights is None and embedding_checks.starts(options(), 0) == {}
