"""Flags of what a run shows while it goes: previews, logs, messages; and of where options come from."""

from pathlib import Path
from typing import Literal

from library.options.flags import Group, equivalent, honoured, refused

_TENSORBOARD = "not supported yet; use tensorboard"
_STDERR = "not supported; redirect stderr: 2> FILE"
_DEEPSPEED = "not supported; leave it out"


class Sampling(Group):
    """Previews"""

    sample_prompts: Path | None = honoured(None, "prompts of previews: a .txt, .toml or .json file")
    sample_every_n_epochs: int | None = honoured(None, "draw previews every n epochs", zero_is_off=True)
    sample_every_n_steps: int | None = honoured(None, "draw previews every n steps", zero_is_off=True)
    sample_at_first: bool = honoured(False, "draw previews before the first step")
    sample_sampler: Literal[
        "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
        "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
    ] = honoured("ddim", "sampler of previews")  # fmt: skip


class Logging(Group):
    """Logs"""

    logging_dir: Path | None = honoured(None, "folder of TensorBoard logs; each run gets its own folder in it")
    log_with: Literal["tensorboard", "wandb", "all"] | None = honoured(
        None,
        "where scalars go (default: tensorboard with --logging_dir)",
        refuse={"wandb": _TENSORBOARD, "all": _TENSORBOARD},
    )
    log_prefix: str | None = honoured(None, "start of the run's folder name", metavar="TEXT")
    log_tracker_name: str | None = honoured(None, "name of the tracker (default: network_train)", metavar="NAME")
    log_config: bool = refused(False, "log the options", "the file's metadata and the state hold them; leave it out")
    log_tracker_config: str | None = refused(
        None, "TOML file with a tracker's settings", "not supported yet; leave it out"
    )
    wandb_run_name: str | None = equivalent(None, "name of the run in wandb", "only wandb uses it")
    wandb_api_key: str | None = refused(
        None,
        "key of wandb",
        "secrets don't belong into options, and wandb is not supported yet",
        needs="log_with",
        secret=True,
    )


class Config(Group):
    """Options and messages"""

    config_file: Path | None = honoured(
        None, "TOML file of options; flags on the command line win", metavar="FILE.toml"
    )
    output_config: bool = honoured(False, "write the options that were given to --config_file, and stop")
    dry_run: bool = honoured(
        False, "show what would be trained, and stop: exit code 0, or 2 where a real run would stop"
    )
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = honoured(
        None, "which messages are shown (default: INFO)", metavar="LEVEL"
    )
    console_log_file: str | None = refused(None, "write messages to a file", _STDERR)
    console_log_simple: bool = equivalent(
        False, "plain messages", "messages are plain lines where stderr is no terminal"
    )


class Processes(Group):
    """Several processes"""

    ddp_gradient_as_bucket_view: bool = equivalent(
        False, "setting of DDP", "gradients are summed in one flat all-reduce"
    )
    ddp_static_graph: bool = equivalent(False, "setting of DDP", "gradients are summed in one flat all-reduce")
    ddp_timeout: int | None = refused(
        None, "minutes that processes wait for each other", "not supported yet; leave it out"
    )
    deepspeed: bool = refused(
        False, "use DeepSpeed", "not supported; a network's optimizer state is small, leave it out"
    )
    zero_stage: Literal[0, 1, 2, 3] = refused(2, "setting of DeepSpeed", _DEEPSPEED, needs="deepspeed")
    offload_optimizer_device: Literal["cpu", "nvme"] | None = refused(
        None, "setting of DeepSpeed", _DEEPSPEED, needs="deepspeed"
    )
    offload_optimizer_nvme_path: str | None = refused(None, "setting of DeepSpeed", _DEEPSPEED, needs="deepspeed")
    offload_param_device: Literal["cpu", "nvme"] | None = refused(
        None, "setting of DeepSpeed", _DEEPSPEED, needs="deepspeed"
    )
    offload_param_nvme_path: str | None = refused(None, "setting of DeepSpeed", _DEEPSPEED, needs="deepspeed")
    zero3_init_flag: bool = refused(False, "setting of DeepSpeed", _DEEPSPEED, needs="deepspeed")
    zero3_save_16bit_model: bool = refused(False, "setting of DeepSpeed", _DEEPSPEED, needs="deepspeed")
    fp16_master_weights_and_gradients: bool = refused(False, "setting of DeepSpeed", _DEEPSPEED, needs="deepspeed")
