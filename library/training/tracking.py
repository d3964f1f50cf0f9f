"""Where logged numbers go: TensorBoard and wandb, through accelerate, and our own JSON lines.

What is logged, and when, is the loop's business. A tracker that fails is given up with a warning; it ends no run.
"""

import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from library.console import warn
from library.errors import UserError
from library.options.logging_checks import logged_options, wanted_trackers
from library.options.registry import Options
from library.options.scripts import SCRIPTS
from library.training.json_log import JsonLog, log_path, over_epochs


class Tracker(Protocol):
    """Where numbers go. `step` is an epoch for numbers that are counted in epochs (`json_log.over_epochs`).

    `show` gets the files of previews by names such as `sample_0`; trackers that show no pictures take no notice.
    """

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def show(self, pictures: Mapping[str, Path], step: int) -> None: ...
    def close(self) -> None: ...


class NoTracker:
    """Nothing was asked for, or another process logs."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        return None

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        return None

    def close(self) -> None:
        return None


class TensorBoard:
    """Event files in `<logging_dir>/<prefix><YYYYmmddHHMMSS>/<name>`.

    `settings` are arguments of its SummaryWriter, `config` a table to show.
    """

    def __init__(
        self,
        logging_dir: Path,
        prefix: str | None,
        name: str,
        settings: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        from accelerate.tracking import TensorBoardTracker

        folder = logging_dir / f"{prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        self._tracker = TensorBoardTracker(name, logging_dir=folder, **(settings or {}))
        self._tracker.start()
        if config:
            self._tracker.store_init_configuration(dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        return None

    def close(self) -> None:
        self._tracker.finish()


class Wandb:
    """A run of wandb in project `name`; `settings` are arguments of `wandb.init`, `config` the run's configuration.

    wandb's own steps only go up, so ours are sent as numbers named `step` and `epoch`, which its charts take as axes.
    It is not shown the command line, which may hold secrets and which it would keep with the run.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        from accelerate.tracking import WandBTracker

        self._tracker = WandBTracker(name, **(settings or {}))
        with _without_arguments():
            self._tracker.start()
        if config:
            self._tracker.store_init_configuration(dict(config))
        self._step = 0
        self._axes: set[str] = set()

    def log(self, values: Mapping[str, float], step: int) -> None:
        axis = "epoch" if over_epochs(values) else "step"
        for name in values:
            if name not in self._axes:
                self._axes.add(name)
                self._tracker.tracker.define_metric(name, step_metric=axis)
        self._tracker.log({**values, axis: step})

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        import wandb

        self._tracker.log({name: wandb.Image(str(path)) for name, path in pictures.items()} | {"step": step})

    def close(self) -> None:
        self._tracker.finish()


@contextmanager
def _without_arguments() -> Iterator[None]:
    """A stretch in which `sys.argv` is the program alone."""
    given = sys.argv
    sys.argv = given[:1]
    try:
        yield
    finally:
        sys.argv = given


class Several:
    """Logs to each of some trackers, by their names; one that fails is left out from then on."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(values, step))

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        self._each(lambda tracker: tracker.show(pictures, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in tuple(self._trackers.items()):
            try:
                act(tracker)
            except Exception as fault:
                warn(f"{name} failed, the run goes on without it: {fault}")
                del self._trackers[name]


def build_tracker(options: Options, output_dir: Path, is_main: bool, resumed_step: int | None) -> Tracker:
    """Everything that the options log to; the JSON log always. Nothing on other processes than the main one.

    Call it after the processes have joined, and before a model is loaded, so that what is wrong is told early.

    Args:
        resumed_step: steps done where the run goes on; None for a new run.

    Raises:
        UserError: a tracker doesn't start: no login for wandb, say, or unknown settings for it.
    """
    if not is_main:
        return NoTracker()
    tables = _tables(options)
    config = logged_options(options) if options.logging.log_config else None
    start = {"tensorboard": _tensorboard, "wandb": _wandb}
    made: dict[str, Tracker] = {}
    for name in wanted_trackers(options):
        try:
            made[name] = start[name](options, output_dir, tables.get(name, {}), config)
        except Exception as fault:
            raise _does_not_start(options, name, bool(tables.get(name)), fault) from fault
    made["the log"] = JsonLog(log_path(output_dir, options.output.output_name), resumed_step)
    return Several(made)


def _does_not_start(options: Options, name: str, has_table: bool, fault: Exception) -> UserError:
    flag = "log_tracker_config" if has_table else "log_with" if options.logging.log_with else "logging_dir"
    advice = "see `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
    return UserError.single(options.where(flag), f"{name} doesn't start: {type(fault).__name__}: {fault}", advice)


def _name(options: Options) -> str:
    """What trackers call the run, or its project."""
    return options.logging.log_tracker_name or SCRIPTS[options.script].tracker


def _tensorboard(
    options: Options, output_dir: Path, table: Mapping[str, Any], config: Mapping[str, Any] | None
) -> Tracker:
    flags = options.logging
    return TensorBoard(flags.logging_dir or output_dir, flags.log_prefix, _name(options), table, config)


def _wandb(options: Options, output_dir: Path, table: Mapping[str, Any], config: Mapping[str, Any] | None) -> Tracker:
    """wandb, after a login if a key was given. Its files go to the folder of logs, or of results."""
    flags = options.logging
    if flags.wandb_api_key and os.environ.get("WANDB_MODE") != "offline":
        import wandb

        wandb.login(key=flags.wandb_api_key)
    folder = flags.logging_dir or output_dir
    folder.mkdir(parents=True, exist_ok=True)
    named = {"name": flags.wandb_run_name} if flags.wandb_run_name else {}
    return Wandb(_name(options), {"dir": str(folder), **named, **table}, config)


def _tables(options: Options) -> dict[str, dict[str, Any]]:
    """The tables of `--log_tracker_config`, which options.logging_checks has looked at."""
    path = options.logging.log_tracker_config
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError.single(options.where("log_tracker_config"), f"{path} can't be read: {fault}") from fault


class LossAverage:
    """`loss/average`: the mean over the last epoch's worth of updates, each epoch overwriting the one before."""

    def __init__(self, updates_per_epoch: int, losses: Sequence[float | None] = ()) -> None:
        """`losses` by the update's place in its epoch; None where a run that began in the middle has none yet."""
        self._length = updates_per_epoch
        self.losses = list(losses)

    def add(self, updates_done: int, loss: float) -> float:
        """Enter the loss of update number `updates_done` (from 1); returns the average."""
        position = (updates_done - 1) % self._length
        self.losses += [None] * (position + 1 - len(self.losses))
        self.losses[position] = loss
        return self.average

    @property
    def average(self) -> float:
        known = [loss for loss in self.losses if loss is not None]
        return sum(known) / max(1, len(known))
