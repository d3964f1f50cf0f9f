"""Everything about a run that can be known before a model is loaded. Imports no torch, so that it answers at once.

What is wrong with the options, the data, the base model's file, the prompts or the state to resume is collected here
and shown together; a dry run prints what this finds.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from library.data.faces import face_of
from library.data.plan import Plan
from library.data.sources.scan import Scan
from library.errors import Problem, UserError
from library.models import samplers
from library.models.evidence import SAYING, UNKNOWN
from library.models.info import ModelInfo
from library.models.pickles import SUFFIXES, read_weights
from library.options import Options
from library.options.loss_checks import objective_notices, objective_problems
from library.options.modules import read_settings
from library.options.specs import PRESERVE, DatasetSpec
from library.training.expected import untrained
from library.training.learning_rates import LearningRates, learning_rates
from library.training.prepare_data import Collector, Data, find_data, inspect_model, process_count
from library.training.prompts import Prompt, read_prompts
from library.training.run_settings import MAY_CHANGE, PREDICTION, run_settings
from library.training.schedules import schedule_settings
from library.training.start_weights import check_base_weights, check_lora
from library.training.state import RunState, changes, check_same_run, find_latest, read_state, schedule_total
from library.training.steps import Clock, PreviewPlan, SavePlan, ValidationPlan, epochs_between_saves, make_clock
from library.training.uploads import fetch_state
from library.training.watch import Watch
from networks.blocks import block_notices, block_problems
from networks.lora_args import parse as parse_lora
from networks.oft_targets import oft_targets
from networks.oft_targets import problems as oft_problems
from networks.planned import all_targets

_LORA_FILES = ("networks.lora", "networks.lora_fa", "networks.dylora")
"""Modules whose files are plain LoRA files."""


@dataclass(frozen=True)
class Resume:
    """The state folder that a run goes on from."""

    folder: Path
    state: RunState


@dataclass(frozen=True)
class Prepared:
    """A run that can start: what it reads, in which order, and what it does when.

    `first_update` is how many updates count as done where no state says it (`--initial_step`);
    `schedule_total` is the number of steps that the learning-rate curve spans; `settings` is what a resumed run must
    share with the one that it goes on from.
    """

    options: Options
    model: ModelInfo
    data: Data
    clock: Clock
    saves: SavePlan
    previews: PreviewPlan
    validations: ValidationPlan
    prompts: tuple[Prompt, ...]
    resume: Resume | None
    seed: int
    first_update: int
    schedule_total: int
    settings: dict[str, str]
    may_change: dict[str, str]
    rates: LearningRates
    notices: tuple[str, ...]

    @property
    def specs(self) -> tuple[DatasetSpec, ...]:
        """The datasets."""
        return self.data.specs

    @property
    def scan(self) -> Scan:
        """What was found of them."""
        return self.data.scan

    @property
    def plan(self) -> Plan:
        """The order in which pictures are trained."""
        return self.data.plan


def prepare(options: Options) -> Prepared:
    """Look at everything that the options name.

    Raises:
        UserError: all problems that were found.
    """
    collect = Collector()
    output = options.output
    notices: list[str] = list(options.notices)
    model = collect.attempt(lambda: inspect_model(options))
    if model:
        collect.problems += _text_problems(options, model)
        module, given = str(options.network.network_module), options.network_arguments()
        blocks = list(block_problems(given, model.family, module, options.where("network_args")))
        collect.problems += blocks
        notices += block_notices(given, model.family, module, options.where("network_args"))
        if module == "networks.oft":
            collect.problems += _oft_problems(options, model)
        collect.attempt(partial(model.check_clip_skip, options.model.clip_skip, options.where("clip_skip")))
    data = find_data(options, collect, model.vae_factor if model else 8, notices)
    prompts: tuple[Prompt, ...] = ()
    sampling = options.sampling
    drawn = sampling.sample_every_n_steps or sampling.sample_every_n_epochs or sampling.sample_at_first
    if sampling.sample_prompts and drawn:
        path = Path(sampling.sample_prompts)
        prompts = collect.attempt(lambda: read_prompts(path)) or ()
        collect.attempt(lambda: samplers.check(sampling.sample_sampler))
    weights = options.network.network_weights
    if weights is not None and weights.is_file() and (base := model) and not blocks:
        collect.attempt(lambda: _check_weights(options, weights, base))
    if model:
        collect.problems += [*objective_problems(options, model.prediction_type), *check_base_weights(options, model)]
    if data:
        collect.problems += _strength_problems(options, data.plan)
        collect.problems += _watching_problems(options, data)
    resume = collect.attempt(lambda: _find_resume(options, notices))
    if model and resume and model.prediction_type is None:
        model = as_probed(model, resume.state)
    if model and not collect.problems:
        encoders = len(model.text_encoder_configs)
        notices += collect.attempt(partial(untrained, options, model, learning_rates(options, encoders))) or ()
    if collect.problems or not (model and data):
        raise UserError(collect.problems, notices)
    plan = data.plan
    notices += [*_without_effect(options, model), *_unused_data_flags(options, data)]
    masks = _has_masks(options, data)
    notices += objective_notices(options, zero_terminal_snr=model.zero_terminal_snr, masks=masks)
    if not options.config.dry_run:
        notices.append(model.line)
    training = options.training
    clock = make_clock(
        plan.batches_per_epoch,
        training.gradient_accumulation_steps,
        training.max_train_steps,
        training.max_train_epochs,
    )
    saves = SavePlan(
        output.output_name,
        epochs_between_saves(output.save_every_n_epochs, output.save_n_epoch_ratio, clock.epochs),
        output.save_every_n_steps,
        output.save_last_n_epochs,
        output.save_last_n_steps,
        output.save_last_n_epochs_state,
        output.save_last_n_steps_state,
        output.save_state,
        output.save_state_on_train_end,
    )
    previews = PreviewPlan(sampling.sample_every_n_steps, sampling.sample_every_n_epochs, sampling.sample_at_first)
    validations = ValidationPlan(
        options.dataset.validate_every_n_steps, options.dataset.validate_every_n_epochs, data.held_out is not None
    )
    seed, span = _seed(training.seed, resume), clock.total_updates
    if training.seed is None:
        notices.append(f"--seed {seed}" + ("" if resume else " was drawn for this run"))
    rates = learning_rates(options, len(model.text_encoder_configs))
    settings = run_settings(options, plan, model, clock, seed, rates)
    may_change = {name: str(options.value(name)) for name in MAY_CHANGE}
    if resume:
        check_same_run(resume.state, settings)
        span = schedule_total(resume.state, clock.total_updates, training.resume_schedule)
        _check_patience(options, resume)
        notices += changes(resume.state, may_change, process_count())
    schedule_settings(options.optimizer, span)
    return Prepared(
        options=options,
        model=model,
        data=data,
        clock=clock,
        saves=saves,
        previews=previews,
        validations=validations,
        prompts=prompts,
        resume=resume,
        seed=seed,
        first_update=_first_update(options, clock),
        schedule_total=span,
        settings=settings,
        may_change=may_change,
        rates=rates,
        notices=tuple(notices),
    )


def _check_patience(options: Options, resume: Resume) -> None:
    """Refuse to go on with a run that has stopped early, as it would stop at once.

    Raises:
        UserError: so.
    """
    patience = options.training.early_stopping_patience
    if Watch(patience, resume.state.watch.get("curves")).is_exhausted:
        wrong = f"this run stopped early: {patience} validations in a row were no better than the best one"
        raise UserError.single("--resume", wrong, "to go on all the same, raise --early_stopping_patience")


def _first_update(options: Options, clock: Clock) -> int:
    """`--initial_step`, or the updates before `--initial_epoch`.

    Raises:
        UserError: that is the end of the run, or behind it.
    """
    training = options.training
    name = "initial_step" if training.initial_step is not None else "initial_epoch"
    first = training.initial_step
    if first is None:
        first = clock.updates_per_epoch * ((training.initial_epoch or 1) - 1)
    if first >= clock.total_updates:
        wrong = f"the run has {clock.total_updates} steps, so that nothing is left after step {first}"
        raise UserError.single(options.where(name), wrong, "raise --max_train_steps, or start earlier")
    return first


def as_probed(model: ModelInfo, state: RunState) -> ModelInfo:
    """A model whose prediction type is to be probed, with what the run that goes on was trained for."""
    told = state.settings.get(PREDICTION)
    for kind in model.family.versions:
        if kind == told:
            findings = tuple(
                f"{SAYING[kind]} (as the run that goes on found)" if f == UNKNOWN else f for f in model.findings
            )
            scheduler = model.scheduler_config | {"prediction_type": kind}
            return replace(model, prediction_type=kind, scheduler_config=scheduler, findings=findings)
    return model


def _text_problems(options: Options, model: ModelInfo) -> list[Problem]:
    """What the model's text encoders don't have."""
    problems = []
    configs, rates = model.text_encoder_configs, options.optimizer.text_encoder_lr or ()
    if len(rates) > len(configs):
        wrong = f"{len(rates)} learning rates, but {model.family.title} models have one text encoder"
        problems.append(Problem(options.where("text_encoder_lr"), wrong, "give one"))
    return problems


def _oft_problems(options: Options, model: ModelInfo) -> Iterator[Problem]:
    """Widths of the model that can't be cut into as many blocks."""
    given = options.network_arguments()
    settings = read_settings("networks.oft", given, lambda name: f"--network_args {name}")
    if settings.problems:
        return
    every, conv = (bool(settings.values.get(name)) for name in ("enable_all_linear", "enable_conv"))
    chosen = oft_targets(all_targets(model), every_linear=every, conv=conv)
    yield from oft_problems(chosen, parse_lora(options.network.network_dim, None, {}, module="networks.oft").dim)


def _check_weights(options: Options, weights: Path, model: ModelInfo) -> None:
    """`--network_weights`, as far as its header tells whether it fits."""
    network, where = options.network, options.where("network_weights")
    if network.network_module not in _LORA_FILES:
        if weights.suffix.lower() in (".safetensors", *SUFFIXES):
            read_weights(weights, f"{where} {weights}")
        return
    module, given = str(network.network_module), options.network_arguments()
    if network.dim_from_weights:
        parse_lora(None, None, given, module=module, from_file=True)
    shape = parse_lora(network.network_dim, network.network_alpha, given, module=module)
    trained = learning_rates(options, len(model.text_encoder_configs)).trained
    check_lora(weights, where, model, None if network.dim_from_weights else shape, trained)


def _without_effect(options: Options, model: ModelInfo) -> Iterator[str]:
    """Lines about flags that do nothing for this family."""
    if model.zero_terminal_snr and model.prediction_type == "epsilon":
        yield (
            "zero terminal SNR with a model that predicts noise: its last timestep teaches nothing, and previews are "
            "drawn on the plain schedule; --v_parameterization is for models that predict velocity"
        )
    if options.model.variant and model.layout == "single_file":
        yield "--variant: has no effect, the base model is a single file"
    skip = options.model.clip_skip
    if skip is not None and skip not in model.family.usual_clip_skips:
        usual = " or ".join(str(one) for one in model.family.usual_clip_skips)
        yield f"--clip_skip {skip}: {model.family.title} models are made for {usual}, and other programs take that"
    if options.dataset.exact_crop_conditioning and not model.family.takes_sizes:
        yield f"--exact_crop_conditioning: has no effect, {model.family.title} models aren't told sizes and crops"


def needs_strength(plan: Plan) -> bool:
    """Whether the network must be able to act at another strength than 1."""
    specs = [dataset.spec for dataset in plan.datasets]
    kept = any(subset.custom_attributes.get(PRESERVE) for spec in specs for subset in spec.subsets)
    return kept or any(spec.network_multiplier != 1 for spec in specs)


def _strength_problems(options: Options, plan: Plan) -> Iterator[Problem]:
    """LyCORIS' DoRA has no strength between none and all."""
    decomposed = options.network_arguments().get("dora_wd", "False").lower() not in ("false", "0", "none")
    foreign = not str(options.network.network_module).startswith("networks.")
    other = any(dataset.spec.network_multiplier not in (0, 1) for dataset in plan.datasets)
    if foreign and decomposed and other:
        wrong = "a network with dora_wd acts wholly or not at all, so that no other network_multiplier can be had"
        yield Problem(options.where("network_args"), wrong, "leave out one of the two")


def _has_masks(options: Options, data: Data) -> bool:
    """Whether losses may be masked: by a picture's mask, its alpha channel, or what a class of datasets gives."""
    alpha = any(subset.alpha_mask for spec in data.specs for subset in spec.subsets)
    records = data.plan.records + (data.held_out.records if data.held_out else ())
    return alpha or options.dataset.dataset_class is not None or any(record.mask for record in records)


def _unused_data_flags(options: Options, data: Data) -> Iterator[str]:
    """Lines about flags of the data that find nothing to work on."""
    flags = options.dataset
    everything = data.plan.records + (data.held_out.records if data.held_out else ())
    if flags.masked_loss and not _has_masks(options, data):
        yield f"{options.where('masked_loss')}: has no effect, no picture has a mask"
    if data.held_out is None:
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "validation_seed"):
            if options.value(name) is not None:
                yield f"{options.where(name)}: has no effect without held-out pictures (--validation_split)"
    faces = {(one.dataset, one.subset) for one in everything if face_of(one.key)} if _crops_faces(data) else set()
    for number, spec in enumerate(data.specs):
        for place, subset in enumerate(spec.subsets):
            if subset.face_crop_aug_range and (number, place) not in faces:
                yield f"{subset.where}: face_crop_aug_range has no effect, no name tells a face (tools/detect_faces.py)"
    cached = options.caching.cache_latents
    if cached and any(subset.keep_in_memory for spec in data.specs for subset in spec.subsets):
        yield "keep_in_memory: has no effect with cached latents"


def _watching_problems(options: Options, data: Data) -> Iterator[Problem]:
    """An early stop needs something to look at."""
    if options.training.early_stopping_patience is not None and data.held_out is None:
        wrong = "needs held-out pictures, whose loss tells when to stop"
        yield Problem(options.where("early_stopping_patience"), wrong, "add --validation_split 0.1")


def _crops_faces(data: Data) -> bool:
    return any(subset.face_crop_aug_range for spec in data.specs for subset in spec.subsets)


def _seed(seed: int | None, resume: Resume | None) -> int:
    """The user's seed, that of the run that goes on, or a new one."""
    if seed is not None:
        return seed
    return resume.state.seed if resume else secrets.randbits(32)


def _find_resume(options: Options, notices: list[str]) -> Resume | None:
    """`--resume`: a folder, or `latest`, which starts anew where there is no state yet."""
    wanted = options.training.resume
    if wanted is None:
        return None
    if options.hub.resume_from_huggingface:
        wanted = str(fetch_state(wanted, options.hub.huggingface_token))
    if str(wanted) != "latest":
        folder = Path(wanted)
        return Resume(folder, read_state(folder))
    output_dir = Path(str(options.output.output_dir))
    found = find_latest(output_dir, options.output.output_name)
    if found is None:
        notices.append(f"--resume latest: {output_dir} holds no state of this run yet, so it starts from the beginning")
        return None
    notices.append(f"--resume latest: going on from {found}")
    return Resume(found, read_state(found))
