"""The optimizer and the schedule of a run, tried over small stand-ins before a model is loaded: what their classes
refuse, in the first step or in a late one, is told then. What is known without torch: options.optimizer_checks.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch

from library.errors import UserError
from library.models.lora_targets import Shape
from library.options.optimizer_checks import chosen_optimizer
from library.options.optimizer_settings import parse_arguments
from library.options.precision_checks import told_cpu
from library.training.expected import embedding_groups, expected_groups
from library.training.optimizers import BuiltOptimizer, build_optimizer
from library.training.prepare import Prepared
from library.training.rate_control import ClassRates, RateControl, build_rates
from library.training.schedules import ScheduleSettings, schedule_settings
from networks.planned import PlannedGroup

MOST_STEPS = 100_000
"""How far a schedule is followed; a step of a class of torch takes a few microseconds."""
_UNKNOWN: tuple[Shape, ...] = ((4, 64), (64, 4))
"""Of a network that isn't ours, whose tensors are known when it is made: matrices, which every one has."""


def rehearse(prepared: Prepared, device: torch.device | None = None) -> None:
    """Make the run's optimizer over tensors of the shapes that it will train, let it make a step, and go through the
    schedule of the run.

    Args:
        device: where it will be trained; where it isn't given, the accelerator of this machine or the CPU.

    Raises:
        UserError: an optimizer or a schedule that can't be made, that can't step such tensors, or that fails later.
    """
    flags = prepared.options.optimizer
    found = expected_groups(prepared.options, prepared.model, prepared.rates, prepared.embeddings)
    settings = schedule_settings(flags, prepared.schedule_total)
    groups = _unknown_groups(prepared) if found is None else found
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with _told("--optimizer_type"):
            built = build_optimizer(
                chosen_optimizer(prepared.options),
                [{"params": _stand_ins(group, device or _usual_device()), "lr": group.rate} for group in groups],
                parse_arguments(flags.optimizer_args or (), "--optimizer_args"),
                rate=flags.learning_rate,
                names=[group.name for group in groups],
            )
        if found is not None or not _by_group(settings):
            _follow(built, settings, prepared.clock.total_updates)


def _follow(built: BuiltOptimizer, settings: ScheduleSettings, updates: int) -> None:
    """Make the schedule and, of a class, all its steps."""
    with _told("--lr_scheduler_type"):
        rates: RateControl = build_rates(built, settings)
        if not isinstance(rates, ClassRates):
            return
        for update in range(min(updates, MOST_STEPS)):
            rates.before_update(update)
            rates.after_update()


@contextmanager
def _told(flag: str) -> Iterator[None]:
    """Whatever is raised becomes a `UserError` of a flag: the classes come from many packages."""
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        raise UserError.single(flag, f"{type(fault).__name__} {fault}", "check its settings") from fault


def _unknown_groups(prepared: Prepared) -> list[PlannedGroup]:
    """One group for each model that is trained, and that of the vectors, which is known."""
    rates = prepared.rates
    each = [*rates.text_encoders, rates.unet]
    network = [PlannedGroup(f"group{number}", rate, _UNKNOWN) for number, rate in enumerate(each) if rate]
    return [*network, *embedding_groups(prepared.model, prepared.embeddings)]


def _by_group(settings: ScheduleSettings) -> bool:
    """Whether there may be a value for each group, whose number isn't known of every network."""
    return any(isinstance(value, list | tuple) for value in settings.scheduler_args.values())


def _stand_ins(group: PlannedGroup, device: torch.device) -> list[torch.nn.Parameter]:
    """Of each number of axes the largest tensor, as zeros: what `build_optimizer` tries its step on."""
    largest: dict[int, Shape] = {}
    for shape in sorted(group.shapes, key=lambda one: torch.Size(one).numel()):
        largest[len(shape)] = shape
    return [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in largest.values()]


def _usual_device() -> torch.device:
    """Where a run of this command would be trained."""
    if told_cpu() or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
