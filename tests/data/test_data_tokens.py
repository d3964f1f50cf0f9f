"""New tokens in captions: what they count, and which captions hold them. Counts against transformers' tokenizer."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from library.data import report
from library.data.custom import CustomPlan
from library.data.plan import Dataset, Plan, build_plan
from library.data.sources import scan as sources
from library.data.token_counts import Fragments, count_tokens
from library.data.token_use import notices, problems, token_use
from library.models.weighted import fragments
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec
from library.tokenizer import write_folder
from library.tokenizer.vocabulary import PLAIN, NewToken, Vocabulary

CAT, DOG = NewToken("mycat", 3), NewToken("mydog")
BOTH = Vocabulary((CAT, DOG))
CAPTIONS = {
    "a": "a red mycat on a sofa",
    "b": "MyCat, and another mycat; (mycat:1.3)",
    "c": "a mycat mycat1 mycat2 written out",
    "d": "mycats and xmycat are no mycat-token, mydog is",
    "e": "a cat, " + ", ".join(f"word{i}" for i in range(30)) + " with a mycat at its end",
    "f": "nothing at all",
}

MakePlan = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path, make_picture: Callable[..., Path], make_spec: Callable[..., DatasetSpec]) -> MakePlan:
    """A plan over pictures with these captions, and over regularization pictures of `a dog` without a token."""

    def make(captions: Mapping[str, str], **how: Any) -> Plan:
        for name, text in captions.items():
            make_picture(tmp_path / "1_cat" / f"{name}.png", caption=text)
        make_picture(tmp_path / "1_reg" / "r.png", caption="a dog")
        subset = SubsetSpec(tmp_path / "1_cat", caption_extension=".txt", **how)
        reg = SubsetSpec(tmp_path / "1_reg", caption_extension=".txt", is_reg=True)
        spec = make_spec(subset, reg)
        return build_plan([spec], sources.survey([spec]).records, 8, 1)

    return make


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], int]:
    """How many tokens transformers makes of a text with the vectors of `mycat` written out."""
    folder = tmp_path_factory.mktemp("clip")
    write_folder(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*CAT.parts, *DOG.parts])

    def count(text: str) -> int:
        whole = re.sub(r"(?i)\bmycat\b(?! mycat1)", "mycat mycat1 mycat2", text)
        return len(tokenizer(whole).input_ids) - 2

    return count


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_token_counts_all_of_its_vectors(planned: MakePlan, theirs: Callable[[str], int], name: str) -> None:
    text = CAPTIONS[name].replace("mycats and xmycat", "cats and dogs")
    plan = planned({name: text})
    assert count_tokens(plan, seed=1, limit=75, vocabulary=BOTH).maximum == theirs(text)


def test_plain_captions_count_as_ever(planned: MakePlan) -> None:
    plan = planned({name: re.sub("(?i)my(cat|dog)", r"\1", text) for name, text in CAPTIONS.items()})
    for limit in (5, 30, 75):
        plain = count_tokens(plan, seed=1, limit=limit)
        assert plain == count_tokens(plan, seed=1, limit=limit, vocabulary=BOTH)
        assert plain.cut or limit == 75


def test_what_is_cut_begins_with_the_first_token_behind_the_limit(
    planned: MakePlan, theirs: Callable[[str], int]
) -> None:
    plan = planned(CAPTIONS)
    for limit in range(1, 40):
        for one in count_tokens(plan, seed=1, limit=limit, vocabulary=BOTH).cut:
            text = CAPTIONS[one.picture.removesuffix(".png")] if one.picture != "r.png" else "a dog"
            assert text.endswith(one.cut)
            if one.picture in ("d.png", "r.png", "c.png"):
                continue
            kept, first = text.removesuffix(one.cut), one.cut.split(" ")[0]
            assert theirs(kept) <= limit < theirs(kept + first)


def test_weighted_captions_count_the_vectors_of_their_pieces(planned: MakePlan) -> None:
    plan = planned({"a": "a (mycat:1.2) and [mycat]"})
    counts = count_tokens(plan, seed=1, limit=75, fragments=fragments, vocabulary=BOTH)
    assert counts.maximum == 1 + 3 + 1 + 3
    assert count_tokens(plan, seed=1, limit=75, vocabulary=BOTH).maximum > counts.maximum
    use = token_use(plan, BOTH, 1, fragments=fragments)
    assert use.count(CAT) == 1


def test_captions_are_counted_by_the_tokens_that_they_hold(planned: MakePlan) -> None:
    use = token_use(planned(CAPTIONS), BOTH, 1, limit=150)
    assert (use.captions, use.count(CAT), use.count(DOG)) == (6, 5, 1)
    (without,) = use.without([CAT, DOG])
    assert (without.captions, Path(without.picture).name, without.caption) == (1, "f.png", "nothing at all")
    assert use.beyond == use.sometimes == frozenset()
    assert list(problems(use, [CAT, DOG])) == []
    (line,) = notices(use, [CAT, DOG])
    assert "mycat in 5, mydog in 1 of 6 captions; 1 doesn't hold any of them, such as 'nothing at all' of " in line


@pytest.mark.parametrize("fragment", [None, fragments], ids=["whole", "in pieces"])
def test_the_quick_way_finds_what_whole_texts_hold(planned: MakePlan, fragment: Fragments | None) -> None:
    """Every text of three words, against the ids of the text as a whole."""
    words = ["mycat", "mycat1", "MYCAT,", "(mycat2:1.2)", "mycat mycat1 mycat2", "mycat1,mycat", "mydog", "x"]
    texts = [" ".join(some) for some in product(words, repeat=3)]
    plan = planned({"a": "a dog"})
    records = tuple(replace(plan.records[0], key=f"{i}", caption=text, is_reg=False) for i, text in enumerate(texts))
    plan = replace(plan, datasets=(replace(plan.datasets[0], records=records),))
    for limit in (4, 8, 75):
        wanted: dict[frozenset[NewToken], int] = {}
        lengths = []
        for text in texts:
            pieces = [piece for piece, _ in fragment(text)] if fragment else [text]
            ids = [one for some in BOTH.encode(pieces) for one in some]
            held = frozenset(one for one in BOTH.tokens if set(BOTH.ids(one)) <= set(ids[:limit]))
            wanted[held] = wanted.get(held, 0) + 1
            lengths.append(len(ids))
        use = token_use(plan, BOTH, 1, limit=limit, fragments=fragment)
        assert {one.tokens: one.captions for one in use.holdings} == wanted
        counts = count_tokens(plan, seed=1, limit=limit, fragments=fragment, vocabulary=BOTH)
        assert (counts.minimum, counts.maximum) == (min(lengths), max(lengths))
        assert [cut.tokens for cut in counts.cut] == [length for length in lengths if length > limit]


def test_a_word_that_only_contains_a_token_does_not_hold_it(planned: MakePlan) -> None:
    use = token_use(planned({"a": "mycats, xmycat, my_mycat, mycat1, mycat9"}), BOTH, 1)
    assert use.count(CAT) == 0
    (problem,) = problems(use, [CAT], "run.toml:3 token_string")
    assert problem.where == "run.toml:3 token_string"


def test_a_token_that_no_caption_holds(planned: MakePlan) -> None:
    plan = planned({"a": "a dog", "b": "mydog, a dog"})
    use = token_use(plan, BOTH, 1)
    (problem,) = problems(use, [CAT, DOG])
    assert problem.wrong.startswith("none of 2 captions holds mycat, such as 'a dog' of ")
    assert all(text in problem.advice for text in ("into the captions", "10_mycat", "--use_object_template"))
    assert list(notices(use, [CAT, DOG])) == []
    assert list(problems(use, [DOG])) == []
    assert any(line.startswith("--base_embeddings mycat: no caption") for line in notices(use, [DOG]))


def test_every_caption_holds_it_and_nothing_is_said(planned: MakePlan) -> None:
    use = token_use(planned({"a": "a mycat", "b": "mycat"}), Vocabulary((CAT,)), 1)
    assert [*problems(use, [CAT]), *notices(use, [CAT])] == []


def test_class_tokens_stand_in_for_missing_captions(planned: MakePlan) -> None:
    plan = planned({"a": "a dog"}, class_tokens="mycat", caption_from="class_tokens")
    assert token_use(plan, BOTH, 1).count(CAT) == 1


def test_templates_are_filled_before_tokens_are_looked_for(planned: MakePlan) -> None:
    recipe = CaptionSpec(templates=("a photo of {}", "{} at night"), subject="mycat")
    use = token_use(planned({"a": "a dog", "b": "a mydog"}, caption=recipe), BOTH, 1)
    assert (use.count(CAT), use.count(DOG), use.sometimes) == (2, 0, frozenset())
    kept = CaptionSpec(templates=("a photo of {}", "{} at night"), subject="mycat", keep_original=True)
    assert token_use(planned({"a": "a dog", "b": "a mydog"}, caption=kept), BOTH, 1).count(DOG) == 1


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("{a cat|a dog|a bird|a fish|mycat}", CaptionSpec(wildcards=True)),
        ("a cat\na dog\na bird\na mycat", CaptionSpec(wildcards=True)),
        ("a cat, mycat", CaptionSpec(tag_dropout_rate=0.9)),
        ("cat", CaptionSpec(templates=("a {}", "the {}", "one {}", "any {}", "a mycat and {}"), subject="cat")),
    ],
    ids=["wildcard", "line", "tag", "template"],
)
def test_a_token_that_only_other_showings_hold_is_no_problem(planned: MakePlan, text: str, recipe: CaptionSpec) -> None:
    plan = planned({"a": text}, caption=recipe)
    uses = [token_use(plan, BOTH, seed) for seed in range(40)]
    counts = [use.count(CAT) for use in uses]
    assert set(counts) == {0, 1}
    assert [CAT in use.sometimes for use in uses] == [count == 0 for count in counts]
    assert not any(list(problems(use, [CAT])) for use in uses)
    assert all(list(problems(use, [DOG])) for use in uses)


def test_a_token_behind_the_limit_is_not_seen(planned: MakePlan) -> None:
    words = " ".join(["cat"] * 73)
    plan = planned({"a": f"{words} mycat"})
    use = token_use(plan, BOTH, 1, limit=75)
    assert use.count(CAT) == 0
    (problem,) = problems(use, [CAT])
    assert "only behind their first 75 tokens" in problem.wrong
    assert "--max_token_length" in problem.advice
    assert token_use(plan, BOTH, 1, limit=76).count(CAT) == 1
    assert token_use(plan, Vocabulary((NewToken("mycat", 2),)), 1, limit=75).beyond == frozenset()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"is_reg": True}, "all pictures are regularization pictures"),
        (
            {"custom_attributes": {"diff_output_preservation": True}},
            "all pictures have diff_output_preservation, which leaves the network out or are regularization pictures",
        ),
        (
            {"caption": CaptionSpec(dropout_rate=1.0)},
            "all pictures are always shown without caption (caption_dropout_rate 1) or are regularization pictures",
        ),
        (
            {"caption": CaptionSpec(dropout_every_n_epochs=1)},
            "without caption (caption_dropout_every_n_epochs 1) or are regularization pictures",
        ),
    ],
)
def test_pictures_that_do_without_are_not_counted(planned: MakePlan, how: dict[str, Any], reason: str) -> None:
    use = token_use(planned({"a": "a mycat", "b": "a dog"}, **how), BOTH, 1)
    assert use.captions == 0
    (problem,) = problems(use, [CAT, DOG])
    assert problem.wrong.startswith("no caption is left to learn mycat or mydog from: ")
    assert problem.wrong.endswith(reason)
    assert [*problems(use, [])] == []


@pytest.mark.parametrize("recipe", [CaptionSpec(dropout_rate=0.9), CaptionSpec(dropout_every_n_epochs=2)], ids=str)
def test_captions_that_are_shown_at_times_count(planned: MakePlan, recipe: CaptionSpec) -> None:
    assert token_use(planned({"a": "a mycat"}, caption=recipe), BOTH, 1).count(CAT) == 1


def test_a_folder_is_proposed_only_where_it_can_be_called_so(planned: MakePlan) -> None:
    plan = planned({"a": "a dog"})
    for name, proposed in (("mycat", True), ("<cat>", False), ("a/b", False)):
        token = NewToken(name)
        (problem,) = problems(token_use(plan, Vocabulary((token,)), 1), [token])
        assert (f"name the folder 10_{name}" in problem.advice) == proposed
        assert "into the captions" in problem.advice and "--use_object_template" in problem.advice


def test_a_dataset_class_has_no_captions_to_look_at() -> None:
    spec = DatasetSpec(1, (64, 64), ())
    use = token_use(CustomPlan((Dataset(spec, (), (), 0),), 8, 1, items=[1], name="x.Y"), BOTH, 1)
    assert use.captions == 0
    assert list(notices(use, [])) != []


def rows(said: str, title: str) -> list[list[str]]:
    """The cells of a table by its title."""
    table = said[said.index(title) :].split("└")[0]
    lines = [line for line in table.splitlines() if line[0] in "│┃"]
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]


def test_the_tables_of_a_dry_run(
    planned: MakePlan,
    capsys: pytest.CaptureFixture[str],
    theirs: Callable[[str], int],
) -> None:
    captions = {"a": "a red mycat on a sofa", "f": "nothing at all"}
    plan = planned(captions)
    spec = plan.datasets[0].spec
    scanned = sources.survey([spec])
    report.show_data(scanned, plan, seed=1, token_limit=75, vocabulary=BOTH)
    said = capsys.readouterr().out
    assert rows(said, "New tokens in captions") == [
        ["token", "vectors", "captions with it", "of"],
        ["mycat", "3", "1", "2"],
        ["mydog", "1", "0", "2"],
        ["(none of them)", "", "1", "2"],
    ]
    most = max(map(theirs, (*captions.values(), "a dog")))
    assert rows(said, "Tokens per caption")[1][2] == str(most) == "8"
    report.show_data(scanned, plan, seed=1, token_limit=75, vocabulary=PLAIN)
    assert "New tokens" not in capsys.readouterr().out
