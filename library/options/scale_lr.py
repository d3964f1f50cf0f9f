"""`--scale_lr`: learning rates that are meant for one picture of a step, as diffusers' and InvokeAI's scripts do it.
Schedules aren't touched: they are shares of the rate, but for absolute ends in --lr_scheduler_args.
"""

import os
from collections.abc import Sequence

from library.errors import Problem
from library.options.optimizer_checks import chosen_optimizer
from library.options.optimizer_names import optimizer_info
from library.options.registry import Options
from library.options.specs import DatasetSpec

_RATES = ("learning_rate", "unet_lr", "text_encoder_lr", "embedding_lr")


def problems(options: Options, specs: Sequence[DatasetSpec]) -> list[Problem]:
    """Why the rates can't be scaled: pictures per step that differ, or an optimizer that finds its steps itself."""
    if not options.optimizer.scale_lr:
        return []
    where, found = options.where("scale_lr"), []
    if options.optimizer.no_scale_lr:
        found.append(Problem(where, "contradicts --no_scale_lr", "leave out one of the two"))
    sizes = _batches(options, specs)
    if len(sizes) > 1:
        listed = " and ".join(map(str, sizes))
        advice = "give them one batch size, or multiply the rates yourself"
        found.append(Problem(where, f"the datasets have batches of {listed} pictures", advice))
    info = optimizer_info(chosen_optimizer(options))
    if info is not None and info.has_d:
        wrong = f"{info.name} finds the size of its steps itself, and takes learning rates about 1"
        found.append(Problem(where, wrong, "add --no_scale_lr, or leave it out"))
    return found


def scaled(options: Options, specs: Sequence[DatasetSpec]) -> tuple[Options, tuple[str, ...]]:
    """The options with learning rates times pictures per step, over all processes, and a line that says so."""
    if not options.optimizer.scale_lr:
        return options, ()
    sizes = _batches(options, specs)
    accumulated, processes = options.training.gradient_accumulation_steps, int(os.environ.get("WORLD_SIZE", "1"))
    factor = sizes[0] * accumulated * processes
    rates = {name: options.value(name) for name in _RATES}
    larger = {name: _times(rate, factor) for name, rate in rates.items() if rate is not None}
    optimizer = options.optimizer.model_copy(update={k: v for k, v in larger.items() if k != "embedding_lr"})
    embeddings = options.embeddings
    if "embedding_lr" in larger:
        embeddings = embeddings.model_copy(update={"embedding_lr": larger["embedding_lr"]})
    listed = ", ".join(f"--{name} {_shown(rate)}" for name, rate in larger.items())
    line = (
        f"{options.where('scale_lr')}: learning rates times {sizes[0]} (batch) x {accumulated} (accumulation) x "
        f"{processes} (processes) = {factor}: {listed}"
    )
    return options.model_copy(update={"optimizer": optimizer, "embeddings": embeddings}), (line,)


def _batches(options: Options, specs: Sequence[DatasetSpec]) -> list[int]:
    """The batch sizes of datasets that are trained on; the flag's where a class of the user's own gives batches."""
    trained = (one for one in specs if any(subset.validation_split < 1 for subset in one.subsets))
    return sorted({one.batch_size for one in trained} or {options.dataset.train_batch_size})


def _times(rate: float | tuple[float, ...], factor: int) -> float | tuple[float, ...]:
    return tuple(one * factor for one in rate) if isinstance(rate, tuple) else rate * factor


def _shown(rate: float | tuple[float, ...]) -> str:
    return " ".join(f"{one:g}" for one in (rate if isinstance(rate, tuple) else (rate,)))
