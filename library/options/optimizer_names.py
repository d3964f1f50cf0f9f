"""Which optimizers and learning rate schedules there are, as records: where a class lives, what it needs, its settings.

Nothing is imported from the packages that define them, so that a command line can be checked without them. Building an
optimizer: training.optimizers. What a schedule does: training.schedules.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from library.options import modules
from library.options.flags import Flag
from library.options.optimizer_settings import ABOVE_0, FROM_0, SHARE, Setting, number, numbers, switch, table, whole


@dataclass(frozen=True)
class OptimizerInfo:
    """A named optimizer.

    Attributes:
        module, cls: where its class is found.
        extra: the extra of this package that installs it; None where it is always there.
        needs: a device without which it can't run; bitsandbytes' run on the CPU too.
        settings: what it takes in `--optimizer_args`; None where only the class knows.
        defaults: settings that it gets unless the user gives others; recorded with them.
        fixed: settings that make it what it is; not recorded.
        notes: a few words for `--list_optimizers`.
        aliases: other names of the same.
        has_d: it estimates the size of its steps, `d`, and takes learning rates about 1 as factors on that.
        one_rate: it can't step groups of different learning rates.
        schedule_free: it needs no schedule, and shows other weights than those that it trains.
        relative_step: it can do without a learning rate (Adafactor).
        steps_at_0: it can make a step at the learning rate 0, as a warmup begins.
        deterministic: the same gradients give the same bits.
    """

    name: str
    module: str
    cls: str
    extra: str | None = None
    needs: Literal["", "cuda"] = ""
    settings: Mapping[str, Setting] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""
    aliases: tuple[str, ...] = ()
    has_d: bool = False
    one_rate: bool = False
    schedule_free: bool = False
    relative_step: bool = False
    steps_at_0: bool = True
    deterministic: bool = True


_DECAY = number("weight_decay", FROM_0)
_EPS = number("eps", FROM_0)
_BETAS = numbers("betas", 2)
_ADAM = (_BETAS, _EPS, _DECAY)
_OF_TORCH = (
    *(switch("maximize"), switch("foreach", optional=True), switch("differentiable")),
    switch("fused", optional=True),
)
_8BIT = whole("min_8bit_size")
_D = (number("d0", ABOVE_0), whole("log_every"))
_GROWTH = number("growth_rate", (("ge", 1.0),))
_MOMENTUM = number("momentum", SHARE)
_FREE = (_DECAY, number("r", FROM_0), number("weight_lr_power", FROM_0), switch("foreach", optional=True))


def _bitsandbytes(name: str, cls: str, *settings: Setting, notes: str, **more: Any) -> OptimizerInfo:
    known = table(_DECAY, _8BIT, *settings)
    return OptimizerInfo(name, "bitsandbytes.optim", cls, "cuda", settings=known, notes=notes, **more)


def _dadaptation(
    name: str, *settings: Setting, module: str = "dadaptation", notes: str = "", **more: Any
) -> OptimizerInfo:
    known = table(_DECAY, *_D, *settings)
    return OptimizerInfo(name, module, name, "optimizers", settings=known, notes=notes, has_d=True, **more)


_PREPRINT = {"module": "dadaptation.experimental"}
_ADAPTS = (_BETAS, _EPS, _GROWTH, switch("decouple"))
_SMALL = "state in 8 bits, a quarter of the memory"
_PAGED = "state moves to main memory where the GPU is full; on the CPU the same as without Paged"
_ADAN = (numbers("betas", 3), _EPS, _GROWTH, switch("no_prox"))

OPTIMIZERS: tuple[OptimizerInfo, ...] = (
    OptimizerInfo(
        "AdamW", "torch.optim", "AdamW",
        settings=table(*_ADAM, switch("amsgrad"), switch("capturable"), *_OF_TORCH), notes="the default",
    ),
    OptimizerInfo(
        "Lion", "lion_pytorch", "Lion", "optimizers",
        settings=table(_BETAS, _DECAY, switch("use_triton"), switch("decoupled_weight_decay")),
        notes="half of AdamW's state; learning rates a third to a tenth of AdamW's",
    ),
    _bitsandbytes("AdamW8bit", "AdamW8bit", _BETAS, _EPS, notes=_SMALL),
    _bitsandbytes(
        "SGDNesterov8bit", "SGD8bit", _MOMENTUM, defaults={"momentum": 0.9}, fixed={"nesterov": True},
        notes=f"{_SMALL}; bitsandbytes steps by plain momentum",
    ),
    _bitsandbytes("Lion8bit", "Lion8bit", _BETAS, notes=_SMALL),
    _bitsandbytes("PagedAdamW8bit", "PagedAdamW8bit", _BETAS, _EPS, notes=f"{_SMALL}; {_PAGED}"),
    _bitsandbytes("PagedLion8bit", "PagedLion8bit", _BETAS, notes=f"{_SMALL}; {_PAGED}"),
    _bitsandbytes("PagedAdamW", "PagedAdamW", _BETAS, _EPS, notes=_PAGED),
    _bitsandbytes("PagedAdamW32bit", "PagedAdamW32bit", _BETAS, _EPS, notes=_PAGED),
    OptimizerInfo(
        "SGDNesterov", "torch.optim", "SGD", settings=table(_MOMENTUM, _DECAY, *_OF_TORCH),
        defaults={"momentum": 0.9}, fixed={"nesterov": True}, notes="wants far higher learning rates than AdamW",
    ),
    _dadaptation(
        "DAdaptAdamPreprint", *_ADAPTS, **_PREPRINT, aliases=("DAdaptation",), one_rate=True,
        notes="the rule of the first preprint",
    ),
    _dadaptation("DAdaptAdaGrad", _MOMENTUM, number("eps", ABOVE_0), _GROWTH),
    _dadaptation("DAdaptAdam", *_ADAPTS, switch("use_bias_correction"), one_rate=True),
    _dadaptation("DAdaptAdan", *_ADAN),
    _dadaptation("DAdaptAdanIP", *_ADAN, **_PREPRINT),
    _dadaptation("DAdaptLion", _BETAS, one_rate=True),
    _dadaptation("DAdaptSGD", _MOMENTUM, _GROWTH, one_rate=True, steps_at_0=False, notes="takes no warmup"),
    OptimizerInfo(
        "Prodigy", "prodigyopt", "Prodigy", "optimizers",
        settings=table(
            _BETAS, number("eps", ABOVE_0, optional=True), _DECAY, number("beta3", SHARE, optional=True),
            switch("decouple"), switch("use_bias_correction"), switch("safeguard_warmup"),
            number("d0", ABOVE_0), number("d_coef", ABOVE_0), _GROWTH,
            whole("slice_p", (("ge", 1.0),)),
        ),
        has_d=True, one_rate=True, notes="slice_p=11 saves memory",
    ),
    OptimizerInfo(
        "Adafactor", "transformers.optimization", "Adafactor",
        settings=table(
            numbers("eps", 2, FROM_0), number("clip_threshold", ABOVE_0), number("decay_rate"),
            number("beta1", SHARE, optional=True), _DECAY, switch("scale_parameter"), switch("relative_step"),
            switch("warmup_init"),
        ),
        relative_step=True, notes="little state; finds its learning rate itself unless relative_step=False",
    ),
    OptimizerInfo(
        "RAdamScheduleFree", "schedulefree", "RAdamScheduleFree", "optimizers",
        settings=table(_BETAS, _EPS, switch("silent_sgd_phase"), *_FREE), schedule_free=True,
        notes="needs no warmup",
    ),
    OptimizerInfo(
        "AdamWScheduleFree", "schedulefree", "AdamWScheduleFree", "optimizers",
        settings=table(_BETAS, _EPS, whole("warmup_steps"), *_FREE), schedule_free=True,
        notes="warmup by warmup_steps=N",
    ),
    OptimizerInfo(
        "SGDScheduleFree", "schedulefree", "SGDScheduleFree", "optimizers",
        settings=table(_MOMENTUM, whole("warmup_steps"), *_FREE), schedule_free=True,
        notes="warmup by warmup_steps=N",
    ),
)  # fmt: skip

TORCH_NAMES = (*("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),)
"""Other classes of torch.optim, which are named as they are written there."""
TORCH_REFUSED: Mapping[str, str] = {
    "LBFGS": "it needs the loss several times for a step",
    "SparseAdam": "it needs sparse gradients, which no network has",
}

_BY_NAME = {name.lower(): info for info in OPTIMIZERS for name in (info.name, *info.aliases)}


def known_names() -> tuple[str, ...]:
    """Every name that needs no dots."""
    return (*(name for info in OPTIMIZERS for name in (info.name, *info.aliases)), *TORCH_NAMES)


def optimizer_info(name: str) -> OptimizerInfo | None:
    """The record of a name: a registered one in any case, a class of torch.optim or `package.module.Class`."""
    if not name:
        return _BY_NAME["adamw"]
    if name.lower() in _BY_NAME:
        return _BY_NAME[name.lower()]
    if name in TORCH_NAMES:
        return OptimizerInfo(name, "torch.optim", name)
    module, _, cls = name.rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        return None
    return OptimizerInfo(name, module, cls, schedule_free=cls.lower().endswith("schedulefree"))


def relative_step(info: OptimizerInfo, arguments: Mapping[str, Any]) -> bool:
    """Whether an Adafactor finds its learning rate itself: unless it is told not to, and always with `warmup_init`."""
    return info.relative_step and bool(arguments.get("relative_step", True) or arguments.get("warmup_init", False))


@dataclass(frozen=True)
class ScheduleName:
    """A value of `--lr_scheduler`: the flags that it goes by, those that it can't do without, and its settings."""

    name: str
    text: str
    flags: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    needed_settings: tuple[str, ...] = ()


_WARMUP = "lr_warmup_steps"
_CYCLES = "lr_scheduler_num_cycles"
_LEAST = "lr_scheduler_min_lr_ratio"
SCHEDULE_NAMES: Mapping[str, ScheduleName] = {
    schedule.name: schedule
    for schedule in (
        ScheduleName("constant", "the same all the time"),
        ScheduleName("constant_with_warmup", "the same after the warmup", (_WARMUP,)),
        ScheduleName("linear", "falls to 0 in a straight line", (_WARMUP,)),
        ScheduleName("cosine", "falls to 0 along half a cosine", (_WARMUP,)),
        ScheduleName("cosine_with_restarts", "falls to 0 and starts again, so many times", (_WARMUP, _CYCLES)),
        ScheduleName(
            "polynomial", "falls to lr_end along a power", (_WARMUP, "lr_scheduler_power"),
            settings=table(number("lr_end", FROM_0)),
        ),
        ScheduleName("inverse_sqrt", "falls with the root of the steps", (_WARMUP, "lr_scheduler_timescale")),
        ScheduleName(
            "cosine_with_min_lr", "falls along half a cosine to a share", (_WARMUP, _CYCLES, _LEAST), (_LEAST,)
        ),
        ScheduleName(
            "warmup_stable_decay", "the same until the last steps, in which it falls to a share",
            (_WARMUP, "lr_decay_steps", _CYCLES, _LEAST),
        ),
        ScheduleName(
            "piecewise_constant", "steps: step_rules=1:100,0.1:200,0.01 is 1 up to step 100, 0.1 up to 200, then 0.01",
            settings=table(Setting(Flag("step_rules", "str"))), needed_settings=("step_rules",),
        ),
        ScheduleName("adafactor", "what Adafactor does by itself (relative_step)"),
    )
}  # fmt: skip
"""What each value of `--lr_scheduler` means, by name."""

TORCH_SCHEDULES = (
    *("ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR", "LinearLR"),
    *("MultiStepLR", "OneCycleLR", "PolynomialLR", "StepLR"),
)
"""Classes of torch.optim.lr_scheduler that `--lr_scheduler_type` takes by name."""
TORCH_SCHEDULES_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("LambdaLR", "MultiplicativeLR"), "it needs a function, which no flag can hold"),
    **dict.fromkeys(("ChainedScheduler", "SequentialLR"), "it needs other schedules, which no flag can hold"),
    "ReduceLROnPlateau": "it needs a validation loss after every step; use --early_stopping_patience",
}


def _lines(rows: Iterable[tuple[str, str]]) -> list[str]:
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    return [f"  {name:<{width}}  {text}".rstrip() for name, text in listed]


def list_text() -> str:
    """What `--list_optimizers` shows."""

    def described(info: OptimizerInfo) -> str:
        place = f"{info.module}.{info.cls}"
        missing = info.extra and modules.find_module(info.module)
        install = f"; not installed: pip install 'lorasmith[{info.extra}]'" if missing else ""
        marks = (("learning rate about 1", info.has_d), ("no schedule", info.schedule_free))
        said = [
            info.notes,
            *(text for text, holds in marks if holds),
            *(f"also called {name}" for name in info.aliases),
        ]
        return f"{place}{install}" + "".join(f"; {text}" for text in said if text)

    return "\n".join(
        [
            "--optimizer_type",
            *_lines((info.name, described(info)) for info in OPTIMIZERS),
            f"  as torch.optim has them: {', '.join(TORCH_NAMES)} (Muon trains no convolutions, which SD1 has)",
            "  any other class: package.module.Class",
            "--lr_scheduler",
            *_lines((schedule.name, schedule.text) for schedule in SCHEDULE_NAMES.values()),
            "--lr_scheduler_type",
            f"  {', '.join(TORCH_SCHEDULES)}",
            "  any other class: package.module.Class",
        ]
    )
