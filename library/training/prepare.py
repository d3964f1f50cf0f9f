"""Everything about a run that can be known before a model is loaded. Imports no torch, so that it answers at once.

What is wrong with the options, the data, the base model's file, the prompts or the state to resume is collected here
and shown together; a dry run prints what this finds.
"""

import secrets
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from library.data.plan import Plan
from library.data.sources.scan import Scan
from library.data.token_use import TokenUse, token_use
from library.data.token_use import notices as token_notices
from library.data.token_use import problems as token_problems
from library.errors import UserError
from library.models import samplers
from library.models.evidence import SAYING, UNKNOWN
from library.models.info import ModelInfo
from library.models.weighted import fragments
from library.options import Options
from library.options.loss_checks import objective_notices, objective_problems
from library.options.specs import DatasetSpec
from library.tokenizer import WORDS
from library.tokenizer.vocabulary import Vocabulary
from library.training import prepare_checks as checks
from library.training.embedding_plan import EmbeddingPlan, plan_embeddings, start_notices
from library.training.embedding_words import start_lines
from library.training.expected import untrained
from library.training.learning_rates import LearningRates, learning_rates
from library.training.network_words import network_word_notices
from library.training.prepare_data import Collector, Data, find_data, inspect_model, process_count
from library.training.prompts import Prompt, prompt_notices, read_prompts, typed_prompts
from library.training.run_settings import MAY_CHANGE, PREDICTION, run_settings
from library.training.schedules import schedule_settings
from library.training.state import RunState, changes, check_same_run, find_latest, read_state, schedule_total
from library.training.steps import Clock, PreviewPlan, SavePlan, ValidationPlan, epochs_between_saves, make_clock
from library.training.uploads import fetch_state
from library.training.watch import Watch


@dataclass(frozen=True)
class Resume:
    """The state folder that a run goes on from."""

    folder: Path
    state: RunState


@dataclass(frozen=True)
class Prepared:
    """A run that can start: what it reads, in which order, and what it does when.

    `embeddings` is None where captions have no new tokens;
    `first_update` is how many updates count as done where no state says it (`--initial_step`);
    `schedule_total` is the number of steps that the learning-rate curve spans; `settings` is what a resumed run must
    share with the one that it goes on from.
    """

    options: Options
    model: ModelInfo
    embeddings: EmbeddingPlan | None
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
    def trains_network(self) -> bool:
        """Whether there is a network, with or without embeddings."""
        return self.options.network.network_module is not None

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
    notices: list[str] = list(options.notices)
    model = collect.attempt(lambda: inspect_model(options))
    embeddings = None
    if model:
        collect.problems += checks.text_problems(options, model)
        checks.check_network(options, model, collect, notices)
        collect.attempt(partial(model.check_clip_skip, options.model.clip_skip, options.where("clip_skip")))
        collect.problems += objective_problems(options, model.prediction_type)
        embeddings = collect.attempt(partial(plan_embeddings, options, model))
    data = find_data(options, collect, model.vae_factor if model else 8, notices)
    prompts = _prompts(options, collect)
    if data:
        collect.problems += checks.strength_problems(options, data.plan)
        collect.problems += checks.watching_problems(options, data)
    resume = collect.attempt(lambda: _find_resume(options, notices))
    seed = _seed(options.training.seed, resume)
    use = None
    if model and data and embeddings and options.dataset.dataset_class is None:
        use = _check_captions(options, model, data.plan, embeddings, seed, collect, notices)
    if model and resume and model.prediction_type is None:
        model = as_probed(model, resume.state)
    if model and not collect.problems:
        encoders = len(model.text_encoder_configs)
        notices += collect.attempt(partial(untrained, options, model, learning_rates(options, encoders))) or ()
    if collect.problems or not (model and data):
        raise UserError(collect.problems, notices)
    plan = data.plan
    notices += [*checks.without_effect(options, model), *checks.unused_data_flags(options, data)]
    masks = checks.has_masks(options, data)
    notices += objective_notices(options, zero_terminal_snr=model.zero_terminal_snr, masks=masks)
    notices += network_word_notices(options, resumed=resume is not None)
    if not options.config.dry_run:
        notices.append(model.line)
        if embeddings:
            notices += start_lines(options, embeddings, use, resumed=resume is not None)
    training = options.training
    clock = make_clock(
        plan.batches_per_epoch,
        training.gradient_accumulation_steps,
        training.max_train_steps,
        training.max_train_epochs,
    )
    sampling = options.sampling
    previews = PreviewPlan(sampling.sample_every_n_steps, sampling.sample_every_n_epochs, sampling.sample_at_first)
    validations = ValidationPlan(
        options.dataset.validate_every_n_steps, options.dataset.validate_every_n_epochs, data.held_out is not None
    )
    span, first = clock.total_updates, _first_update(options, clock)
    if embeddings:
        notices += prompt_notices(prompts, Vocabulary(tuple(one.token for one in embeddings.trained)))
        name = "initial_epoch" if training.initial_step is None else "initial_step"
        notices += [] if resume else start_notices(embeddings, first, span, options.where(name))
    if training.seed is None:
        notices.append(f"--seed {seed}" + ("" if resume else " was drawn for this run"))
    rates = learning_rates(options, len(model.text_encoder_configs))
    settings = run_settings(options, plan, model, clock, seed, rates, embeddings)
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
        embeddings=embeddings,
        data=data,
        clock=clock,
        saves=_save_plan(options, clock),
        previews=previews,
        validations=validations,
        prompts=prompts,
        resume=resume,
        seed=seed,
        first_update=first,
        schedule_total=span,
        settings=settings,
        may_change=may_change,
        rates=rates,
        notices=tuple(notices),
    )


def _prompts(options: Options, collect: Collector) -> tuple[Prompt, ...]:
    """The prompts that will be drawn, those of the file first."""
    flags = options.sampling
    if not (flags.sample_every_n_steps or flags.sample_every_n_epochs or flags.sample_at_first):
        return ()
    prompts: tuple[Prompt, ...] = ()
    if flags.sample_prompts:
        prompts += collect.attempt(partial(read_prompts, flags.sample_prompts)) or ()
    typed = flags.preview_prompts or ()
    prompts += collect.attempt(partial(typed_prompts, typed, options.where("preview_prompts"))) or ()
    collect.attempt(lambda: samplers.check(flags.sample_sampler))
    return prompts


def _save_plan(options: Options, clock: Clock) -> SavePlan:
    """What is saved when."""
    output = options.output
    return SavePlan(
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


def _check_captions(
    options: Options,
    model: ModelInfo,
    plan: Plan,
    embeddings: EmbeddingPlan,
    seed: int,
    collect: Collector,
    notices: list[str],
) -> TokenUse:
    """New tokens that no caption holds learn nothing."""
    use = token_use(
        plan,
        embeddings.vocabulary,
        seed,
        limit=options.model.max_token_length or WORDS,
        fragments=fragments if options.dataset.weighted_captions else None,
        pad_id=min(encoder.pad_id for encoder in model.family.text_encoders),
    )
    trained = [one.token for one in embeddings.trained]
    collect.problems += token_problems(use, trained, options.where("token_string"))
    notices += token_notices(use, trained)
    return use


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
