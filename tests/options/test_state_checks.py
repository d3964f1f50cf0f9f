"""Flags of saving, going on and the hub: what is wrong is said with its place, and what does nothing in a line."""

import importlib
from typing import Any

import pytest

from library.options import Options
from library.options.registry import FLAGS
from library.options.state_checks import HubState, is_repo, notices, problems


def options(**values: object) -> Options:
    """Options with these flags set on the command line."""
    groups: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        groups.setdefault(FLAGS[name].group, {})[name] = value
    return Options.model_validate({**groups, "explicit": frozenset(values)})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"huggingface_repo_id": "a lora"}, "--huggingface_repo_id: 'a lora' is no name of a repository; give user/"),
        ({"huggingface_repo_id": "me/a/b"}, "no name of a repository"),
        ({"huggingface_repo_id": "me/a--b"}, "no name of a repository"),
        ({"huggingface_repo_type": "modle"}, "--huggingface_repo_type: there is no repository type modle"),
        ({"huggingface_repo_visibility": "publik"}, "there is no visibility publik; did you mean public?"),
        ({"huggingface_path_in_repo": "../x"}, "--huggingface_path_in_repo: '../x' is no folder in a repository"),
        ({"resume_from_huggingface": True, "resume": "latest"}, "--resume: `latest` is looked for in --output_dir"),
        ({"resume_from_huggingface": True, "resume": "me/lora"}, "is no state on the hub; give user/repo/path"),
        ({"resume_from_huggingface": True, "resume": "me/lora/s:main:thing"}, "there is no repository type thing"),
        ({"initial_step": 1600}, "--initial_step: the run would start at step 1600 of 1600: nothing is left"),
    ],
)
def test_what_is_wrong(values: dict[str, object], said: str) -> None:
    place = {} if "huggingface_repo_id" in values else {"huggingface_repo_id": "me/lora"}
    (problem,) = problems(options(**{**place, **values}))
    assert said in str(problem)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "huggingface_repo_id": "me/lora.v1_x-2",
            "huggingface_repo_type": "dataset",
            "huggingface_path_in_repo": "a/b",
        },
        {"huggingface_repo_id": "me/lora", "huggingface_repo_visibility": "Public"},
        {"huggingface_repo_id": "lora.v1"},
        {"resume_from_huggingface": True, "resume": "me/lora/a/x-state:v1:dataset"},
        {"initial_step": 2000, "max_train_epochs": 10},
        {"initial_step": 5},
    ],
)
def test_what_is_right(values: dict[str, object]) -> None:
    assert list(problems(options(**values))) == []


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("me/lora/x-state", HubState("me/lora", "x-state", None, "model")),
        ("me/lora/a/b/x-state:v1", HubState("me/lora", "a/b/x-state", "v1", "model")),
        ("me/lora/x-state:main:datasets", HubState("me/lora", "x-state", "main", "dataset")),
        ("me/lora/x-state::space", HubState("me/lora", "x-state", None, "space")),
    ],
)
def test_states_on_the_hub_are_read_as_sd_scripts_writes_them(text: str, state: HubState) -> None:
    assert HubState.parse(text) == state


def test_repositories_have_names_that_the_hub_takes() -> None:
    utils: Any = importlib.import_module("huggingface_hub.utils")

    def allowed(name: str) -> bool:
        try:
            utils.validate_repo_id(name)
        except ValueError:
            return False
        return "/" in name

    names = [
        "me/lora",
        "me/.x",
        "me/x.",
        "-me/x",
        "me/x-",
        "a/b/c",
        "me/x..y",
        "me/x--y",
        "me/",
        "/x",
        "me-/x",
        "m/" + "x" * 99,
    ]
    assert [is_repo(name) for name in names] == [allowed(name) for name in names]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"save_last_n_steps": 2}, "--save_last_n_steps: has no effect without --save_every_n_steps"),
        ({"save_last_n_epochs": 2}, "--save_last_n_epochs: has no effect without --save_every_n_epochs"),
        (
            {"save_last_n_steps_state": 2, "save_every_n_steps": 1},
            "--save_last_n_steps_state: has no effect without --save_state",
        ),
        (
            {"huggingface_repo_id": "me/x", "save_state_to_huggingface": True},
            "--save_state_to_huggingface: without --save_state, only a stopped run has a state",
        ),
        ({"huggingface_token": "hf_x", "huggingface_repo_id": "me/x"}, "list this machine's processes can read it"),
        ({"huggingface_token": "hf_x"}, "--huggingface_token: has no effect without --huggingface_repo_id"),
        (
            {"save_model_as": "pt", "metadata_title": "x"},
            "this format holds no metadata, so that --metadata_title will be lost",
        ),
    ],
)
def test_what_does_nothing_is_said(values: dict[str, object], said: str) -> None:
    lines = list(notices(options(**values)))
    assert any(said in line for line in lines), lines
    assert not any("hf_x" in line for line in lines)


def test_nothing_is_said_without_reason() -> None:
    assert list(notices(Options())) == []
    full = {"save_every_n_steps": 1, "save_last_n_steps": 2, "save_last_n_steps_state": 3, "save_state": True}
    assert list(notices(options(**full, huggingface_repo_id="me/x", save_state_to_huggingface=True))) == []
