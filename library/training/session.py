"""From a prepared run to a finished one: load, cache, attach, and let the loop run. Only here all rooms are known."""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from library.console import error, say
from library.data.caches.latents import LatentStore
from library.data.custom import CustomPlan
from library.data.custom_loader import CustomLoader
from library.data.loader import Loader
from library.data.plan import Plan
from library.models.model import Model
from library.rng import rng
from library.training.attach import attach_network
from library.training.caching import cache_latents, latent_channels
from library.training.denoising import Denoising, Encode
from library.training.distributed import Processes, join_processes
from library.training.interrupt import Interrupt
from library.training.launcher import under_launcher
from library.training.loading import load_model
from library.training.loop import Events, Loop, LoopSettings, NonFiniteLossError
from library.training.objective import NoiseSettings, Objective
from library.training.optimizers import build_optimizer, parse_arguments
from library.training.painter import ModelPainter
from library.training.phases import Phases
from library.training.prepare import Prepared
from library.training.previews import PreviewWriter
from library.training.record import RunRecord
from library.training.run_settings import PREDICTION
from library.training.saving import Saver
from library.training.schedules import Curve, warmup_steps
from library.training.state import RunState, load_tensors
from library.training.steps import Save
from library.training.text import text_source
from library.training.tracking import LossAverage, NoTracker, TensorBoard, Tracker
from library.training.trainable import NetworkTrainable
from library.training.validation import Validation
from library.weights.check import BadWeightsError, check_file
from library.weights.model_hash import BackgroundHashes

_SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Identity:
    """What a run keeps over every resume."""

    session_id: int
    started_at: float


def train(
    prepared: Prepared, argv: Sequence[str], hashes: BackgroundHashes, interrupt: Interrupt, phases: Phases
) -> int:
    """Run to the end. Returns 0, 1 (the loss or the weights are no numbers, or a file can't be written), or 130 or 143
    (told to stop; weights and state are saved).

    Raises:
        UserError: what could be known only with the model or the device at hand.
    """
    with phases.phase("start"):
        processes = join_processes()
    with phases.phase("model", f"loading {prepared.model.path}"):
        model = load_model(prepared.options, prepared.model, processes)
    with phases.phase("latents"):
        latents = _cache_latents(prepared, model, processes)
    with phases.phase("network"):
        trainable = attach_network(prepared, model, processes.device)
    with phases.phase("text"):
        encode, released = text_source(prepared, model, processes)
        if released:
            trainable.release_text_encoder()
            model.release_text_encoders()
    with phases.phase("network"):
        loop, saver = _assemble(prepared, model, encode, trainable, latents, hashes, processes, interrupt, phases)
    first = loop.updates_done
    try:
        with phases.phase("steps"):
            exit_code = loop.run()
    except (NonFiniteLossError, BadWeightsError, OSError) as fault:
        error(str(fault))
        return 1
    finally:
        loop.events.tracker.close()
        loop.loader.close()
    if processes.is_main:
        say(phases.summary(loop.updates_done - first))
        if exit_code:
            say(f"stopped after step {loop.updates_done} of {prepared.clock.total_updates}; to go on:")
            say(f"  {resume_command(argv, saver.latest_state)}")
    return exit_code


def _cache_latents(prepared: Prepared, model: Model, processes: Processes) -> LatentStore | None:
    """Encode every picture once, if asked to; the VAE is let go afterwards."""
    if not prepared.options.caching.cache_latents:
        return None
    store = cache_latents(prepared.options, prepared.data.everything, model, processes)
    model.release_vae()
    return store


def _loader(
    prepared: Prepared,
    plan: Plan,
    model: Model,
    latents: LatentStore | None,
    processes: Processes,
    seed: int,
    *,
    ahead: bool = True,
) -> Loader | CustomLoader:
    """What makes the batches of a plan; with `ahead`, epoch after epoch of a run."""
    options = prepared.options
    share = {"seed": seed, "rank": processes.rank, "world_size": processes.count}
    if isinstance(plan, CustomPlan):
        return CustomLoader(plan, **share)
    return Loader(
        plan,
        latents=latents,
        workers=options.dataset.max_data_loader_n_workers,
        prior_loss_weight=options.loss.prior_loss_weight,
        exact_crops=options.dataset.exact_crop_conditioning,
        accumulation=prepared.clock.accumulation,
        total_steps=prepared.clock.total_updates if ahead else 0,
        channels=latent_channels(model),
        sample_posterior=options.caching.latent_sampling == "sample",
        **share,
    )


def _validation(
    prepared: Prepared, denoising: Denoising, model: Model, latents: LatentStore | None, phases: Phases
) -> Callable[[], float] | None:
    """What looks at the held-out pictures; None where there are none."""
    plan, flags = prepared.data.held_out, prepared.options.dataset
    if plan is None:
        return None
    seed = plan.datasets[0].spec.split_seed
    mine = None if latents is None else latents.part(len(prepared.plan.records))
    loader = _loader(prepared, plan, model, mine, denoising.processes, seed, ahead=False)
    validation = Validation(
        denoising, loader, plan.batches_per_epoch, seed=seed, max_batches=flags.max_validation_steps
    )

    def run() -> float:
        with phases.phase("validation"):
            try:
                return validation.run()
            finally:
                loader.close()

    return run


def _tracker(prepared: Prepared, processes: Processes) -> Tracker:
    options = prepared.options.logging
    if not options.logging_dir or not processes.is_main:
        return NoTracker()
    return TensorBoard(Path(options.logging_dir), options.log_prefix, options.log_tracker_name)


def _assemble(
    prepared: Prepared,
    model: Model,
    encode: Encode,
    trainable: NetworkTrainable,
    latents: LatentStore | None,
    hashes: BackgroundHashes,
    processes: Processes,
    interrupt: Interrupt,
    phases: Phases,
) -> tuple[Loop, Saver]:
    """The loop with everything around it, standing where the run starts or goes on."""
    options, clock, resume = prepared.options, prepared.clock, prepared.resume
    optimizer, label = build_optimizer(
        options.optimizer.optimizer_type,
        trainable.groups,
        parse_arguments(options.optimizer.optimizer_args or (), "--optimizer_args"),
    )
    identity = _identity(prepared)
    average = LossAverage(clock.updates_per_epoch, resume.state.losses if resume else ())
    objective = Objective(model.alphas_cumprod, model.prediction_type, options.loss.min_snr_gamma, processes.device)
    noise = NoiseSettings(
        options.loss.noise_offset or 0.0,
        options.loss.min_timestep or 0,
        options.loss.max_timestep or len(model.alphas_cumprod),
    )
    denoising = Denoising(model, encode, trainable, objective, noise, processes)
    record = RunRecord(
        prepared,
        model.base_model_version,
        model.prediction_type,
        hashes,
        identity.session_id,
        identity.started_at,
        label,
    )

    def snapshot(updates_done: int) -> RunState:
        return RunState(
            updates_done,
            identity.session_id,
            identity.started_at,
            prepared.seed,
            prepared.schedule_total,
            clock.total_updates,
            tuple(average.losses),
            prepared.settings | {PREDICTION: model.prediction_type},
            prepared.may_change,
        )

    output_dir = Path(str(options.output.output_dir))
    saver = Saver(
        output_dir,
        ".safetensors",
        _SAVE_DTYPES[options.output.save_precision],
        trainable,
        lambda: {"optimizer": optimizer.state_dict(), "scaler": loop.scaler.state_dict()},
        record.metadata,
        lambda path: check_file(path, trainable.file_shapes(), trained_parts=prepared.rates.trained),
        snapshot,
    )

    def save(wanted: Save, updates_done: int) -> None:
        with phases.phase("saving"):
            saver.save(wanted, updates_done)

    preview = (
        _preview(prepared, model, encode, latents is None, identity, output_dir, interrupt, phases)
        if prepared.prompts and processes.is_main
        else None
    )
    loop = Loop(
        _loop_settings(prepared),
        denoising,
        optimizer,
        _loader(prepared, prepared.plan, model, latents, processes, prepared.seed),
        Events(
            prepared.saves,
            save,
            prepared.previews,
            preview,
            _tracker(prepared, processes),
            prepared.validations,
            _validation(prepared, denoising, model, latents, phases),
        ),
        interrupt,
        average,
        resume.state.updates_done if resume else 0,
    )
    if resume:
        tensors, other = load_tensors(resume.folder)
        trainable.load_state_dict(tensors)
        optimizer.load_state_dict(other["optimizer"])
        loop.scaler.load_state_dict(other["scaler"])
        say(f"resumed from {resume.folder} at step {resume.state.updates_done} of {clock.total_updates}")
    return loop, saver


def _loop_settings(prepared: Prepared) -> LoopSettings:
    """The numbers of the loop."""
    options = prepared.options
    rates = options.optimizer
    arguments = parse_arguments(rates.lr_scheduler_args or (), "--lr_scheduler_args")
    curve = Curve(
        prepared.schedule_total,
        warmup_steps(rates.lr_warmup_steps, prepared.schedule_total),
        rates.lr_scheduler_num_cycles,
        rates.lr_scheduler_power,
        **({"end_lr": float(arguments["lr_end"])} if "lr_end" in arguments else {}),
    )
    return LoopSettings(
        prepared.seed,
        prepared.clock,
        rates.lr_scheduler,
        curve,
        rates.max_grad_norm,
        loss_scale=options.model.mixed_precision == "fp16",
    )


def _identity(prepared: Prepared) -> Identity:
    """A new run's identity, or that of the run that goes on. The same run started again has the same session id."""
    if prepared.resume:
        return Identity(prepared.resume.state.session_id, prepared.resume.state.started_at)
    drawn = rng(prepared.seed, "foreign", "session", json.dumps(prepared.settings)).integers(2**32)
    return Identity(int(drawn), time.time())


def _preview(
    prepared: Prepared,
    model: Model,
    encode: Encode,
    keep_vae: bool,
    identity: Identity,
    output_dir: Path,
    interrupt: Interrupt,
    phases: Phases,
) -> Callable[[int], None]:
    """What draws previews; without `keep_vae` the VAE's memory is given back after them."""
    writer = PreviewWriter(
        ModelPainter(model, encode),
        prepared.prompts,
        output_dir / "sample",
        prepared.options.output.output_name,
        prepared.options.sampling.sample_sampler,
        prepared.seed,
        identity.started_at,
        lambda: interrupt.exit_code != 0,
    )
    clock, by_epoch = prepared.clock, prepared.previews.every_n_epochs is not None

    def draw(updates_done: int) -> None:
        epoch = -(-updates_done // clock.updates_per_epoch) if by_epoch and updates_done else None
        with phases.phase("previews"):
            writer.draw(updates_done, epoch)
            if not keep_vae:
                model.release_vae()

    return draw


def resume_command(argv: Sequence[str], state: Path | None) -> str:
    """The command line that goes on from `state`, or from the latest one."""
    arguments: list[str] = []
    skip = False
    for argument in argv:
        if skip or argument.startswith("--resume="):
            skip = False
        elif argument == "--resume":
            skip = True
        else:
            arguments.append(argument)
    cpu = ["--cpu"] if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" else []
    start = ["accelerate", "launch", *cpu, "--quiet"] if under_launcher() else ["python"]
    return shlex.join([*start, sys.argv[0], *arguments, "--resume", str(state or "latest")])
