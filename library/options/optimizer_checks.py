"""What must hold between the flags of the optimizer and of the learning rate over time, before anything is loaded."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from library.errors import Problem, nearest
from library.options import modules
from library.options.embedding_checks import embedding_rate, has_network
from library.options.optimizer_names import (
    SCHEDULE_NAMES,
    TORCH_NAMES,
    TORCH_REFUSED,
    TORCH_SCHEDULES,
    TORCH_SCHEDULES_REFUSED,
    OptimizerInfo,
    known_names,
    optimizer_info,
    relative_step,
)
from library.options.optimizer_settings import Setting, step_rules
from library.options.registry import FLAGS, Options

_ALIASES = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
_SCHEDULE_FLAGS = (
    *("lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power"),
    *("lr_scheduler_timescale", "lr_scheduler_min_lr_ratio"),
)
_SEVERAL_RATES = (
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight"),
)
_RATE_FLAGS = ("unet_lr", "text_encoder_lr", "embedding_lr", "learning_rate")
_CLOSE_TO_1 = 0.1
_LOW_FOR_VECTORS = 1e-5
_HIGH_FOR_VECTORS = 0.1


def chosen_optimizer(options: Options) -> str:
    """The optimizer that the flags ask for, by its registered name; as it was written where it has none."""
    flags = options.optimizer
    alias = next((name for flag, name in _ALIASES.items() if getattr(flags, flag)), "")
    name = flags.optimizer_type or alias
    info = optimizer_info(name)
    return info.name if info else name


def needs_trial(options: Options) -> bool:
    """Whether only the classes themselves know what their settings may be: of the optimizer, or of the schedule."""
    info = _info(options)
    return info is None or info.settings is None or bool(options.optimizer.lr_scheduler_type)


def problems(options: Options) -> Iterator[Problem]:
    """What is wrong with the optimizer, its settings, the learning rates and the schedule."""
    for one in _CHECKS:
        yield from one(options)


def notices(options: Options) -> Iterator[str]:
    """What has no effect, or is likely not what was meant."""
    for one in _NOTICES:
        yield from one(options)


def _info(options: Options) -> OptimizerInfo | None:
    return optimizer_info(chosen_optimizer(options))


def _name_flag(options: Options) -> str:
    """The flag that chose the optimizer."""
    given = [name for name in _ALIASES if getattr(options.optimizer, name)]
    return given[0] if given and not options.optimizer.optimizer_type else "optimizer_type"


def _names(options: Options) -> Iterator[Problem]:
    flags = options.optimizer
    aliases = [name for name in _ALIASES if getattr(flags, name)]
    if len(aliases) + bool(flags.optimizer_type) > 1:
        places = ", ".join(options.where(name) for name in (*aliases, "optimizer_type") if options.value(name))
        yield Problem(places, "each of them chooses the optimizer", "give one of them")
        return
    info, where = _info(options), options.where(_name_flag(options))
    if info is not None:
        yield from _installed(info.module, info.extra, where)
        return
    name = flags.optimizer_type
    if name in TORCH_REFUSED:
        yield Problem(where, f"{name} can't be used: {TORCH_REFUSED[name]}", "use AdamW")
    else:
        same = next((f"did you mean {known}?" for known in TORCH_NAMES if known.lower() == name.lower()), "")
        advice = same or nearest(name, known_names()) or "--list_optimizers shows them"
        yield Problem(where, f"there is no optimizer {name}", advice)


def _installed(module: str, extra: str | None, where: str) -> Iterator[Problem]:
    missing = modules.find_module(module)
    if missing is not None:
        top = module.partition(".")[0]
        install = f"pip install 'lorasmith[{extra}]'" if extra else f"install the package that has {module}"
        yield Problem(where, f"{top} isn't installed" if extra else missing, install)


def _arguments(options: Options) -> Iterator[Problem]:
    where = options.where("optimizer_args")
    found, wrong = modules.pairs(options.optimizer.optimizer_args or (), where)
    yield from wrong
    info = _info(options)
    if info is None:
        return
    if "lr" in found:
        yield Problem(where, "lr is no setting of an optimizer here", "use --learning_rate, --unet_lr, ...")
        del found["lr"]
    if info.settings is not None:
        yield from _settings(found, info.settings, info.name, where)
    warmup, relative = _value(info, found, "warmup_init"), _value(info, found, "relative_step")
    if info.relative_step and warmup is True and relative is False:
        yield Problem(where, "warmup_init=True can't be used with relative_step=False", "leave out one of the two")


def _value(info: OptimizerInfo, found: Mapping[str, str], name: str) -> Any:
    """The value of a setting, None where it isn't given or wrong."""
    try:
        return info.settings[name].read(found[name]) if info.settings and name in info.settings else None
    except (KeyError, ValueError):
        return None


def _settings(found: Mapping[str, str], known: Mapping[str, Setting], owner: str, where: str) -> Iterator[Problem]:
    """Problems of settings that `owner` doesn't have, or whose values are of a wrong type, length or size."""
    for key, text in found.items():
        if key not in known:
            listed = f"known are {', '.join(known)}" if known else "it has none"
            yield Problem(where, f"{owner} has no setting {key}", nearest(key, known) or listed)
            continue
        try:
            known[key].read(text)
        except ValueError as error:
            yield Problem(where, str(error))


def _relative(options: Options) -> bool:
    """Whether the optimizer finds its learning rate itself."""
    info = _info(options)
    if info is None or not info.relative_step:
        return False
    found, _ = modules.pairs(options.optimizer.optimizer_args or (), "")
    given = {name: _value(info, found, name) for name in ("relative_step", "warmup_init")}
    return relative_step(info, {name: value for name, value in given.items() if value is not None})


def _rates(options: Options) -> tuple[float, ...]:
    """The learning rates of the trained parts, without zeros."""
    flags, network = options.optimizer, options.network
    unet = flags.learning_rate if flags.unet_lr is None else flags.unet_lr
    without_text = network.network_train_unet_only or options.training.stop_text_encoder_training == -1
    rates = [embedding_rate(options)]
    if has_network(options):
        rates += [] if network.network_train_text_encoder_only else [unet]
        rates += [] if without_text else flags.text_encoder_lr or (flags.learning_rate,)
    return tuple(rate for rate in rates if rate)


def _learning_rates(options: Options) -> Iterator[Problem]:
    flags, info = options.optimizer, _info(options)
    where = options.where("text_encoder_lr")
    if len(flags.text_encoder_lr or ()) > 2:
        yield Problem(where, "more than two learning rates", "no model has more text encoders")
    if info is None or not info.one_rate:
        return
    rates = sorted(set(_rates(options)))
    if len(rates) > 1:
        listed = ", ".join(f"{rate:g}" for rate in rates)
        name = next(name for name in _RATE_FLAGS if options.value(name) is not None)
        yield Problem(options.where(name), f"{info.name} takes one learning rate, not {listed}", "give one, such as 1")
    for key in options.network_arguments():
        if key in _SEVERAL_RATES:
            wrong = f"{key} makes several learning rates, and {info.name} takes one"
            yield Problem(options.where("network_args"), wrong, "leave it out, or use another optimizer")


def _schedule(options: Options) -> Iterator[Problem]:
    flags = options.optimizer
    if flags.lr_scheduler_type:
        yield from _schedule_class(options)
        return
    schedule = SCHEDULE_NAMES[flags.lr_scheduler]
    if "lr_warmup_steps" not in schedule.flags and flags.lr_warmup_steps and not _relative(options):
        wrong = f"{schedule.name} has no warmup, so that it would have no effect"
        yield Problem(options.where("lr_warmup_steps"), wrong, "use --lr_scheduler constant_with_warmup")
    info = _info(options)
    if "lr_warmup_steps" in schedule.flags and flags.lr_warmup_steps and info is not None and not info.steps_at_0:
        wrong = f"{info.name} can't make a step at the learning rate 0, with which a warmup begins"
        yield Problem(options.where("lr_warmup_steps"), wrong, "leave it out, or use DAdaptAdam")
    for name in schedule.needed:
        if not options.value(name):
            yield Problem(options.where("lr_scheduler"), f"{schedule.name} needs --{name}", FLAGS[name].text)
    where = options.where("lr_scheduler_args")
    found, wrong_pairs = modules.pairs(flags.lr_scheduler_args or (), where)
    yield from wrong_pairs
    yield from _settings(found, schedule.settings, f"--lr_scheduler {schedule.name}", where)
    for name in schedule.needed_settings:
        if name not in found:
            advice = f"add --lr_scheduler_args {name}=..., such as {schedule.text.partition(': ')[2]}"
            yield Problem(options.where("lr_scheduler"), f"{schedule.name} needs {name}", advice)
    if "step_rules" in schedule.settings and "step_rules" in found:
        try:
            step_rules(found["step_rules"])
        except ValueError as error:
            yield Problem(where, str(error))
    if schedule.name == "polynomial":
        yield from _lowest_rate(options, found, where)
    warmup, decay = flags.lr_warmup_steps, flags.lr_decay_steps
    shares = isinstance(warmup, float) and isinstance(decay, float)
    if "lr_decay_steps" in schedule.flags and shares and warmup + decay > 1:
        wrong = f"warmup {warmup:g} and decay {decay:g} are more than the whole run"
        yield Problem(options.where("lr_decay_steps"), wrong, "make one of them shorter")


def _lowest_rate(options: Options, found: Mapping[str, str], where: str) -> Iterator[Problem]:
    try:
        end = float(found.get("lr_end", 1e-7))
    except ValueError:
        return
    lowest = min(_rates(options), default=None)
    if lowest is not None and end >= lowest:
        wrong = f"lr_end={end:g} is not below the learning rate {lowest:g}, so that it would rise"
        yield Problem(where if "lr_end" in found else options.where("lr_scheduler"), wrong, "give a lower lr_end")


def _schedule_class(options: Options) -> Iterator[Problem]:
    flags, where = options.optimizer, options.where("lr_scheduler_type")
    name = flags.lr_scheduler_type
    module, _, cls = name.rpartition(".")
    if cls in TORCH_SCHEDULES_REFUSED and module in ("", "torch.optim.lr_scheduler"):
        yield Problem(where, f"{cls} can't be used: {TORCH_SCHEDULES_REFUSED[cls]}", "")
    elif not module and name not in TORCH_SCHEDULES:
        near = nearest(name, TORCH_SCHEDULES) or f"known are {', '.join(TORCH_SCHEDULES)}, or package.module.Class"
        yield Problem(where, f"torch.optim.lr_scheduler has no {name}", near)
    elif module:
        yield from _installed(module, None, where)
    if flags.lr_warmup_steps:
        wrong = f"{name} has no warmup by this flag, so that it would have no effect"
        yield Problem(options.where("lr_warmup_steps"), wrong, "leave it out")
    found, wrong_pairs = modules.pairs(flags.lr_scheduler_args or (), options.where("lr_scheduler_args"))
    yield from wrong_pairs
    if "optimizer" in found:
        yield Problem(options.where("lr_scheduler_args"), "optimizer is no setting of a schedule", "leave it out")


def _adafactor(options: Options) -> Iterator[Problem]:
    flags, info = options.optimizer, _info(options)
    if info is None:
        return
    if _relative(options):
        if flags.lr_warmup_steps:
            wrong = "Adafactor finds its learning rate itself, so that it would have no effect"
            advice = "use --optimizer_args warmup_init=True, or relative_step=False"
            yield Problem(options.where("lr_warmup_steps"), wrong, advice)
    elif flags.lr_scheduler == "adafactor" and not flags.lr_scheduler_type:
        wrong = "adafactor is only for --optimizer_type Adafactor"
        if info.relative_step:
            wrong += " with relative_step=True"
        yield Problem(options.where("lr_scheduler"), wrong, "use constant_with_warmup")


def _of_rates(options: Options) -> Iterator[str]:
    info = _info(options)
    if info is None or not info.has_d:
        return
    rates = _rates(options)
    if rates and max(rates) <= _CLOSE_TO_1:
        own = "unet_lr" if has_network(options) else "embedding_lr"
        name = "learning_rate" if options.value(own) is None else own
        yield (
            f"{options.where(name)}: {info.name} finds the size of its steps itself and takes learning rates about 1, "
            f"{max(rates):g} is very low"
        )
    if len(set(rates)) > 1 and not info.one_rate:
        yield f"{options.where('optimizer_type')}: {info.name} is not made for several learning rates"


def _of_vectors(options: Options) -> Iterator[str]:
    rate, info = embedding_rate(options), _info(options)
    name = "learning_rate" if options.embeddings.embedding_lr is None else "embedding_lr"
    if not rate or (info is not None and (info.has_d or _relative(options))):
        return
    if rate >= _HIGH_FOR_VECTORS and info is not None and _steps_by_rate(info):
        yield (
            f"{options.where(name)}: {rate:g} is very high for the vectors of --token_string: steps of {info.name} are "
            "about as long, and leave nothing of what they start from; 5e-4 to 5e-3 is usual"
        )
    if rate <= _LOW_FOR_VECTORS and not options.optimizer.scale_lr:
        yield (
            f"{options.where(name)}: {rate:g} is very low for the vectors of --token_string, which hardly move then; "
            "5e-4 to 5e-3 is usual"
        )


def _steps_by_rate(info: OptimizerInfo) -> bool:
    """Whether steps are about as long as the learning rate, as Adam's are; False of classes that nobody here knows."""
    known = info.settings is not None or info.module == "torch.optim"
    return known and "SGD" not in info.cls and info.cls != "Adadelta"


def _of_schedules(options: Options) -> Iterator[str]:
    flags, info = options.optimizer, _info(options)
    given = [name for name in ("lr_scheduler", "lr_scheduler_type") if name in options.explicit and options.value(name)]
    changed = (name for name in _SCHEDULE_FLAGS if options.value(name) != FLAGS[name].default)
    shaping = [name for name in changed if options.value(name)]
    if info is not None and info.schedule_free:
        for name in [*given, *shaping]:
            if not (name == "lr_scheduler" and flags.lr_scheduler == "constant"):
                yield f"{options.where(name)}: has no effect, because {info.name} needs no schedule"
        return
    if _relative(options):
        for name in [*given, *(name for name in shaping if name != "lr_warmup_steps")]:
            if not (name == "lr_scheduler" and flags.lr_scheduler == "adafactor"):
                yield f"{options.where(name)}: has no effect, because Adafactor finds its learning rate itself"
        return
    if flags.lr_scheduler_type:
        for name in [name for name in ("lr_scheduler", *shaping) if name in options.explicit]:
            if name != "lr_warmup_steps":
                yield f"{options.where(name)}: has no effect, because lr_scheduler_type counts"
        return
    schedule = SCHEDULE_NAMES[flags.lr_scheduler]
    for name in shaping:
        if name not in schedule.flags and name != "lr_warmup_steps":
            yield f"{options.where(name)}: has no effect with --lr_scheduler {schedule.name}"
    if "lr_decay_steps" in schedule.flags and not flags.lr_decay_steps:
        yield f"{options.where('lr_scheduler')}: {schedule.name} without --lr_decay_steps never falls"


def _of_adafactor(options: Options) -> Iterator[str]:
    flags, info = options.optimizer, _info(options)
    if info is None or not info.relative_step:
        return
    if _relative(options):
        for name in reversed(_RATE_FLAGS):
            if name in options.explicit and options.value(name):
                yield (
                    f"{options.where(name)}: only says what is trained, because Adafactor finds its learning rate "
                    "itself; --optimizer_args relative_step=False to use it"
                )
        return
    if flags.max_grad_norm:
        yield f"{options.where('max_grad_norm')}: Adafactor shortens its updates itself; 0 is recommended"
    if not flags.lr_scheduler_type and flags.lr_scheduler != "constant_with_warmup":
        yield f"{options.where('lr_scheduler')}: constant_with_warmup is recommended for Adafactor"
    found, _ = modules.pairs(flags.optimizer_args or (), "")
    if found.get("clip_threshold", "1") not in ("1", "1.0"):
        yield f"{options.where('optimizer_args')}: clip_threshold=1.0 is recommended for Adafactor"


_CHECKS: tuple[Callable[[Options], Iterator[Problem]], ...] = (
    _names,
    _arguments,
    _learning_rates,
    _schedule,
    _adafactor,
)
_NOTICES: tuple[Callable[[Options], Iterator[str]], ...] = (_of_rates, _of_vectors, _of_schedules, _of_adafactor)
