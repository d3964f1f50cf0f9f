"""Flags of the optimizer and of the learning rate over time."""

from typing import Literal

from library.options.flags import Group, honoured, refused


class Optimizer(Group):
    """Optimizer and learning rate"""

    optimizer_type: str = honoured("", "the optimizer (default: AdamW); --list_optimizers shows all", metavar="NAME")
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
    scale_lr: bool = honoured(
        False, "multiply learning rates by pictures per step: batch size x accumulation x processes"
    )
    no_scale_lr: bool = honoured(False, "don't, although a config file or preset says --scale_lr")
    max_grad_norm: float = honoured(1.0, "gradients longer than this are shortened; 0 leaves them alone", ge=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
        "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant", "adafactor",
    ] = honoured("constant", "learning rate over time")  # fmt: skip
    lr_warmup_steps: int | float = honoured(0, "steps in which the learning rate grows from 0", metavar="N|RATIO")
    lr_decay_steps: int | float = honoured(
        0, "steps at the end of warmup_stable_decay in which the learning rate falls", metavar="N|RATIO"
    )
    lr_scheduler_num_cycles: int = honoured(
        1, "cycles of cosine_with_restarts; half cycles of cosine_with_min_lr and warmup_stable_decay", ge=1
    )
    lr_scheduler_power: float = honoured(1.0, "power of polynomial", ge=0)
    lr_scheduler_timescale: int | None = honoured(
        None, "time scale of inverse_sqrt (default: the warmup, or 10000)", ge=1
    )
    lr_scheduler_min_lr_ratio: float | None = honoured(
        None, "lowest learning rate of cosine_with_min_lr and warmup_stable_decay, as a share", ge=0, le=1
    )
    lr_scheduler_args: tuple[str, ...] | None = honoured(
        None, "settings of the schedule, such as lr_end=1e-6", metavar="KEY=VALUE"
    )
    lr_scheduler_type: str = honoured(
        "", "a class of torch.optim.lr_scheduler, or package.module.Class; wins over --lr_scheduler", metavar="CLASS"
    )
    use_8bit_adam: bool = honoured(False, "old name of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = honoured(False, "old name of --optimizer_type Lion")
    list_optimizers: bool = honoured(False, "list the optimizers and learning rate schedules, and stop")
    fused_backward_pass: bool = refused(
        False,
        "step the optimizer during the backward pass",
        "networks have few parameters, so that nothing would be saved; leave it out",
    )
