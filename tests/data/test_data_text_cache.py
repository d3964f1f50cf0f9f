"""Text conditioning: encoded once and alone, kept within its bytes, on disk never stale."""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import library.conditioning
from library.conditioning import Conditioning
from library.data.caches.text import TextStore
from library.data.caches.text_files import TextFiles
from library.errors import UserError

WIDTHS, TOKENS, POOLED = (3, 5), 77, 4
ONE = (TOKENS * sum(WIDTHS) + POOLED) * 4
MakePicture = Callable[..., Path]


class Encoder:
    """A stand-in for two text encoders whose numbers follow from the caption; it counts what it is asked."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, pooled: bool = True, scale: float = 1.0) -> None:
        self.dtype, self.pooled, self.scale = dtype, pooled, scale
        self.asked: list[str] = []

    def expected(self, caption: str) -> Conditioning:
        draws = torch.Generator().manual_seed(sum(map(ord, caption)) + 1000 * len(caption))
        states = torch.randn(1, TOKENS, sum(WIDTHS), generator=draws) * self.scale
        pooled = torch.randn(1, POOLED, generator=draws) if self.pooled else None
        return Conditioning(states, pooled).to("cpu", self.dtype)

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        assert not torch.is_grad_enabled()
        (caption,) = captions
        self.asked.append(caption)
        return self.expected(caption)


def same(one: Conditioning, other: Conditioning) -> bool:
    pooled = one.pooled is other.pooled or (
        one.pooled is not None and other.pooled is not None and torch.equal(one.pooled, other.pooled)
    )
    return one.states.dtype == other.states.dtype and torch.equal(one.states, other.states) and pooled


def test_conditioning_comes_in_order_and_each_caption_is_encoded_once() -> None:
    encoder = Encoder()
    store = TextStore(encoder, memo_bytes=10 * ONE)
    found = store(["b", "a", "b", ""])
    assert found.states.shape == (4, TOKENS, sum(WIDTHS))
    assert all(same(found[i : i + 1], encoder.expected(caption)) for i, caption in enumerate(["b", "a", "b", ""]))
    store(["", "a"])
    assert encoder.asked == ["b", "a", ""]
    assert store.encodings == 3


def test_kept_outputs_reach_a_gpu_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.device] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(device)
        return tensor

    monkeypatch.setattr(library.conditioning, "to_device", to_device)
    encoder = Encoder()
    store = TextStore(encoder, memo_bytes=10 * ONE)
    store.fill(["a"])
    copied.clear()
    assert same(store(["a"]), encoder.expected("a"))
    assert set(copied) == {torch.device("cpu")}


@examples(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=3), max_size=12), st.integers(0, 5 * ONE))
def test_the_memo_keeps_the_last_used_within_its_bytes(batches: list[list[str]], memo_bytes: int) -> None:
    encoder = Encoder()
    store = TextStore(encoder, memo_bytes=memo_bytes)
    room = max(1, memo_bytes // ONE)
    held: OrderedDict[str, None] = OrderedDict()
    for batch in batches:
        before, expected = len(encoder.asked), []
        for caption in dict.fromkeys(batch):
            if caption not in held:
                expected.append(caption)
            held[caption] = None
            held.move_to_end(caption)
            if len(held) > room:
                held.popitem(last=False)
        store(batch)
        assert encoder.asked[before:] == expected
        assert store.used_bytes == len(held) * ONE
        assert store.used_bytes <= max(memo_bytes, ONE)


def test_what_was_filled_ahead_stays() -> None:
    encoder = Encoder()
    store = TextStore(encoder, memo_bytes=0)
    store.fill(["a", "b", "a"])
    store.fill(["b", ""])
    assert encoder.asked == ["a", "b", ""]
    for _ in range(2):
        store(["x", "a", "y", "b", ""])
    assert encoder.asked == ["a", "b", "", "x", "y", "x", "y"]


def test_without_pooled_outputs() -> None:
    store = TextStore(Encoder(pooled=False), memo_bytes=ONE)
    assert store(["a", "b"]).pooled is None


@pytest.mark.parametrize("ahead", [False, True])
def test_numbers_that_are_not_finite_name_the_caption(ahead: bool) -> None:
    store = TextStore(Encoder(scale=float("inf")), memo_bytes=ONE)
    with pytest.raises(UserError, match=r"caption 'a cat': the text encoder gave NaN") as error:
        store.fill(["a cat"]) if ahead else store(["a cat"])
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture
def pictures(tmp_path: Path, make_picture: Callable[..., Path]) -> dict[Path, str]:
    """Four pictures with three captions; two of them share a stem."""
    names = {"a.png": "a cat", "a.jpg": "a dog", "b.png": "a cat", "c.png": "ein Bär, {x}"}
    return {make_picture(tmp_path / "cats" / name): caption for name, caption in names.items()}


def filled(
    pictures: dict[Path, str],
    encoder: Encoder | None = None,
    *,
    tokens: int = TOKENS,
    encoder_id: str = "id",
    **how: Any,
) -> tuple[TextStore, Encoder]:
    encoder = encoder or Encoder()
    files = TextFiles(pictures.items(), encoder_id=encoder_id, tokens=tokens, widths=WIDTHS)
    store = TextStore(encoder, memo_bytes=10 * ONE, files=files)
    store.fill([*pictures.values(), ""], **how)
    return store, encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooled", [True, False])
def test_files_give_back_the_very_bits(pictures: dict[Path, str], dtype: torch.dtype, pooled: bool) -> None:
    encoder = Encoder(dtype, pooled=pooled)
    filled(pictures, encoder)
    assert encoder.asked == ["a cat", "a dog", "ein Bär, {x}", ""]
    encoder.asked.clear()
    store, _ = filled(pictures, encoder)
    assert encoder.asked == [""]
    for caption in pictures.values():
        assert same(store([caption]), encoder.expected(caption))
    assert store.encodings == 1


def test_files_have_the_layout_of_sd_scripts(pictures: dict[Path, str]) -> None:
    filled(pictures)
    folder = next(iter(pictures)).parent
    names = sorted(path.name for path in folder.glob("*.npz"))
    assert names == ["a.jpg_te_outputs.npz", "a_te_outputs.npz", "b_te_outputs.npz", "c_te_outputs.npz"]
    with np.load(folder / "b_te_outputs.npz", allow_pickle=False) as file:
        assert set(file.files) == {"hidden_state1", "hidden_state2", "pool2", "lorasmith"}
        assert [file[name].shape for name in ("hidden_state1", "hidden_state2", "pool2")] == [(77, 3), (77, 5), (4,)]
        assert file["hidden_state1"].dtype == np.float32
        said = json.loads(str(file["lorasmith"]))
    assert {"format", "caption", "encoder", "tokens", "dtype", "arrays"} <= set(said)
    assert not list(folder.glob(".*"))


def test_half_precision_is_kept_as_it_is(pictures: dict[Path, str]) -> None:
    filled(pictures, Encoder(torch.float16))
    with np.load(next(iter(pictures)).parent / "b_te_outputs.npz") as file:
        assert {file[name].dtype for name in ("hidden_state1", "pool2")} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    "change", ["caption", "encoder", "length", "format", "values", "cut", "text", "entry", "foreign"]
)
def test_what_does_not_fit_is_made_anew(
    pictures: dict[Path, str], change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    filled(pictures)
    path = next(iter(pictures)).parent / "c_te_outputs.npz"
    how: dict[str, Any] = {}
    expected = ["ein Bär, {x}"]
    with np.load(path) as file:
        entries = {name: file[name] for name in file.files}
    if change == "caption":
        picture = next(picture for picture in pictures if picture.name == "c.png")
        pictures[picture] = "ein Bär,  {x}"
        expected = ["ein Bär,  {x}"]
    elif change in ("encoder", "length"):
        how = {"encoder_id": "other"} if change == "encoder" else {"tokens": 152}
        expected = ["a cat", "a dog", "ein Bär, {x}"]
    elif change == "format":
        entries["lorasmith"] = np.array(json.dumps({**json.loads(str(entries["lorasmith"])), "format": 0}))
        np.savez(path, **entries)
    elif change == "values":
        np.savez(path, **{**entries, "pool2": entries["pool2"] + 1})
    elif change == "entry":
        np.savez(path, **{**entries, "lorasmith": np.array("[1]")})
    elif change == "foreign":
        np.savez(path, **{name: entries[name] for name in ("hidden_state1", "hidden_state2", "pool2")})
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if change == "cut" else b"hello")
    capfd.readouterr()
    store, encoder = filled(pictures, **how)
    assert encoder.asked == [*expected, ""]
    assert "made anew" in capfd.readouterr().err.replace("\n", " ")
    if change != "length":
        assert all(same(store([caption]), encoder.expected(caption)) for caption in pictures.values())
        assert filled(pictures, **how)[1].asked == [""]


def test_processes_share_the_files(pictures: dict[Path, str]) -> None:
    other: list[tuple[TextStore, Encoder]] = []

    def wait() -> None:
        other.append(filled(pictures, rank=1, world_size=2))

    store, encoder = filled(pictures, rank=0, world_size=2, wait=wait)
    ((second, second_encoder),) = other
    assert encoder.asked == ["a cat", "ein Bär, {x}", ""]
    assert second_encoder.asked == ["a dog", ""]
    for caption in pictures.values():
        assert same(store([caption]), encoder.expected(caption))
        assert same(second([caption]), encoder.expected(caption))
    assert (store.encodings, second.encodings) == (3, 2)


def test_what_has_no_file_every_process_makes() -> None:
    for rank in (0, 1):
        encoder = Encoder()
        TextStore(encoder, memo_bytes=0).fill(["a", "b"], rank=rank, world_size=2)
        assert encoder.asked == ["a", "b"]


def test_a_full_disk_is_one_line(pictures: dict[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_how: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"No space left on device\); .*--cache_text_encoder_outputs, which") as error:
        filled(pictures)
    assert len(str(error.value).splitlines()) == 1
    assert not list(next(iter(pictures)).parent.glob("*npz*"))


def test_a_file_that_goes_away_while_training(pictures: dict[Path, str]) -> None:
    store, _ = filled(pictures)
    for path in next(iter(pictures)).parent.glob("*.npz"):
        path.unlink()
    with pytest.raises(UserError, match=r"_te_outputs\.npz: cached text can't be read"):
        store(["a cat"])


def test_a_picture_with_two_captions_has_two_files(tmp_path: Path, make_picture: MakePicture) -> None:
    picture = make_picture(tmp_path / "a.png")
    pairs = [(picture, "one"), (picture, "two"), (picture, "three"), (picture, "one")]
    files = TextFiles(pairs, encoder_id="id", tokens=TOKENS, widths=WIDTHS)
    paths = [path.name for caption in ("one", "two", "three") for path in files.files[caption]]
    assert paths == ["a_te_outputs.npz", "a.png_te_outputs.npz", "a.png_2_te_outputs.npz"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_text_encoder(pictures: dict[Path, str], dtype: torch.dtype) -> None:
    """A caption's conditioning is bit for bit the same in any company, from memory, from files and after a restart."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.tokenizer import END_ID, START_ID, clip_tokenizer

    torch.manual_seed(0)
    shape = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPTextModel(shape).to(dtype).eval()

    def encode(captions: Sequence[str]) -> Conditioning:
        ids = [clip_tokenizer().encode(caption, add_special_tokens=False).ids[:75] for caption in captions]
        rows = [[START_ID, *some, *[END_ID] * (76 - len(some))] for some in ids]
        output = model(torch.tensor(rows))
        return Conditioning(output[0], output.pooler_output)

    captions = [*pictures.values(), ""]
    with torch.no_grad():
        expected = {caption: encode([caption]) for caption in captions}
    stores = [TextStore(encode, memo_bytes=2**20)]
    for _ in range(2):
        files = TextFiles(pictures.items(), encoder_id=str(dtype), tokens=77, widths=[32])
        stores.append(TextStore(encode, memo_bytes=0, files=files))
        stores[-1].fill(captions)
    assert stores[2].encodings == 1
    for store in stores:
        found = store(captions)
        assert not found.states.requires_grad
        assert all(same(found[i : i + 1], expected[caption]) for i, caption in enumerate(captions))
