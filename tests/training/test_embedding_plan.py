"""Which tokens a run has, how many vectors each, and what they start from; and what is refused, with which words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from library.errors import UserError
from library.models.info import ModelInfo
from library.models.inspect import inspect
from library.options import Options
from library.options.dataset import Dataset
from library.options.embeddings import Embeddings
from library.options.model import Model
from library.options.optimizer import Optimizer
from library.tokenizer import END_ID, clip_tokenizer, clip_vocabulary, write_folder
from library.tokenizer.vocabulary import NewToken, Vocabulary
from library.training.embedding_plan import EmbeddingPlan, PlannedToken, plan_embeddings, start_notices
from library.training.token_checks import Reading, clashes, pieces, token_problem, unread

Models = Callable[[str], Path]
BOTH = Reading((END_ID, 0))


@pytest.fixture
def plan(tiny_models: Models) -> Callable[..., EmbeddingPlan | None]:
    """The plan of a run with these flags of embeddings, and others by group."""

    def make(family: str = "sd1", *, groups: dict[str, Any] | None = None, **flags: Any) -> EmbeddingPlan | None:
        options = Options(embeddings=Embeddings(**flags), **(groups or {}))
        return plan_embeddings(options, info(tiny_models, family))

    return make


def info(tiny_models: Models, family: str) -> ModelInfo:
    return inspect(str(tiny_models(family)))


def told(make: Callable[..., Any], *arguments: Any, **flags: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        make(*arguments, **flags)
    return [str(problem) for problem in caught.value.problems]


def embedding(path: Path, *widths: int, vectors: int = 2) -> Path:
    """A file in sd-scripts' layout."""
    names = ("emb_params",) if len(widths) == 1 else ("clip_l", "clip_g")
    values = np.random.default_rng(0).normal(size=(vectors, sum(widths))).astype(np.float32)
    parts = np.split(values, np.cumsum(widths)[:-1], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}, path)
    return path


def test_a_run_without_embeddings_has_no_plan(plan: Callable[..., Any]) -> None:
    assert plan() is None


@pytest.mark.parametrize("counts", [None, (3,)])
def test_tokens_in_their_order_each_with_its_vectors(plan: Callable[..., Any], counts: tuple[int, ...] | None) -> None:
    found = plan(token_string=("mycat", "<dog>"), num_vectors_per_token=counts)
    vectors = 1 if counts is None else 3
    assert found == EmbeddingPlan(
        tuple(PlannedToken(NewToken(text, vectors), "--token_string") for text in ("mycat", "<dog>")), (), 2e-6
    )
    assert found.trains and found.vocabulary.vectors == 2 * vectors


def test_settings_reach_the_plan(plan: Callable[..., Any]) -> None:
    flags = {"token_string": ("mycat",), "ti_train_steps_ratio": 0.5, "embedding_norm": "clamp"}
    rates = {"optimizer": Optimizer(learning_rate=1e-3)}
    found = plan(**flags, groups=rates)
    assert (found.rate, found.ratio, found.norm) == (1e-3, 0.5, "clamp")
    assert [found.frozen_after(total) for total in (1, 4, 10, 11)] == [1, 2, 5, 6]
    assert plan(**flags, embedding_lr=5e-3, groups=rates).rate == 5e-3
    assert plan(token_string=("mycat",)).frozen_after(10) is None


def test_words_and_phrases_become_the_ids_that_transformers_gives_them(
    plan: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    write_folder(tmp_path)
    oracle = CLIPTokenizer.from_pretrained(str(tmp_path))

    def ids(text: str) -> tuple[int, ...]:
        return tuple(oracle(text, add_special_tokens=False)["input_ids"])

    found = plan(token_string=("mycat", "mydog"), init_word=("Cat", "dog"), num_vectors_per_token=(2, 1))
    assert [one.ids for one in found.trained] == [ids("cat") * 2, ids("dog")]
    phrase = "a fluffy, reddish dog"
    (one,) = plan(token_string=("mycat",), initial_phrase=(phrase,)).trained
    assert one.ids == ids(phrase) and one.token.vectors == len(ids(phrase)) == 5


def test_each_token_may_start_from_something_else(
    plan: Callable[..., Any], tiny_models: Models, tmp_path: Path
) -> None:
    width = info(tiny_models, "sd1").text_widths[0]
    file = embedding(tmp_path / "old.safetensors", width, vectors=4)
    found = plan(
        token_string=("one1", "two2", "three3", "four4"),
        init_word=("cat", "", "", ""),
        initial_phrase=("", "a dog", "", ""),
        weights=(Path(), Path(), file, Path()),
    )
    assert [(one.token.vectors, len(one.ids), one.file) for one in found.trained] == [
        *((1, 1, None), (2, 2, None)),
        *((4, 0, file), (1, 0, None)),
    ]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_files_tell_how_many_vectors_and_fit_every_encoder(
    plan: Callable[..., Any], tiny_models: Models, tmp_path: Path, family: str
) -> None:
    widths = info(tiny_models, family).text_widths
    mine, other = (embedding(tmp_path / f"{name}.safetensors", *widths, vectors=n) for name, n in (("a", 3), ("b", 2)))
    found = plan(family, token_string=("mycat",), weights=(mine,), base_embeddings=(f"mystyle={other}",))
    assert found.trained == (PlannedToken(NewToken("mycat", 3), "--token_string", file=mine, source="--weights"),)
    assert found.base == (
        PlannedToken(NewToken("mystyle", 2), "--base_embeddings", file=other, source="--base_embeddings"),
    )
    assert [token.text for token in found.vocabulary.tokens] == ["mystyle", "mycat"]
    frozen = plan(family, base_embeddings=(f"mystyle={other}",))
    assert not frozen.trains and frozen.rate == 0


def test_the_token_chooses_in_a_file_of_several(plan: Callable[..., Any], tiny_models: Models, tmp_path: Path) -> None:
    width, path = info(tiny_models, "sd1").text_widths[0], tmp_path / "lora.safetensors"
    names = {"mycat": 3, "mydog": 5}
    save_file(
        {f"bundle_emb.{name}.string_to_param.*": np.ones((n, width), np.float32) for name, n in names.items()}, path
    )
    found = plan(token_string=("mydog",), weights=(path,), base_embeddings=(f"mycat={path}",))
    assert [token.vectors for token in found.vocabulary.tokens] == [3, 5]
    (line,) = told(plan, token_string=("mybird",), weights=(path,))
    assert line.startswith(f"--weights {path}: ") and "mycat" in line and "mydog" in line


def test_a_pickle_is_looked_at_without_running_it(
    plan: Callable[..., Any], tiny_models: Models, tmp_path: Path
) -> None:
    width = info(tiny_models, "sd1").text_widths[0]
    torch.save({"emb_params": torch.zeros(2, width)}, tmp_path / "old.pt")
    assert plan(token_string=("mycat",), weights=(tmp_path / "old.pt",)).trained[0].token.vectors == 2

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"emb_params": Evil()}, tmp_path / "evil.pt")
    (line,) = told(plan, token_string=("mycat",), weights=(tmp_path / "evil.pt",))
    assert line.startswith(f"--weights {tmp_path}/evil.pt: ") and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (
            {"init_word": ("blorp",)},
            "--init_word: 'blorp' is 3 tokens: 'bl', 'or' and 'p'; use a word of one token, or",
        ),
        ({"init_word": ("a dog",)}, "--init_word: 'a dog' is 2 tokens: 'a' and 'dog'; use a word of one token, or "),
        ({"init_word": (" ",)}, "--init_word: ' ' is no word"),
        ({"initial_phrase": (" ",)}, "--initial_phrase: ' ' holds no word"),
        (
            {"initial_phrase": ("a fluffy dog",), "num_vectors_per_token": (2,)},
            "--num_vectors_per_token: 2 for 'mycat', but --initial_phrase has 3; leave it out",
        ),
        ({"num_vectors_per_token": (76,)}, "--token_string: 'mycat' has 76 vectors, and captions are cut at 75"),
    ],
)
def test_starts_that_make_no_sense(plan: Callable[..., Any], flags: dict[str, Any], wrong: str) -> None:
    (line,) = told(plan, token_string=("mycat",), **flags)
    assert line.startswith(wrong)


def test_advice_for_a_phrase_can_be_pasted(plan: Callable[..., Any]) -> None:
    (line,) = told(plan, token_string=("mycat",), init_word=("my friend's dog",))
    assert line.endswith("""--initial_phrase 'my friend'"'"'s dog' for a vector of each""")


def test_longer_captions_hold_more_vectors(plan: Callable[..., Any]) -> None:
    longer = {"model": Model(max_token_length=150)}
    assert plan(token_string=("mycat",), num_vectors_per_token=(150,), groups=longer).vocabulary.vectors == 150
    (line,) = told(plan, token_string=("mycat",), num_vectors_per_token=(151,), groups=longer)
    assert "captions are cut at 150" in line


def test_files_for_other_models_and_other_counts(plan: Callable[..., Any], tiny_models: Models, tmp_path: Path) -> None:
    width = info(tiny_models, "sd1").text_widths[0]
    mine, wide = embedding(tmp_path / "a.safetensors", width), embedding(tmp_path / "b.safetensors", 1024)
    lines = told(
        plan,
        token_string=("mycat", "mydog"),
        weights=(mine, wide),
        num_vectors_per_token=(5,),
        base_embeddings=(f"mystyle={wide}",),
    )
    this = f"trained for SD2 (1024), this model is SD1 ({width})"
    assert [line.partition("; ")[0] for line in lines] == [
        f"--base_embeddings {wide}: {this}",
        f"--num_vectors_per_token: 5 for 'mycat', but {mine} has 2",
        f"--weights {wide}: {this}",
    ]


def test_a_damaged_file_is_named(plan: Callable[..., Any], tmp_path: Path) -> None:
    path = embedding(tmp_path / "a.safetensors", 64)
    path.write_bytes(path.read_bytes()[:-8])
    (line,) = told(plan, token_string=("mycat",), weights=(path,))
    assert line.startswith(f"--weights {path}: is truncated")


def test_everything_is_told_at_once_and_where_it_was_said(tiny_models: Models) -> None:
    flags = Embeddings(token_string=("cat", "my cat", "fine"), init_word=("blorp", "dog", "dog"))
    options = Options(embeddings=flags, places={"token_string": "run.toml:3 token_string"})
    lines = told(plan_embeddings, options, info(tiny_models, "sd1"))
    assert [line.partition(": ")[0] for line in lines] == ["--init_word", *["run.toml:3 token_string"] * 3]
    assert "'cat'" in lines[1] and "'my cat'" in lines[2] and "'fine'" in lines[3]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "an empty text is no token"),
        ("my cat", "'my cat' holds white space, and a token is one word; write it as one word, such as my-cat"),
        ("my\u00a0cat", "holds white space"),
        (" ", "holds white space, and a token is one word; write it as one word, such as mycat"),
        ("my\u200bcat", "holds a character that can't be seen"),
        ("mycat,mydog", "'mycat,mydog' holds a comma, which ends a tag; several tokens stand with spaces between"),
        ("Cat", "the tokenizer knows 'Cat' already, as its token 2368; use a word that it doesn't know, such as myCat"),
        ("self", "use a word that it doesn't know, such as my-self"),
        ("!", "the tokenizer knows '!' already"),
        ("<|EndOfText|>", "is a sign of the tokenizer's own"),
        ("<|startoftext|>", "is a sign of the tokenizer's own"),
    ],
)
def test_words_that_are_no_new_tokens(text: str, wrong: str) -> None:
    problem = token_problem(text, "--token_string", BOTH)
    assert problem is not None and wrong in str(problem)


@pytest.mark.parametrize("text", ["mycat", "<cat>", "my-cat", "<*>", "sks1", "MyCat", "Écureuil9", "(cat)", "a[b"])
def test_words_that_are_new_tokens_are_found_in_captions(text: str) -> None:
    assert token_problem(text, "", BOTH) is None
    for vectors in (1, 3):
        assert not [*unread(Vocabulary((NewToken(text, vectors),)), [""], BOTH)]


def test_brackets_and_braces_count_where_captions_read_them() -> None:
    for text in ("(cat)", "a[b", "my\\cat", "(x:1.5)"):
        assert token_problem(text, "", Reading()) is None
        assert "--weighted_captions" in str(token_problem(text, "", Reading(weighted=True)))
    assert token_problem("<cat>:", "", Reading(weighted=True)) is None
    assert token_problem("{cat|dog}", "", Reading()) is None
    assert "--enable_wildcard" in str(token_problem("{cat|dog}", "", Reading(wildcards=True)))


def test_a_run_that_weighs_captions_refuses_brackets(plan: Callable[..., Any]) -> None:
    assert plan(token_string=("(cat)",)).trains
    (line,) = told(plan, token_string=("(cat)",), groups={"dataset": Dataset(weighted_captions=True)})
    assert "--weighted_captions" in line


def test_the_padding_sign_is_never_part_of_a_word(plan: Callable[..., Any]) -> None:
    """SD2 and SDXL's second encoder pad with `!`, which then is a token of its own wherever it stands."""
    assert plan("sd1", token_string=("wow!",)).trains
    for family in ("sd2", "sdxl"):
        (line,) = told(plan, family, token_string=("wow!",))
        assert "doesn't find 'wow!' in a caption, but 'wow' and '!'" in line


def test_only_words_that_are_one_token_count_as_known() -> None:
    """The oracle is the vocabulary itself: a word is one token if it stands there with the mark of a word's end;
    without it, it is a piece of words, which is refused in other words."""
    words = [token.removesuffix("</w>") for token in list(clip_vocabulary())[3000:49000:37]]
    letters = [word for word in words if word.isascii() and word.isalpha()]
    assert len(letters) > 800
    for word in letters:
        known = f"{word}</w>" in clip_vocabulary()
        problem = token_problem(word, "", Reading())
        assert problem is not None and ("knows" in problem.wrong) == known, word


def test_pieces_are_parts_of_the_text() -> None:
    assert [part for _, part in pieces("a Fluffy blorp!")] == ["a", "Fluffy", "bl", "or", "p", "!"]
    assert [one for one, _ in pieces("cat")] == clip_tokenizer().encode("cat", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("tokens", "wrong"),
    [
        ([("mycat", 1), ("mycat", 1)], "'mycat' stands there twice"),
        ([("MyCat", 1), ("mycat", 1)], "'mycat' and 'MyCat' are the same token, because case doesn't count"),
        ([("Éclairs9", 1), ("E\u0301CLAIRS9", 1)], "are the same token"),
        ([("tok", 2), ("tok1", 1)], "'tok1' would name two vectors: number 2 of 'tok' and number 1 of 'tok1'"),
        ([("Tok1", 1), ("tok", 3)], "'tok1' would name two vectors: number 1 of 'Tok1' and number 2 of 'tok'"),
        ([("tok", 12), ("tok1", 2)], "'tok1' would name two vectors"),
        ([("tok", 1), ("tok1", 1)], None),
        ([("tok", 2), ("tok2", 1)], None),
    ],
)
def test_tokens_that_get_in_each_others_way(tokens: list[tuple[str, int]], wrong: str | None) -> None:
    found = [str(problem) for problem in clashes([(NewToken(*one), "--token_string") for one in tokens])]
    assert len(found) == (wrong is not None)
    assert wrong is None or wrong in found[0]


def test_a_base_embeddings_token_clashes_too(plan: Callable[..., Any], tiny_models: Models, tmp_path: Path) -> None:
    file = embedding(tmp_path / "a.safetensors", *info(tiny_models, "sd1").text_widths)
    (line,) = told(plan, token_string=("mycat1",), base_embeddings=(f"mycat={file}",))
    assert line.startswith("--base_embeddings, --token_string: 'mycat1' would name two vectors: number 2 of 'mycat'")
    (line,) = told(plan, token_string=("mycat",), base_embeddings=(f"mycat={file}",))
    assert line.startswith("--base_embeddings, --token_string: 'mycat' stands there twice")
    (line,) = told(plan, base_embeddings=(f"mycat={file}", f"MYCAT={file}"))
    assert line.startswith("--base_embeddings: 'MYCAT' and 'mycat' are the same token")
    (line,) = told(plan, base_embeddings=(f"cat={file}",))
    assert line.startswith("--base_embeddings: the tokenizer knows 'cat' already")


def test_tokens_with_one_name_in_a_bundle(plan: Callable[..., Any]) -> None:
    assert plan(token_string=("my.cat", "my_cat")).trained
    (line,) = told(plan, token_string=("my.cat", "my_cat"), save_embedding_as=("webui", "bundle"))
    assert "'my.cat' and 'my_cat' have the same name in a bundle, 'my_cat'" in line


def test_a_start_behind_the_steps_in_which_vectors_are_trained_is_told(plan: Callable[..., Any]) -> None:
    half = plan(token_string=("mycat",), ti_train_steps_ratio=0.5)
    assert not [*start_notices(half, 4, 10, "--initial_step")]
    (line,) = start_notices(half, 5, 10, "--initial_step")
    assert line == ("--initial_step: the vectors are trained in the first 5 of 10 steps, so that they never are")
    assert not [*start_notices(plan(token_string=("mycat",)), 9, 10, "--initial_step")]
