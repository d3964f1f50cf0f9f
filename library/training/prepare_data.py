"""The base model's file and the data of a run, looked at before anything is loaded. Imports no torch.

What trains on them, and when, is library.training.prepare's; tools that only make caches stop here.
"""

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from library.data.caches.text_files import ENDING
from library.data.custom import load_custom
from library.data.plan import Plan, build_plan
from library.data.records import ImageRecord
from library.data.report import cropped_too_much, pictures_table
from library.data.sources.scan import Scan, survey
from library.errors import Problem, UserError
from library.models.info import ModelInfo, Said
from library.models.inspect import inspect
from library.options import Options, load_datasets
from library.options.specs import DatasetSpec

Result = TypeVar("Result")


@dataclass(frozen=True)
class Data:
    """The pictures of a run: `plan` orders those that are trained, `held_out` those of the validation, if any."""

    specs: tuple[DatasetSpec, ...]
    scan: Scan
    plan: Plan
    held_out: Plan | None

    @property
    def everything(self) -> Plan:
        """All pictures, the trained ones first: what caches are made of."""
        return self.plan if self.held_out is None else self.plan.joined(self.held_out)


@dataclass(frozen=True)
class PreparedData:
    """What a tool that makes caches needs to know."""

    options: Options
    model: ModelInfo
    data: Data
    notices: tuple[str, ...]


class Collector:
    """Runs one preparation after another and keeps what each complains about."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """The result of `action`; None if it complained."""
        try:
            return action()
        except UserError as error:
            self.problems += error.problems
            return None


def prepare_caching(options: Options) -> PreparedData:
    """Look at the model and the data that the options name, for a tool.

    Raises:
        UserError: all problems that were found.
    """
    collect, notices = Collector(), list(options.notices)
    model = collect.attempt(lambda: inspect_model(options))
    data = find_data(options, collect, model.vae_factor if model else 8, notices)
    if collect.problems or model is None or data is None:
        raise UserError(collect.problems, notices)
    return PreparedData(options, model, data, tuple(notices))


def inspect_model(options: Options) -> ModelInfo:
    """The base model that the options name, with what its flags say of it."""
    chosen = options.model

    def said(name: str) -> bool | None:
        return bool(options.value(name)) if name in options.explicit else None

    return inspect(
        str(chosen.pretrained_model_name_or_path),
        said=Said(
            said("v2"),
            said("v_parameterization"),
            said("zero_terminal_snr"),
            {name: options.where(name) for name in ("v2", "v_parameterization", "zero_terminal_snr")},
        ),
        vae=chosen.vae,
        text_encoder=chosen.text_encoder,
        variant=chosen.variant,
        check_hash=not chosen.ignore_model_hash,
    )


def find_data(options: Options, collect: Collector, vae_factor: int, notices: list[str]) -> Data | None:
    """Scan the sources and plan the epochs; None, with problems in `collect`, where that can't be done."""
    flags = options.dataset
    if flags.dataset_class is not None:
        return collect.attempt(lambda: _custom(options, vae_factor))
    specs = collect.attempt(lambda: load_datasets(options))
    if not specs:
        return None
    scan = survey(specs, skip_bad=flags.skip_bad_images, verify=flags.verify_images)
    notices += [line for line in dict.fromkeys(scan.notices) if line not in notices]
    collect.attempt(scan.check)
    if options.config.dry_run and collect.problems:
        pictures_table(scan, specs)
    processes = process_count()
    plan = collect.attempt(
        lambda: build_plan(specs, scan.records, vae_factor, processes, skip_small=flags.skip_small_images)
    )
    held_out = None
    if scan.held_out:
        held_out = collect.attempt(
            lambda: build_plan(specs, scan.held_out, vae_factor, processes, skip_small=flags.skip_small_images)
        )
    if plan is None or (scan.held_out and held_out is None):
        return None
    for one in (plan, held_out):
        if one is not None:
            notices += one.left_out
            if flags.max_crop_loss is not None:
                notices += cropped_too_much(one, flags.max_crop_loss)
    collect.problems += _unwritable(options, [*plan.records, *(held_out.records if held_out else ())])
    if not plan.records and not collect.problems:
        collect.problems.append(Problem("pictures", "nothing is left to train on", "see the lines above"))
        return None
    return Data(specs, scan, plan, held_out)


def _unwritable(options: Options, records: Sequence[ImageRecord]) -> Iterator[Problem]:
    """Folders that can't take the latents that some picture in them surely lacks; what is there isn't judged here."""
    if not options.caching.cache_latents_to_disk:
        return
    folders: dict[Path, list[str]] = defaultdict(list)
    for record in records:
        inner, _, name = record.key.rpartition("/")
        folders[record.folder / inner].append(name.rpartition(".")[0])
    for folder, stems in folders.items():
        if os.access(folder, os.W_OK):
            continue
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".npz" and ENDING not in path.name)
        for stem in stems:
            place = bisect_left(names, stem)
            if place == len(names) or not names[place].startswith(stem):
                wrong = f"{folder} can't be written to, and {stem} has no latents there"
                yield Problem(options.where("cache_latents_to_disk"), wrong, "make it writable, or use --cache_latents")
                break


def _custom(options: Options, vae_factor: int) -> Data:
    """The data of `--dataset_class`.

    Raises:
        UserError: the class can't be imported or made.
    """
    flags = options.dataset
    plan = load_custom(
        str(flags.dataset_class),
        options.where("dataset_class"),
        resolution=flags.resolution,
        max_token_length=options.model.max_token_length,
        batch_size=flags.train_batch_size,
        vae_factor=vae_factor,
        processes=process_count(),
    )
    scan = Scan((), (), (), (), ())
    return Data((plan.datasets[0].spec,), scan, plan, None)


def process_count() -> int:
    """How many processes the launcher has started, as it says in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))
