"""Bad input of embeddings, through the scripts: exit code 2, one message of what is wrong and where, and no torch."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.pictures import make_pictures
from tests.programs import ROOT, environment

SEVERAL = """
import contextlib, importlib, io, json, sys
main = importlib.import_module(sys.argv[1]).main
for line in sys.stdin:
    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        code = main(json.loads(line))
    print(json.dumps([code, errors.getvalue(), "torch" in sys.modules]))
"""
"""Runs a script's `main` with one list of arguments a line, in one process."""
ALONE, PIVOTAL = "train_textual_inversion", "train_network"


@dataclass
class Job:
    """A good command line of one of the scripts for a tiny SD1 model; a case spoils one thing of it."""

    folder: Path
    model: Path
    script: str
    options: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_pictures(self.folder / "pictures", name="mycat", count=3)
        self.options = {
            "--pretrained_model_name_or_path": [str(self.model)],
            "--train_data_dir": [str(self.folder / "pictures")],
            "--output_dir": [str(self.folder / "output")],
            "--token_string": ["mycat"],
            "--init_word": ["cat"],
            "--use_object_template": [],
            "--learning_rate": ["1e-3"],
            "--resolution": ["64"],
            "--max_train_steps": ["1"],
        }
        if self.script == PIVOTAL:
            self.options["--network_module"] = ["networks.lora"]

    def put(self, flag: str, *values: object) -> None:
        self.options[flag] = list(map(str, values))

    def embedding(self, width: int, vectors: int = 2) -> Path:
        path = self.folder / f"old{width}.safetensors"
        save_file({"emb_params": np.ones((vectors, width), np.float32)}, path)
        return path

    @property
    def arguments(self) -> list[str]:
        return [part for flag, values in self.options.items() for part in (flag, *values)]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and the words that its message should hold."""

    code: int
    errors: str
    torch: bool
    words: Sequence[str]
    folder: Path


def a_known_token(job: Job) -> list[str]:
    job.put("--token_string", "cat")
    return ["--token_string: ", "the tokenizer knows 'cat' already"]


def a_token_of_two_words(job: Job) -> list[str]:
    job.put("--token_string", "my cat")
    return ["--token_string: ", "'my cat' holds white space", "my-cat"]


def a_token_named_twice(job: Job) -> list[str]:
    job.put("--token_string", "mycat", "MyCat")
    job.put("--init_word", "cat", "cat")
    return ["--token_string: ", "'MyCat' and 'mycat' are the same token"]


def a_token_that_stands_there_twice(job: Job) -> list[str]:
    job.put("--token_string", "mycat", "mycat")
    job.put("--init_word", "cat", "cat")
    return ["--token_string: 'mycat' stands there twice; name each token once"]


def captions_that_are_never_shown(job: Job) -> list[str]:
    job.put("--caption_dropout_rate", "1")
    return ["--token_string: no caption is left to learn mycat from", "(caption_dropout_rate 1)"]


def an_init_word_of_several_tokens(job: Job) -> list[str]:
    job.put("--init_word", "blorp")
    return ["--init_word: 'blorp' is 3 tokens: 'bl', 'or' and 'p'", "--initial_phrase blorp"]


def too_few_init_words(job: Job) -> list[str]:
    job.put("--token_string", "mycat", "mydog")
    return ["--init_word: 1 value for 2 tokens"]


def two_starts(job: Job) -> list[str]:
    job.put("--initial_phrase", "a cat")
    return ["--init_word, --initial_phrase: each says what the vectors of mycat start from"]


def an_embedding_of_another_width(job: Job) -> list[str]:
    del job.options["--init_word"]
    path = job.embedding(1024)
    job.put("--weights", path)
    return [f"--weights {path}: trained for SD2 (1024), this model is SD1 ("]


def other_counts_than_the_file(job: Job) -> list[str]:
    del job.options["--init_word"]
    job.put("--weights", job.embedding(width(job.model)))
    job.put("--num_vectors_per_token", 3)
    return ["--num_vectors_per_token: 3 for 'mycat'", "has 2"]


def other_counts_than_the_phrase(job: Job) -> list[str]:
    del job.options["--init_word"]
    job.put("--initial_phrase", "a fluffy dog")
    job.put("--num_vectors_per_token", 2)
    return ["--num_vectors_per_token: 2 for 'mycat'", "--initial_phrase has 3"]


def a_damaged_embedding(job: Job) -> list[str]:
    del job.options["--init_word"]
    path = job.embedding(width(job.model))
    path.write_bytes(path.read_bytes()[:-4])
    job.put("--weights", path)
    return [f"--weights {path}: is truncated"]


def a_picture_as_embedding(job: Job) -> list[str]:
    path = next((job.folder / "pictures").rglob("*.png"))
    job.put("--base_embeddings", f"mystyle={path}")
    return [f"--base_embeddings {path}: "]


def a_base_embedding_without_a_token(job: Job) -> list[str]:
    path = job.embedding(width(job.model))
    job.put("--base_embeddings", path)
    return ["--base_embeddings: ", "is no TOKEN=FILE", f"such as {path.stem}={path}"]


def two_templates(job: Job) -> list[str]:
    job.put("--use_style_template")
    return ["--use_style_template: --use_object_template asks for other templates"]


def cached_text(job: Job) -> list[str]:
    job.put("--cache_text_encoder_outputs")
    return ["--cache_text_encoder_outputs: ", "can't be cached", "leave the cache out"]


def a_rate_of_0(job: Job) -> list[str]:
    job.put("--embedding_lr", 0)
    return ["--embedding_lr: the learning rate of the vectors of --token_string is 0"]


def more_vectors_than_a_caption_holds(job: Job) -> list[str]:
    job.put("--num_vectors_per_token", 80)
    return ["--token_string: 'mycat' has 80 vectors, and captions are cut at 75", "--max_token_length 225"]


EITHER = [
    *(a_known_token, a_token_of_two_words, a_token_named_twice, an_init_word_of_several_tokens, too_few_init_words),
    *(two_starts, an_embedding_of_another_width, other_counts_than_the_file, other_counts_than_the_phrase),
    *(a_damaged_embedding, a_picture_as_embedding, a_base_embedding_without_a_token, two_templates, cached_text),
    *(a_rate_of_0, more_vectors_than_a_caption_holds, a_token_that_stands_there_twice, captions_that_are_never_shown),
]


def data_file(job: Job, dataset: str = "", subset: str = "") -> Path:
    """The job's pictures by a dataset file: once plain, and once with further lines."""
    (folder,) = (job.folder / "pictures").iterdir()
    file = job.folder / "data.toml"
    table = f'[[datasets.subsets]]\nimage_dir = "{folder}"\n'
    start = "[[datasets]]\nresolution = 64\n"
    file.write_text(f"{start}{table}{start}{dataset}{table}{subset}")
    del job.options["--train_data_dir"]
    job.put("--dataset_config", file)
    return file


def a_strength_of_vectors(job: Job) -> list[str]:
    file = data_file(job, dataset="network_multiplier = 0.5\n")
    return [f"{file}:", "network_multiplier changes a network's strength, and vectors have none; leave it out"]


def what_vectors_change_preserved(job: Job) -> list[str]:
    file = data_file(job, subset="custom_attributes = {diff_output_preservation = true}\n")
    return [f"{file}:", "diff_output_preservation changes a network's strength, and vectors have none; leave it out"]


def no_token(job: Job) -> list[str]:
    for flag in ("--token_string", "--init_word", "--use_object_template"):
        del job.options[flag]
    return ["--token_string: is missing", "mycat"]


def nothing_left_to_train(job: Job) -> list[str]:
    job.put("--ti_train_steps_ratio", 0.5)
    return ["--ti_train_steps_ratio: nothing would be trained after it", "--max_train_steps"]


def vectors_in_16_bits(job: Job) -> list[str]:
    job.put("--full_bf16")
    job.put("--mixed_precision", "bf16")
    return ["--full_bf16: can't be used with --token_string", "float32"]


def no_part_of_the_network(job: Job) -> list[str]:
    job.put("--unet_lr", 0)
    job.put("--network_train_unet_only")
    return ["nothing would be trained of the network", "train_textual_inversion.py"]


CASES = [
    *((ALONE if number % 2 else PIVOTAL, case) for number, case in enumerate(EITHER)),
    *((ALONE, case) for case in (no_token, nothing_left_to_train, a_strength_of_vectors)),
    (ALONE, what_vectors_change_preserved),
    *((PIVOTAL, case) for case in (vectors_in_16_bits, no_part_of_the_network)),
]


def width(model: Path) -> int:
    from library.models.inspect import inspect

    return inspect(str(model)).text_widths[0]


@pytest.fixture(scope="module")
def outcomes(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Outcome]]:
    """The outcomes of all cases of a script by their names; one, `good`, spoils nothing."""

    @cache
    def find(script: str) -> dict[str, Outcome]:
        chosen = [case for name, case in CASES if name == script]
        jobs = [Job(tmp_path_factory.mktemp("job"), tiny_sd1, script) for _ in range(len(chosen) + 1)]
        words = [case(job) for job, case in zip(jobs, chosen, strict=False)]
        jobs[-1].put("--dry_run")
        result = subprocess.run(
            [sys.executable, "-c", SEVERAL, script],
            input="\n".join(json.dumps(job.arguments) for job in jobs),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        names = [*(case.__name__ for case in chosen), "good"]
        told = zip(names, lines, [*words, []], jobs, strict=True)
        return {
            name: Outcome(code, errors, torch, wanted, job.folder) for name, (code, errors, torch), wanted, job in told
        }

    return find


@pytest.mark.parametrize(("script", "case"), [(script, case.__name__) for script, case in CASES])
def test_one_clear_message(script: str, case: str, outcomes: Callable[[str], dict[str, Outcome]]) -> None:
    found = outcomes(script)[case]
    assert found.code == 2, found.errors
    assert not found.torch, "torch was imported"
    errors = [line for line in found.errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, found.errors
    assert all(word in errors[0] for word in found.words), errors[0]
    assert "Traceback" not in found.errors
    assert not (found.folder / "output").exists()


@pytest.mark.parametrize("script", [ALONE, PIVOTAL])
def test_what_the_cases_spoil_is_good(script: str, outcomes: Callable[[str], dict[str, Outcome]]) -> None:
    good = outcomes(script)["good"]
    assert (good.code, good.torch) == (0, False), good.errors


@pytest.mark.parametrize("script", [ALONE, PIVOTAL])
def test_a_real_process_ends_with_code_2(script: str, tiny_sd1: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, tiny_sd1, script)
    a_known_token(job)
    command = [sys.executable, str(ROOT / f"{script}.py"), *job.arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "error: --token_string: the tokenizer knows 'cat' already" in result.stderr
