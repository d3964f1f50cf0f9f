"""Held-out pictures: the same losses in every pass and for any number of processes, told per subset and timestep."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from library.data.loader import Batch, Loader
from library.data.plan import Plan, build_plan
from library.data.sources.scan import scan
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec
from library.rng import rng
from library.training.coordinates import Coordinates
from library.training.denoising import Denoising
from library.training.distributed import Processes
from library.training.noise import NoiseSettings
from library.training.validation import Validation, ValidationResult, fixed_timesteps, subset_titles
from tests.pictures import make_pictures

SEED = 7


class Modes:
    """Notes when the network is told to train or not."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    def train(self, mode: bool) -> None:
        self.told.append(mode)


@dataclass(frozen=True)
class Shared(Processes):
    """Processes that are threads of this one."""

    shares: list[Any] = field(default_factory=list)
    barrier: Barrier = field(default_factory=lambda: Barrier(1))

    def exchange(self, share: Any) -> list[Any]:
        self.shares[self.rank] = share
        self.barrier.wait(20)
        return list(self.shares)


class Known(Denoising):
    """A model whose loss can be said beforehand: it depends on the picture, its noise and the timestep."""

    def __init__(self, processes: Processes, trainable: Any) -> None:
        self.processes, self.noise, self.trainable = processes, NoiseSettings(), trainable
        self.seen: list[tuple[str, int]] = []

    def losses(self, batch: Batch, at: Coordinates, timesteps: torch.Tensor | None = None) -> torch.Tensor:
        assert timesteps is not None and not torch.is_grad_enabled()
        self.seen += zip(batch.names, timesteps.tolist(), strict=True)
        draws = [rng(at.seed, at.noise, at.epoch, at.index, position).standard_normal() for position in at.positions]
        shown = [len(caption) for caption in batch.captions]
        return torch.tensor(draws).float() ** 2 + torch.tensor(shown).float() + timesteps / 1000


def plan_of(parent: Path, processes: int, batch_size: int) -> Plan:
    subsets = tuple(
        SubsetSpec(folder, caption_extension=".txt", caption=CaptionSpec(), validation_split=0.5, where=folder.name)
        for folder in sorted(parent.iterdir())
    )
    spec = DatasetSpec(batch_size, (64, 64), subsets, True, 32, 128, 32)
    return build_plan([spec], scan([spec]).held_out, 8, processes)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    make_pictures(tmp_path, 9, 1, "cat")
    return make_pictures(tmp_path, 5, 2, "elephants")


def look(parent: Path, processes: int = 1, batch_size: int = 2, max_batches: int | None = None) -> ValidationResult:
    """The result of a pass, which all processes must share."""
    plan = plan_of(parent, processes, batch_size)
    shares: list[Any] = [None] * processes
    barrier = Barrier(processes)
    results: list[ValidationResult | None] = [None] * processes

    def run(rank: int) -> None:
        here = Shared(rank, processes, torch.device("cpu"), shares=shares, barrier=barrier)
        loader = Loader(plan, seed=SEED, rank=rank, world_size=processes)
        results[rank] = Validation(Known(here, Modes()), loader, plan, seed=SEED, max_batches=max_batches).run()

    threads = [Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    first = results[0]
    assert first is not None and all(result == first for result in results)
    return first


def test_timesteps_are_even_inside_the_range() -> None:
    assert fixed_timesteps(NoiseSettings()) == [200, 400, 600, 800]
    assert fixed_timesteps(replace(NoiseSettings(), min_timestep=100, max_timestep=600)) == [200, 300, 400, 500]


def test_every_picture_at_every_timestep_and_the_means_of_each(parent: Path) -> None:
    plan = plan_of(parent, 1, 2)
    modes = Modes()
    denoising = Known(Processes(0, 1, torch.device("cpu")), modes)
    result = Validation(denoising, Loader(plan, seed=SEED), plan, seed=SEED).run()
    assert sorted(denoising.seen) == sorted(
        (str(record.path), timestep) for record in plan.records for timestep in (200, 400, 600, 800)
    )
    assert modes.told == [False, True]
    expected: dict[tuple[str, int], float] = {}
    for number, record in enumerate(plan.records):
        noise = rng(SEED, "validation", 1, 0, number).standard_normal() ** 2
        for timestep in (200, 400, 600, 800):
            expected[str(record.path), timestep] = noise + len(record.caption) + timestep / 1000
    subsets = defaultdict(list)
    bands = defaultdict(list)
    for (path, timestep), loss in expected.items():
        subsets[Path(path).parent.name].append(loss)
        bands[f"t{timestep}"].append(loss)
    assert result.loss == pytest.approx(fmean(expected.values()), rel=1e-6)
    assert result.by_subset == pytest.approx({name: fmean(losses) for name, losses in subsets.items()}, rel=1e-6)
    assert set(result.by_subset) == {"1_cat", "2_elephants"}
    assert result.by_band == pytest.approx({name: fmean(losses) for name, losses in bands.items()}, rel=1e-6)
    assert list(result.by_band) == ["t200", "t400", "t600", "t800"]


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 1), (1, 5), (2, 2), (3, 1), (3, 4)])
def test_the_same_bits_however_the_pictures_are_shared_out(parent: Path, processes: int, batch_size: int) -> None:
    assert look(parent, processes, batch_size) == look(parent, 1, 2)


def test_a_pass_can_be_limited_and_then_is_the_start_of_a_whole_one(parent: Path) -> None:
    plan = plan_of(parent, 1, 2)
    denoising = Known(Processes(0, 1, torch.device("cpu")), Modes())
    limited = Validation(denoising, Loader(plan, seed=SEED), plan, seed=SEED, max_batches=2)
    result = limited.run()
    shown = [plan.records[sample.record] for batch in plan.epoch(SEED, 1)[:2] for sample in batch.samples]
    assert {name for name, _ in denoising.seen} == {str(record.path) for record in shown}
    assert limited.run() == result
    assert look(parent, 2, 1, max_batches=2) == result


def test_a_loss_that_is_no_number_is_told(parent: Path) -> None:
    class Broken(Known):
        def losses(self, batch: Batch, at: Coordinates, timesteps: torch.Tensor | None = None) -> torch.Tensor:
            return super().losses(batch, at, timesteps).fill_(float("nan"))

    plan = plan_of(parent, 1, 2)
    denoising = Broken(Processes(0, 1, torch.device("cpu")), Modes())
    result = Validation(denoising, Loader(plan, seed=SEED), plan, seed=SEED).run()
    assert result.loss != result.loss


def test_titles_tell_subsets_apart(tmp_path: Path) -> None:
    def titles(*datasets: tuple[int, list[str]]) -> list[str]:
        specs = [
            DatasetSpec(1, (size, size), tuple(SubsetSpec(tmp_path / name) for name in names))
            for size, names in datasets
        ]
        return list(subset_titles(build_plan(specs, [], 8, 1)).values())

    assert titles((512, ["10_cat", "dogs"])) == ["10_cat", "dogs"]
    assert titles((512, ["a/pictures", "b/pictures", "c"])) == ["a_pictures", "b_pictures", "c"]
    assert titles((512, ["cats"]), (768, ["cats", "dogs"])) == ["cats_512x512", "cats_768x768", "dogs"]
    assert titles((512, ["a/x"]), (768, ["b/x"])) == ["a_x_512x512", "b_x_768x768"]
    assert titles((512, ["x"]), (512, ["x"])) == ["x", "x"]
