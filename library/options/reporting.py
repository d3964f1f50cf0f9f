"""Flags of what a run shows while it goes: previews, logs, messages; and of where options come from."""

from pathlib import Path
from typing import Literal

from library.options.flags import Group, equivalent, honoured, refused

_DEEPSPEED = "not supported; leave it out"


class Sampling(Group):
    """Previews"""

    sample_prompts: Path | None = honoured(None, "prompts of previews: a .txt, .toml or .json file")
    preview_prompts: tuple[str, ...] | None = honoured(
        None, "prompts of previews, each as a line of a .txt file of --sample_prompts; drawn after those of the file"
    )
    sample_every_n_epochs: int | None = honoured(None, "draw previews every n epochs", zero_is_off=True)
    sample_every_n_steps: int | None = honoured(None, "draw previews every n steps", zero_is_off=True)
    sample_at_first: bool = honoured(False, "draw previews before the first step")
    sample_sampler: Literal[
        "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
        "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
    ] = honoured("ddim", "sampler of previews")  # fmt: skip
    sample_images_per_prompt: int = honoured(1, "pictures of each prompt, with seeds that count up", ge=1)


class Logging(Group):
    """Logs"""

    logging_dir: Path | None = honoured(None, "folder of TensorBoard logs; each run gets its own folder in it")
    log_with: Literal["tensorboard", "wandb", "all"] | None = honoured(
        None, "where scalars go, besides the run's own .log.jsonl (default: tensorboard with --logging_dir)"
    )
    log_prefix: str | None = honoured(None, "start of the run's folder name", metavar="TEXT")
    log_tracker_name: str | None = honoured(
        None, "name of the tracker (default: network_train, or textual_inversion)", metavar="NAME"
    )
    log_tracker_config: str | None = honoured(
        None, "TOML file with settings of the trackers: a table for each, such as [wandb]", metavar="FILE.toml"
    )
    log_config: bool = honoured(False, "give the options to the trackers, without secrets and paths")
    log_norms: bool = honoured(False, "log norms of gradients and weights, per block of the model")
    wandb_run_name: str | None = honoured(None, "name of the run in wandb", metavar="NAME", needs="log_with")
    wandb_api_key: str | None = honoured(
        None,
        "key of wandb (better: the variable WANDB_API_KEY, or `wandb login`)",
        secret=True,
        metavar="KEY",
        needs="log_with",
    )


class Config(Group):
    """Options and messages"""

    config_file: Path | None = honoured(
        None, "TOML file of options; flags on the command line win", metavar="FILE.toml"
    )
    output_config: bool = honoured(False, "write the options that were given to --config_file, and stop")
    preset: str | None = honoured(
        None, "ready settings: the name of one of library/presets, such as character; files and flags win over it"
    )
    print_command: bool = honoured(False, "show the full command that the options amount to, and stop")
    dry_run: bool = honoured(
        False, "show what would be trained, and stop: exit code 0, or 2 where a real run would stop"
    )
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = honoured(
        None, "which messages are shown (default: INFO)", metavar="LEVEL"
    )
    console_log_file: str | None = honoured(None, "write messages to this file instead of stderr", metavar="FILE")
    console_log_simple: bool = equivalent(
        False, "plain messages", "messages are plain lines where stderr is no terminal"
    )


class Processes(Group):
    """Several processes"""

    ddp_gradient_as_bucket_view: bool = equivalent(
        False, "setting of DDP", "gradients are summed in one flat all-reduce"
    )
    ddp_static_graph: bool = equivalent(False, "setting of DDP", "gradients are summed in one flat all-reduce")
    ddp_timeout: int | None = honoured(
        None, "minutes that processes wait for each other before they give up (default: 30)", ge=1, zero_is_off=True
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
