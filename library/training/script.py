"""What every training script does: parse, look at everything, plan, load, train; and its exit code. Imports no torch
before a run is about to start. What differs between scripts are their flags (options.scripts).
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library import console
from library.errors import UserError
from library.options import parse
from library.options.scripts import Script

if TYPE_CHECKING:
    from library.training.prepare import Prepared


def run(script: Script, argv: Sequence[str] | None = None) -> int:
    """Run a script with the given arguments, those of the command line unless told.

    Returns the exit code: 0, 1 (the training failed), 2 (bad input), 130 or 143 (told to stop).
    """
    arguments = sys.argv[1:] if argv is None else argv
    console.prepare_streams()
    try:
        return _run(script, arguments)
    except UserError as error:
        return console.complain(error)
    except KeyboardInterrupt:
        console.say("stopped before anything was trained")
        return 130


def _run(script: Script, arguments: Sequence[str]) -> int:
    first = os.environ.get("RANK", "0") == "0"
    try:
        console.write_to(None)
        options = parse(arguments, script=script)
        console.set_level(options.config.console_log_level or "INFO" if first else "ERROR")
        from library.training.memory_plan import check_available, predict_memory
        from library.training.prepare import prepare

        if first and options.config.console_log_file:
            console.write_to(Path(options.config.console_log_file))
        prepared = prepare(options)
        prediction = predict_memory(prepared)
        if not (options.config.dry_run or options.dataset.debug_dataset or options.training.ignore_memory_check):
            check_available(prediction)
    except UserError as error:
        return console.complain(error) if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    for line in prepared.notices:
        console.say(line)
    if options.config.dry_run:
        from library.training.dry_run import show

        show(prepared, prediction)
        if not options.training.ignore_memory_check:
            check_available(prediction)
        _rehearse(prepared)
        return 0
    if options.dataset.debug_dataset:
        from library.training.dry_run import write_samples

        _rehearse(prepared)
        write_samples(prepared)
        return 0

    from library.training.interrupt import Interrupt, StoppedError
    from library.training.launcher import prepare_cpu_threads
    from library.training.phases import Phases
    from library.weights.model_hash import BackgroundHashes

    prepare_cpu_threads()
    phases = Phases()
    try:
        with Interrupt() as interrupt:
            hashes = BackgroundHashes(prepared.model.path, prepared.model.vae_path)
            with phases.phase("start", "loading libraries"):
                from library.training.session import train
            return train(prepared, arguments, hashes, interrupt, phases, prediction)
    except StoppedError as stop:
        cached = "; what was cached to disk stays" if options.caching.cache_latents_to_disk else ""
        console.say(f"stopped before the first step; nothing was trained yet{cached}")
        return stop.exit_code


def _rehearse(prepared: "Prepared") -> None:
    """Try the optimizer and the schedule where only their classes know what they take; nothing else needs torch."""
    from library.options.optimizer_checks import needs_trial

    if needs_trial(prepared.options):
        from library.training.rehearsal import rehearse

        rehearse(prepared)
