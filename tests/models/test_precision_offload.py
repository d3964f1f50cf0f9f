"""What is moved to main memory for a while, seen on stand-ins for a GPU's tensors; values on a GPU: end_to_end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from library.models import offload
from library.models.inspect import inspect
from library.models.load import load
from library.models.offload import KeptInRam, optimizer_tensors, set_aside

GPU = torch.device("cuda")
RAM = torch.device("cpu")


class Placed:
    """A tensor as far as its place goes. `data` is another one that shares nothing."""

    def __init__(self, device: torch.device = GPU) -> None:
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def data(self) -> "Placed":
        return Placed(self._device)

    @data.setter
    def data(self, other: "Placed") -> None:
        self._device = other._device

    def to(self, device: torch.device, non_blocking: bool = False) -> "Placed":
        return Placed(device)

    def pin_memory(self) -> "Placed":
        return self


class Module:
    """A module of such tensors."""

    def __init__(self, *tensors: Placed) -> None:
        self.tensors = tensors

    def parameters(self) -> Iterator[Placed]:
        return iter(self.tensors[:1])

    def buffers(self) -> Iterator[Placed]:
        return iter(self.tensors[1:])


@pytest.fixture(autouse=True)
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    given: list[torch.device] = []
    monkeypatch.setattr(offload, "give_back", given.append)
    return given


def test_modules_and_tensors_leave_the_device_and_come_back(emptied: list[torch.device]) -> None:
    tensors = [Placed(), Placed(), Placed(RAM)]
    module: Any = Module(*tensors)
    with set_aside([module, None, module], GPU):
        assert [one.device for one in tensors] == [RAM, RAM, RAM] and emptied == [GPU]
    assert [one.device for one in tensors] == [GPU, GPU, RAM]
    with pytest.raises(ValueError, match="drawing failed"), set_aside([module], GPU):
        raise ValueError("drawing failed")
    assert [one.device for one in tensors] == [GPU, GPU, RAM]


def test_frozen_modules_have_a_copy_on_the_device_only_while_it_is_used() -> None:
    tensors = [Placed(), Placed()]
    kept = KeptInRam([cast(Any, Module(*tensors))], GPU)
    assert [one.device for one in tensors] == [RAM, RAM] and not kept.here
    for _ in range(2):
        kept.bring()
        assert [one.device for one in tensors] == [GPU, GPU] and kept.here
    for _ in range(2):
        kept.drop()
        assert [one.device for one in tensors] == [RAM, RAM] and not kept.here


def test_on_a_cpu_nothing_moves() -> None:
    linear = torch.nn.Linear(2, 2)
    places = [one.data_ptr() for one in linear.parameters()]
    kept = KeptInRam([linear], RAM)
    kept.bring()
    kept.drop()
    with set_aside([linear], RAM):
        assert [one.data_ptr() for one in linear.parameters()] == places


def test_an_optimizer_s_tensors_are_all_but_the_paged_ones() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[parameters[1]]["exp_avg"].is_paged = True
    found = [id(one) for one in optimizer_tensors(optimizer)]
    first, second = (optimizer.state[parameter] for parameter in parameters)
    assert found == [id(one) for one in (*first.values(), second["step"], second["exp_avg_sq"])]


def test_a_model_brings_its_text_encoders_for_prompts_and_drops_them_for_all_else(tiny_sdxl: Path) -> None:
    told: list[str] = []
    model = load(inspect(str(tiny_sdxl)), text_encoders_in_ram=True)
    assert model.text_encoders == ()
    expected = load(inspect(str(tiny_sdxl))).encode_prompts(["a cat"])
    model.reload_text_encoders()
    kept = model._kept_text
    assert kept is not None and not kept.here

    class Watched(KeptInRam):
        def bring(self) -> None:
            told.append("bring")

        def drop(self) -> None:
            told.append("drop")

    model._kept_text = Watched(model.text_encoders, RAM)
    told.clear()
    text = model.encode_prompts(["a cat"])
    assert torch.equal(text.states, expected.states) and set(told) == {"bring"}
    told.clear()
    model.predict(torch.randn(1, 4, 8, 8), torch.tensor([3]), text)
    model.decode(torch.randn(1, 4, 8, 8))
    model.encode_images(torch.randn(1, 3, 64, 64))
    assert told == ["drop"] * 3
    model.release_text_encoders()
    assert model._kept_text is None
    assert torch.equal(model.encode_prompts(["a cat"]).states, expected.states)
