"""The loop of a run with everything around it: optimizer, files, previews, validation, logs, standing where the run
starts or goes on. What is loaded before, and what is said after it, stands in library.training.session."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from library.console import say
from library.data.caches.latents import LatentStore
from library.data.custom import CustomPlan
from library.data.custom_loader import CustomLoader
from library.data.loader import Loader
from library.data.plan import Plan
from library.models.compiling import CompileTimes
from library.models.model import Model
from library.models.offload import optimizer_tensors, set_aside
from library.models.schedule import alphas_cumprod
from library.options.optimizer_checks import chosen_optimizer
from library.rng import rng
from library.training.caching import latent_channels
from library.training.denoising import Denoising, Encode
from library.training.distributed import Processes
from library.training.events import Events
from library.training.interrupt import Interrupt
from library.training.learning_rates import text_encoder_steps
from library.training.loop import Learner, Loop, LoopSettings
from library.training.noise import NoiseSettings
from library.training.objective import LossSettings, Objective
from library.training.optimizers import build_optimizer, parse_arguments
from library.training.painter import ModelPainter
from library.training.phases import Phases
from library.training.precision import trained_dtype
from library.training.prepare import Prepared
from library.training.previews import PreviewWriter
from library.training.products import products
from library.training.rate_control import build_rates
from library.training.record import RunRecord
from library.training.requests import Requests
from library.training.rounding import RoundedParameters
from library.training.run_settings import PREDICTION
from library.training.saving import Saver
from library.training.schedules import schedule_settings
from library.training.state import RunState, load_tensors
from library.training.steps import Save
from library.training.tracking import LossAverage, NoTracker, Tracker
from library.training.trainable import Trainable
from library.training.uploads import Uploader
from library.training.validation import Validation, ValidationResult
from library.training.watch import Watch
from library.weights.model_hash import BackgroundHashes

_SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Identity:
    """What a run keeps over every resume."""

    session_id: int
    started_at: float


@dataclass(frozen=True)
class Surroundings:
    """What a run has around its loop: who takes part, who is told, and where times are kept."""

    processes: Processes
    phases: Phases
    hashes: BackgroundHashes
    interrupt: Interrupt
    tracker: Tracker = field(default_factory=NoTracker)
    uploader: Uploader | None = None
    compiling: CompileTimes | None = None


def assemble(
    prepared: Prepared,
    model: Model,
    encode: Encode,
    trainable: Trainable,
    latents: LatentStore | None,
    around: Surroundings,
) -> tuple[Loop, Saver]:
    """The loop and what writes its files, standing where the run starts or goes on.

    Raises:
        UserError: an optimizer or a schedule that can't be made of the options.
    """
    options, clock, resume = prepared.options, prepared.clock, prepared.resume
    processes = around.processes
    learner = _learner(prepared, trainable, processes.device)
    identity = _identity(prepared)
    average = LossAverage(clock.updates_per_epoch, resume.state.losses if resume else ())
    kept = resume.state.watch if resume else {}
    watch = Watch(options.training.early_stopping_patience, kept.get("curves"))
    saved = [(int(step), str(stem)) for step, stem in kept.get("saved", ())]
    denoising = _denoising(prepared, model, encode, trainable, processes)
    freezing = _freezing(prepared)

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
            {"curves": watch.state(), "saved": saved},
            processes.count,
            {name: step for name, step in freezing.items() if step <= updates_done},
        )

    def stored() -> dict[str, Any]:
        parts = {"optimizer": learner.built.state_dict(), "rates": learner.rates.state_dict()}
        return {**parts, "scaler": loop.scaler.state_dict()}

    record = RunRecord(
        prepared,
        model.base_model_version,
        model.prediction_type,
        around.hashes,
        identity.session_id,
        identity.started_at,
        learner.built.label,
        learner.built.finds_its_rate,
    )
    output_dir = Path(str(options.output.output_dir))
    saver = Saver(
        output_dir,
        products(prepared, trainable, record),
        _SAVE_DTYPES[options.output.save_precision],
        trainable,
        stored,
        snapshot,
        evaluating=learner.evaluating,
        after=around.uploader.send if around.uploader else None,
    )

    def save(wanted: Save, updates_done: int) -> None:
        with around.phases.phase("saving"):
            saver.save(wanted, updates_done)

    draws = bool(prepared.prompts) and processes.is_main
    events = Events(
        clock,
        trainable,
        processes.is_main,
        prepared.saves,
        save,
        prepared.previews,
        _preview(prepared, model, encode, learner, latents is None, identity, around) if draws else None,
        prepared.validations,
        _validation(prepared, denoising, model, latents, around.phases),
        around.tracker,
        average,
        watch,
        learner.evaluating,
        saved,
        around.compiling.news if around.compiling else None,
        0 if resume else prepared.first_update,
    )
    loop = Loop(
        _loop_settings(prepared, freezing),
        denoising,
        learner,
        _loader(prepared, prepared.plan, model, latents, processes, prepared.seed),
        events,
        around.interrupt,
        Requests(output_dir) if processes.is_main else None,
        resume.state.updates_done if resume else prepared.first_update,
    )
    if resume:
        tensors, other = load_tensors(resume.folder)
        trainable.load_state_dict(tensors)
        learner.built.load_state_dict(other["optimizer"])
        learner.rates.load_state_dict(other["rates"])
        loop.scaler.load_state_dict(other["scaler"])
        say(f"resumed from {resume.folder} at step {resume.state.updates_done} of {clock.total_updates}")
    elif prepared.first_update:
        say(f"starting at step {prepared.first_update} of {clock.total_updates}")
    return loop, saver


def _learner(prepared: Prepared, trainable: Trainable, device: torch.device) -> Learner:
    """Optimizer and schedule over what is trained, or over its float32 masters."""
    flags = prepared.options.optimizer
    dtype, groups, rounded = trained_dtype(prepared.options), trainable.groups, None
    if prepared.trains_network and dtype != torch.float32:
        rounded = RoundedParameters(trainable.parameters(), dtype, prepared.seed, device)
        groups = rounded.groups(groups)
    built = build_optimizer(
        chosen_optimizer(prepared.options),
        groups,
        parse_arguments(flags.optimizer_args or (), "--optimizer_args"),
        device=device,
        rate=flags.learning_rate,
        names=trainable.descriptions,
    )
    built.settle = trainable.hold_norms
    return Learner(built, build_rates(built, schedule_settings(flags, prepared.schedule_total)), rounded)


def _denoising(
    prepared: Prepared, model: Model, encode: Encode, trainable: Trainable, processes: Processes
) -> Denoising:
    """Model, text, objective and noise of the run."""
    loss, before = prepared.options.loss, None
    if loss.legacy_ztsnr_weights and model.zero_terminal_snr:
        before = alphas_cumprod(model.info.scheduler_config | {"rescale_betas_zero_snr": False})
    settings = LossSettings.of(loss)
    objective = Objective(model.alphas_cumprod, model.prediction_type, settings, processes.device, alphas_before=before)
    noise = NoiseSettings.of(loss, len(model.alphas_cumprod))
    return Denoising(model, encode, trainable, objective, noise, processes)


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
) -> Callable[[], ValidationResult] | None:
    """What looks at the held-out pictures; None where there are none."""
    plan, flags = prepared.data.held_out, prepared.options.dataset
    if plan is None:
        return None
    seed = plan.datasets[0].spec.split_seed
    mine = None if latents is None else latents.part(len(prepared.plan.records))
    loader = _loader(prepared, plan, model, mine, denoising.processes, seed, ahead=False)
    validation = Validation(denoising, loader, plan, seed=seed, max_batches=flags.max_validation_steps)

    def run() -> ValidationResult:
        with phases.phase("validation"):
            try:
                return validation.run()
            finally:
                loader.close()

    return run


def _freezing(prepared: Prepared) -> dict[str, int]:
    """After how many updates parts are trained no more, by the flag that says when.

    In a run that goes on, what was frozen when its state was written stays so, however much longer it is, unless the
    flag is another one and its moment is still to come; what a flag would have frozen before is frozen now.
    """
    total, plan = prepared.clock.total_updates, prepared.embeddings
    steps = {
        "stop_text_encoder_training": text_encoder_steps(prepared.options, total),
        "ti_train_steps_ratio": plan.frozen_after(total) if plan else None,
    }
    state = prepared.resume.state if prepared.resume else None
    if state is None:
        return {flag: step for flag, step in steps.items() if step is not None}
    found = {}
    for flag, step in steps.items():
        frozen = state.frozen.get(flag)
        same = state.may_change.get(flag) == prepared.may_change.get(flag)
        if frozen is not None and (same or (step is not None and step <= state.updates_done)):
            found[flag] = frozen
        elif step is not None:
            found[flag] = max(step, state.updates_done)
    return found


def _loop_settings(prepared: Prepared, freezing: Mapping[str, int]) -> LoopSettings:
    """The numbers of the loop."""
    options = prepared.options
    return LoopSettings(
        prepared.seed,
        prepared.clock,
        options.optimizer.max_grad_norm,
        loss_scale=options.model.mixed_precision == "fp16",
        scale_weight_norms=options.network.scale_weight_norms,
        text_memo_bytes=options.caching.text_memo_mb * 2**20,
        text_encoder_steps=freezing.get("stop_text_encoder_training"),
        embedding_steps=freezing.get("ti_train_steps_ratio"),
        log_norms=options.logging.log_norms,
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
    learner: Learner,
    keep_vae: bool,
    identity: Identity,
    around: Surroundings,
) -> Callable[[int], None]:
    """What draws previews; without `keep_vae` the VAE's memory is given back after them."""
    options = prepared.options
    offload = options.model.offload_during_sampling
    writer = PreviewWriter(
        ModelPainter(model, encode, offload=offload),
        prepared.prompts,
        Path(str(options.output.output_dir)) / "sample",
        options.output.output_name,
        options.sampling.sample_sampler,
        prepared.seed,
        identity.started_at,
        lambda: around.interrupt.exit_code != 0,
        count=options.sampling.sample_images_per_prompt,
    )
    clock, by_epoch = prepared.clock, prepared.previews.every_n_epochs is not None

    def draw(updates_done: int) -> None:
        epoch = -(-updates_done // clock.updates_per_epoch) if by_epoch and updates_done else None
        aside = optimizer_tensors(learner.built.optimizer) if offload else ()
        with around.phases.phase("previews"), set_aside(aside, model.device):
            around.tracker.show(writer.draw(updates_done, epoch), updates_done)
            if not keep_vae:
                model.release_vae()

    return draw
