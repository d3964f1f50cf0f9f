"""From a prepared run to a finished one: load, cache, attach, and let the loop run. Only here all rooms are known."""

import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from library.console import error, say, warn
from library.data.caches.latents import LatentStore
from library.errors import Problem, UserError
from library.models.model import Model
from library.options.loss_checks import objective_problems
from library.training.assemble import Surroundings, assemble
from library.training.attach import attach_network
from library.training.caching import cache_latents
from library.training.distributed import LostProcessError, Processes, join_processes
from library.training.embedding_words import end_lines
from library.training.embeddings import EmbeddingTrainable
from library.training.interrupt import Interrupt
from library.training.launcher import missing_processes, under_launcher
from library.training.loading import load_model
from library.training.loop import Loop, NonFiniteLossError
from library.training.memory_plan import Prediction, on_device
from library.training.out_of_memory import NotEnoughMemoryError, explained, shortage
from library.training.phases import Phases
from library.training.pivotal import attach_embeddings
from library.training.precision import compile_model, settle_model
from library.training.prepare import Prepared
from library.training.rehearsal import rehearse
from library.training.saving import Saver
from library.training.text import text_source
from library.training.text_use import text_use
from library.training.tracking import Tracker, build_tracker
from library.training.trainable import NetworkTrainable, Trainable
from library.training.uploads import Uploader
from library.weights.check import BadWeightsError
from library.weights.model_hash import BackgroundHashes
from networks.base_weights import merge_base_weights

_OF_THE_START = ("--resume", "--initial_step", "--initial_epoch")
"""Flags with a value that say where a run starts."""


def train(
    prepared: Prepared,
    argv: Sequence[str],
    hashes: BackgroundHashes,
    interrupt: Interrupt,
    phases: Phases,
    prediction: Prediction,
) -> int:
    """Run to the end. Returns 0, 1 (the loss or the weights are no numbers, memory ran out, another process was lost,
    or a file can't be written), or 130 or 143 (told to stop; weights and state are saved).

    Raises:
        UserError: what could be known only with the model or the device at hand.
    """
    try:
        with phases.phase("start"):
            processes = join_processes(prepared.options.processes.ddp_timeout)
        prediction = on_device(prediction, "cuda" if processes.device.type == "cuda" else "cpu")
        with explained(phases, prediction):
            return _train(prepared, argv, Surroundings(processes, phases, hashes, interrupt), prediction)
    except (NotEnoughMemoryError, LostProcessError) as fault:
        error(str(fault))
        return 1


def _train(prepared: Prepared, argv: Sequence[str], around: Surroundings, prediction: Prediction) -> int:
    device = around.processes.device
    told = [missing_processes()]
    if device.type == "cuda":
        told.append(shortage(prediction, torch.cuda.mem_get_info(device)[0]))
    for line in filter(None, told):
        warn(line)
    with around.phases.phase("start"):
        tracker, uploader = _outside(prepared, around.processes)
    around = replace(around, tracker=tracker, uploader=uploader)
    with ExitStack() as ending:
        ending.callback(tracker.close)
        if uploader:
            ending.callback(uploader.finish)
        loop, saver = _set_up(prepared, around, ending)
        return _run(prepared, loop, saver, argv, around, prediction)


def _outside(prepared: Prepared, processes: Processes) -> tuple[Tracker, Uploader | None]:
    """Trackers and uploads, which the main process has; all of them stop where it can't start them."""
    options = prepared.options
    output = Path(str(options.output.output_dir))
    uploader = Uploader.of(options.hub, output) if processes.is_main else None
    step = prepared.resume.state.updates_done if prepared.resume else None
    made: list[Tracker] = []

    def start() -> None:
        if uploader:
            uploader.check()
        made.append(build_tracker(options, output, processes.is_main, step))

    _together(processes, start)
    return made[0], uploader


def _together(processes: Processes, work: Callable[[], None]) -> None:
    """Do some work that may be refused on one process only, so that all of them end then.

    Raises:
        UserError: what the process that was refused had to say; elsewhere an empty one.
    """
    problems: list[Problem] = []
    try:
        work()
    except UserError as fault:
        problems = list(fault.problems)
    if any(processes.exchange(bool(problems))):
        raise UserError(problems)


def _set_up(prepared: Prepared, around: Surroundings, ending: ExitStack) -> tuple[Loop, Saver]:
    """Everything that comes before the first step; what has to be undone at the end is left with `ending`."""
    processes, phases, options = around.processes, around.phases, prepared.options
    with phases.phase("start"):
        rehearse(prepared, processes.device)
    with phases.phase("model", f"loading {prepared.model.path}"):
        trains_text = text_use(prepared).trains
        model = load_model(options, prepared.model, processes, trains_text_encoders=trains_text)
        if problems := [*objective_problems(options, model.prediction_type)]:
            raise UserError(problems)
        _merge_base_weights(prepared, model)
        settle_model(options, model)
    with phases.phase("latents"):
        latents = _cache_latents(prepared, model, processes)
    with phases.phase("network"):
        trainable = _attach(prepared, model, processes)
    with phases.phase("text"):
        encode, released = text_source(prepared, model, processes)
        if released and not options.network.base_weights:
            if isinstance(trainable, NetworkTrainable):
                trainable.release_text_encoder()
            model.release_text_encoders()
    with phases.phase("network"):
        if times := compile_model(options, model):
            ending.callback(times.close)
            around = replace(around, compiling=times)
        return assemble(prepared, model, encode, trainable, latents, around)


def _attach(prepared: Prepared, model: Model, processes: Processes) -> Trainable:
    """What is trained, on the model: a network, embeddings, or both."""
    network = attach_network(prepared, model, processes.device) if prepared.trains_network else None
    if prepared.embeddings is None and network is not None:
        return network
    return attach_embeddings(prepared, model, processes.device, network)


def _merge_base_weights(prepared: Prepared, model: Model) -> None:
    """`--base_weights`, into the model as it was read. Text encoders stay from then on: read again, they lack it."""
    flags = prepared.options.network
    if flags.base_weights:
        strengths = flags.base_weights_multiplier or ()
        for line in merge_base_weights(model.unet, model.network_text_encoder, flags.base_weights, strengths):
            say(line)


def _cache_latents(prepared: Prepared, model: Model, processes: Processes) -> LatentStore | None:
    """Encode every picture once, if asked to; the VAE is let go afterwards."""
    if not prepared.options.caching.cache_latents:
        return None
    store = cache_latents(prepared.options, prepared.data.everything, model, processes)
    model.release_vae()
    return store


def _run(
    prepared: Prepared, loop: Loop, saver: Saver, argv: Sequence[str], around: Surroundings, prediction: Prediction
) -> int:
    """The loop, and what is said when it ends."""
    first = loop.updates_done
    try:
        with around.phases.phase("steps"):
            exit_code = loop.run()
    except NonFiniteLossError as fault:
        loop.events.watch.trained(loop.updates_done + 1, math.nan)
        error(str(fault))
        _tell_curves(loop, saver)
        return 1
    except (BadWeightsError, OSError) as fault:
        error(str(fault))
        return 1
    except Exception:
        if not loop.is_saved:
            _rescue(loop, first, around.phases)
        raise
    finally:
        loop.loader.close()
    if around.processes.is_main:
        _tell_end(loop, saver, argv, first, around.phases, prediction)
        if not loop.stopped or loop.stopped_early:
            _tell_words(prepared, loop, saver)
    return exit_code


def _rescue(loop: Loop, first: int, phases: Phases) -> None:
    """Save what was trained, as after a stop, where the run can't go on but its weights are whole.

    Whatever goes wrong here, the error that ended the run is the one to be told.
    """
    done, failed = loop.updates_done, phases.failed
    if done <= first:
        return
    if not loop.is_whole:
        warn(f"step {done + 1} was not finished, so that the work since the last save is lost")
        return
    try:
        loop.catch_up()
        loop.events.save_all([loop.events.saves.on_stop(done)], done)
    except Exception as fault:
        warn(f"the work up to step {done} could not be saved: {fault}")
    phases.failed = failed


def _tell_end(
    loop: Loop, saver: Saver, argv: Sequence[str], first: int, phases: Phases, prediction: Prediction
) -> None:
    """Times and memory, what the curves say, and how to go on with a run that was stopped."""
    say(phases.summary(loop.updates_done - first, prediction))
    if loop.stopped and not loop.stopped_early:
        say(f"stopped after step {loop.updates_done} of {loop.settings.clock.total_updates}; to go on:")
        say(f"  {resume_command(argv, saver.latest_state)}")
        return
    _tell_curves(loop, saver)


def _tell_curves(loop: Loop, saver: Saver) -> None:
    """Where the losses went flat or rose, and which files to try first."""
    files = [(step, saver.main_file(stem)) for step, stem in loop.events.saved]
    there = [(step, file.name) for step, file in files if file.exists()]
    only_vectors = isinstance(loop.events.trainable, EmbeddingTrainable)
    for line in loop.events.watch.advice(there, only_vectors=only_vectors):
        say(line)


def _tell_words(prepared: Prepared, loop: Loop, saver: Saver) -> None:
    """How to use the embeddings of the last save that is there."""
    stems = [stem for _, stem in loop.events.saved if saver.main_file(stem).exists()]
    if prepared.embeddings and stems:
        encoders = len(prepared.model.text_widths)
        for line in end_lines(prepared.options, prepared.embeddings, encoders, stems[-1]):
            say(line)


def resume_command(argv: Sequence[str], state: Path | None) -> str:
    """The command line that goes on from `state`, or from the latest one."""
    arguments: list[str] = []
    words = iter(argv)
    for word in words:
        name = word.partition("=")[0]
        if name in _OF_THE_START:
            if "=" not in word:
                next(words, None)
        elif name != "--resume_from_huggingface":
            arguments.append(word)
    cpu = ["--cpu"] if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" else []
    start = ["accelerate", "launch", *cpu, "--quiet"] if under_launcher() else ["python"]
    return shlex.join([*start, sys.argv[0], *arguments, "--resume", str(state or "latest")])
