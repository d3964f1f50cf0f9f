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
from library.data.cache import LatentCache, LatentStore
from library.data.loader import Loader
from library.errors import UserError
from library.models.load import load
from library.models.model import Model
from library.rng import rng
from library.training.attach import attach_network
from library.training.distributed import Processes, join_processes
from library.training.interrupt import Interrupt
from library.training.launcher import under_launcher
from library.training.loop import Encode, Events, Loop, LoopSettings, NonFiniteLossError
from library.training.objective import NoiseSettings, Objective
from library.training.optimizers import build_optimizer, parse_arguments
from library.training.painter import ModelPainter
from library.training.phases import Phases
from library.training.prepare import PREDICTION, Prepared
from library.training.previews import PreviewWriter
from library.training.record import RunRecord
from library.training.saving import Saver
from library.training.schedules import Curve, warmup_steps
from library.training.state import RunState, load_tensors
from library.training.steps import Save
from library.training.text import text_source
from library.training.tracking import LossAverage, NoTracker, TensorBoard, Tracker
from library.training.trainable import NetworkTrainable
from library.weights.check import BadWeightsError, check_file
from library.weights.model_hash import BackgroundHashes

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    dtype = _compute_dtype(prepared, processes)
    with phases.phase("model", f"loading {prepared.model.path}"):
        model = _load_model(prepared, processes, dtype)
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
    if processes.is_main:
        say(phases.summary(loop.updates_done - first))
        if exit_code:
            say(f"stopped after step {loop.updates_done} of {prepared.clock.total_updates}; to go on:")
            say(f"  {resume_command(argv, saver.latest_state)}")
    return exit_code


def _compute_dtype(prepared: Prepared, processes: Processes) -> torch.dtype:
    """The dtype of the frozen parts.

    Raises:
        UserError: float16 on a CPU, where a step takes hundreds of times as long.
    """
    precision = prepared.options.model.mixed_precision or "no"
    if precision == "fp16" and processes.device.type == "cpu":
        raise UserError.single("--mixed_precision", "fp16 is hundreds of times slower on a CPU", "use bf16 or no")
    if prepared.options.model.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return _DTYPES[precision]


def _load_model(prepared: Prepared, processes: Processes, dtype: torch.dtype) -> Model:
    """The base model; a VAE that overflows in float16 computes in float32 there."""
    options = prepared.options.model
    fragile = dtype == torch.float16 and prepared.model.vae_fragile
    return load(
        prepared.model,
        device=processes.device,
        dtype=dtype,
        vae_dtype=torch.float32 if options.no_half_vae or fragile else dtype,
        clip_skip=options.clip_skip,
        max_token_length=options.max_token_length,
        weighted=prepared.options.dataset.weighted_captions,
    )


def _cache_latents(prepared: Prepared, model: Model, processes: Processes) -> LatentStore | None:
    """Encode every picture once, if asked to; the VAE is let go afterwards."""
    caching = prepared.options.caching
    if not (caching.cache_latents or caching.cache_latents_to_disk):
        return None
    store = LatentCache.build(
        prepared.plan,
        model.encode_images,
        vae_id=model.vae_id(),
        to_disk=caching.cache_latents_to_disk,
        vae_batch_size=caching.vae_batch_size,
        dtype=str(model.vae_dtype).removeprefix("torch."),
        channels=int(prepared.model.vae_config.get("latent_channels", 4)),
        kind=prepared.model.family.latents_kind,
        trust_foreign=caching.trust_foreign_caches == "yes",
        skip_check=caching.skip_cache_check,
        threads=min(prepared.options.dataset.max_data_loader_n_workers, os.cpu_count() or 1),
        rank=processes.rank,
        world_size=processes.count,
        wait=processes.wait,
    )
    model.release_vae()
    return store


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
    loader = Loader(
        prepared.plan,
        seed=prepared.seed,
        latents=latents,
        workers=options.dataset.max_data_loader_n_workers,
        prior_loss_weight=options.loss.prior_loss_weight,
        exact_crops=options.dataset.exact_crop_conditioning,
        rank=processes.rank,
        world_size=processes.count,
    )
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
        _loop_settings(prepared, len(model.alphas_cumprod)),
        model,
        encode,
        trainable,
        optimizer,
        objective,
        loader,
        Events(prepared.saves, save, prepared.previews, preview, _tracker(prepared, processes)),
        processes,
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


def _loop_settings(prepared: Prepared, timesteps: int) -> LoopSettings:
    """The numbers of the loop; `timesteps` is the length of the model's noise schedule."""
    options = prepared.options
    loss, rates = options.loss, options.optimizer
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
        NoiseSettings(loss.noise_offset or 0.0, loss.min_timestep or 0, loss.max_timestep or timesteps),
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
