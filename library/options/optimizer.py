"""Flags of the optimizer and of the learning rate over time."""

from typing import Literal

from library.options.flags import Group, honoured, refused

_ADAMW = "not supported yet; use --optimizer_type AdamW"
_SCHEDULES = "not supported yet; use constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial"


class Optimizer(Group):
    """Optimizer and learning rate"""

    optimizer_type: str = honoured("", "the optimizer; AdamW is the default and the only one yet", metavar="NAME")
    optimizer_args: tuple[str, ...] | None = honoured(
        None, "its settings, such as weight_decay=0.01", metavar="KEY=VALUE"
    )
    learning_rate: float = honoured(2e-6, "learning rate of parts that have none of their own", ge=0)
    unet_lr: float | None = honoured(None, "learning rate of the U-Net's part; 0 leaves it out", ge=0)
    text_encoder_lr: tuple[float, ...] | None = honoured(
        None,
        "learning rate of each text encoder's part: SDXL has two, and one value counts for both; 0 leaves one out",
        each_ge=0,
    )
    max_grad_norm: float = honoured(1.0, "gradients longer than this are shortened; 0 leaves them alone", ge=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
        "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant", "adafactor",
    ] = honoured(
        "constant", "learning rate over time",
        refuse=dict.fromkeys(
            ("inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant", "adafactor"), _SCHEDULES
        ),
    )  # fmt: skip
    lr_warmup_steps: int | float = honoured(0, "steps in which the learning rate grows from 0", metavar="N|RATIO")
    lr_scheduler_num_cycles: int = honoured(1, "cycles of cosine_with_restarts", ge=1)
    lr_scheduler_power: float = honoured(1.0, "power of polynomial", ge=0)
    lr_scheduler_args: tuple[str, ...] | None = honoured(None, "settings of the schedule: lr_end", metavar="KEY=VALUE")
    use_8bit_adam: bool = refused(False, "old name of AdamW8bit", _ADAMW)
    use_lion_optimizer: bool = refused(False, "old name of Lion", _ADAMW)
    lr_scheduler_type: str = refused("", "a schedule class of your own", "not supported yet; use --lr_scheduler")
    lr_decay_steps: int | float = refused(0, "steps in which the learning rate falls", "only for warmup_stable_decay")
    lr_scheduler_timescale: int | None = refused(
        None, "time scale of inverse_sqrt", "inverse_sqrt is not supported yet"
    )
    lr_scheduler_min_lr_ratio: float | None = refused(
        None, "lowest learning rate", "only for schedules not supported yet"
    )
    fused_backward_pass: bool = refused(
        False, "step the optimizer during the backward pass", "not supported; leave it out"
    )
