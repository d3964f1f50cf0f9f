"""New tokens among CLIP's: ids against transformers' tokenizer with the same tokens added."""

import subprocess
import sys
from pathlib import Path

import pytest

from library.tokenizer import END_ID, VOCABULARY_SIZE, clip_tokenizer, clip_vocabulary, write_folder
from library.tokenizer.vocabulary import PLAIN, NewToken, Vocabulary
from tests.programs import environment

FIRST = VOCABULARY_SIZE
TOKENS = Vocabulary((NewToken("MyCat", 3), NewToken("<blue-toy>"), NewToken("straße", 2), NewToken("a_b")))
CAT, CAT1, CAT2, TOY, ROAD, ROAD1, UNDER = range(FIRST, FIRST + 7)
PADDING = {END_ID: "<|endoftext|>", 0: "!"}


def plain(text: str, pad_id: int = END_ID) -> list[int]:
    return list(clip_tokenizer(pad_id).encode(text, add_special_tokens=False).ids)


def test_ids_stand_behind_clip_s_own_in_the_order_of_tokens() -> None:
    assert [list(TOKENS.ids(token)) for token in TOKENS.tokens] == [[CAT, CAT1, CAT2], [TOY], [ROAD, ROAD1], [UNDER]]
    assert TOKENS.vectors == 7 and PLAIN.vectors == 0
    assert TOKENS.tokens[0].parts == ("MyCat", "MyCat1", "MyCat2")
    with pytest.raises(ValueError, match="not in"):
        TOKENS.ids(NewToken("MyCat", 2))


@pytest.mark.parametrize("pad_id", PADDING)
def test_ids_are_those_of_transformers_with_the_same_tokens(tmp_path: Path, pad_id: int) -> None:
    from transformers import CLIPTokenizer

    write_folder(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path, pad_token=PADDING[pad_id])
    parts = [part for token in TOKENS.tokens for part in token.parts]
    assert theirs.add_tokens(parts) == len(parts)
    assert theirs.convert_tokens_to_ids(parts) == list(range(FIRST, FIRST + 7))
    for caption, spelled in {
        "a photo of mycat": "a photo of mycat mycat1 mycat2",
        "MYCAT, a straße!": "mycat mycat1 mycat2, a straße straße1!",
        "a <Blue-Toy>. and\n mycat's 2 a_b": "a <blue-toy>. and mycat mycat1 mycat2's 2 a_b",
        "mycat mycat": "mycat mycat1 mycat2 mycat mycat1 mycat2",
        "no new word of mine, 猫 and 🙂 don't!! ! count": "no new word of mine, 猫 and 🙂 don't!! ! count",
        "": "",
    }.items():
        wanted = theirs(spelled, add_special_tokens=False).input_ids
        assert TOKENS.encode([caption], pad_id) == [wanted], caption
        assert TOKENS.encode([spelled], pad_id) == [wanted], "parts that are spelled out aren't doubled"


@pytest.mark.parametrize("pad_id", PADDING)
def test_only_whole_words_are_tokens(pad_id: int) -> None:
    for text in ("mycats", "tomycat", "my cat", "mycat_", "mycat12", "mycatmycat", "a<blue-toy>", "straßen"):
        assert TOKENS.encode([text], pad_id) == [plain(text, pad_id)], text
    for text, around in {"(mycat)": ("(", ")"), "mycat-like": ("", "-like"), "a,mycat.": ("a,", ".")}.items():
        wanted = [*plain(around[0], pad_id), CAT, CAT1, CAT2, *plain(around[1], pad_id)]
        assert TOKENS.encode([text], pad_id) == [wanted], text


def test_a_token_stands_for_all_of_its_vectors_unless_the_next_follows() -> None:
    assert TOKENS.encode(["mycat mycat1 mycat", "mycat1", "mycat mycat2", "straße mycat1"]) == [
        [CAT, CAT1, CAT, CAT1, CAT2],
        [CAT1],
        [CAT, CAT1, CAT2, CAT2],
        [ROAD, ROAD1, CAT1],
    ]
    assert TOKENS.expanded([320, CAT, TOY, CAT]) == [
        *[(320, 0), (CAT, 1), (CAT1, 1), (CAT2, 1)],
        *[(TOY, 2), (CAT, 3), (CAT1, 3), (CAT2, 3)],
    ]


def test_without_new_tokens_it_is_clip_s() -> None:
    texts = ["a mycat", "", "two  dogs!"]
    for pad_id in PADDING:
        assert PLAIN.encode(texts, pad_id) == [plain(text, pad_id) for text in texts]
        assert PLAIN.tokenizer(pad_id) is clip_tokenizer(pad_id), "a second one would cost 0.1 s"
        assert clip_tokenizer(pad_id).token_to_id("mycat") is None, "new tokens stay out of the shared one"
        assert TOKENS.tokenizer(pad_id) is Vocabulary(TOKENS.tokens).tokenizer(pad_id)


def test_parts_that_get_no_ids_of_their_own() -> None:
    assert PLAIN.unread() == TOKENS.unread() == TOKENS.unread(0) == ()
    known = Vocabulary((NewToken("cat"), NewToken("mycat", 2), NewToken("chri"), NewToken("<|endoftext|>")))
    assert len(plain("chri")) == 2 and "chri" in clip_vocabulary(), "a piece of words, which is no word"
    assert set(known.unread()) >= {"cat", "chri", "<|endoftext|>"}
    twice = Vocabulary((NewToken("mycat"), NewToken("MyCat")))
    assert len(twice.unread()) == 1
    loud = Vocabulary((NewToken("wow!x"), NewToken("mycat")))
    assert loud.unread() == () and loud.unread(0) == ("wow!x",), "where ! fills rows up it is always a token"


def test_it_needs_no_torch() -> None:
    code = "import sys, library.tokenizer.vocabulary; print('torch' in sys.modules, 'transformers' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout.split() == ["False", "False"]
