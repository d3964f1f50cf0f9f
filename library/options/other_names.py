"""Names that other programs have for our flags: diffusers' textual inversion scripts, InvokeAI's `invokeai-ti` and
invoke-training. The flags themselves stand in their groups; how a name becomes a flag is options.renaming's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from library.options.flags import Flag
from library.options.registry import FLAGS, flags_of_script
from library.options.scripts import Script


@dataclass(frozen=True)
class OtherName:
    """A flag of another program. `flag` says how its value is read; `targets` are our flags that it becomes; `lost`: it
    asks for something besides training that isn't done."""

    flag: Flag
    targets: tuple[str, ...] = ()
    lost: bool = False

    @property
    def renames(self) -> bool:
        """Whether it says the same as the one flag that it becomes."""
        return len(self.targets) == 1 and self.flag.kind == "honoured" and not self.flag.text

    def meaning(self) -> str:
        """What becomes of it, for `--help` and the docs."""
        if not self.targets:
            return f"{self.flag.text}: {self.flag.why}"
        ours = " and ".join(f"--{target}" for target in self.targets)
        return ours if self.renames else f"{ours}: {self.flag.text}"


_SAME = {
    "placeholder_token": "token_string",
    "trigger_term": "token_string",
    "initializer_token": "init_word",
    "initial_embedding_file": "weights",
    "num_vectors": "num_vectors_per_token",
    "learnable_property": "caption_preset",
    "repeats": "dataset_repeats",
    "model": "pretrained_model_name_or_path",
    "dataloader_num_workers": "max_data_loader_n_workers",
    "resume_from_checkpoint": "resume",
    "enable_xformers_memory_efficient_attention": "xformers",
    "lr_num_cycles": "lr_scheduler_num_cycles",
    "unet_learning_rate": "unet_lr",
    "text_encoder_learning_rate": "text_encoder_lr",
    "textual_inversion_learning_rate": "embedding_lr",
    "hub_token": "huggingface_token",
    "validation_steps": "sample_every_n_steps",
    "validation_epochs": "sample_every_n_epochs",
    "num_validation_images": "sample_images_per_prompt",
}
ADAM = {
    "adam_beta1": "the first of betas=0.9,0.999",
    "adam_beta2": "the second of betas=0.9,0.999",
    "adam_weight_decay": "weight_decay",
    "adam_epsilon": "eps",
}
_GUI = "there is no such window; start from a ready preset, such as --preset embedding-object"


def _becomes(name: str, shape: Any, text: str, *targets: str, **more: Any) -> OtherName:
    return OtherName(Flag(name, shape, text=text, **more), targets)


def _moot(name: str, shape: Any, text: str, why: str) -> OtherName:
    return OtherName(Flag(name, shape, text=text, kind="equivalent", why=why))


def _lost(name: str, shape: Any, text: str, why: str) -> OtherName:
    return replace(_moot(name, shape, text, why), lost=True)


def _refused(name: str, shape: Any, text: str, why: str) -> OtherName:
    return OtherName(Flag(name, shape, text=text, kind="refused", why=why))


_LIST: tuple[OtherName, ...] = (
    *(OtherName(replace(FLAGS[ours], name=theirs, text=""), (ours,)) for theirs, ours in _SAME.items()),
    OtherName(replace(FLAGS["preview_prompts"], name="validation_prompt", text="", many=False), ("preview_prompts",)),
    _becomes("num_train_epochs", "int", "where --max_train_steps isn't given", "max_train_epochs", limits=(("ge", 1),)),
    _becomes("save_steps", "int", "a state too with --checkpointing_steps", "save_every_n_steps", limits=(("ge", 1),)),
    _becomes(
        "checkpointing_steps",
        "int",
        "of it and --save_steps the smaller number counts for both",
        *("save_every_n_steps", "save_state"),
        limits=(("ge", 1),),
    ),
    _becomes(
        "checkpoints_total_limit",
        "int",
        "states are counted in steps here: the number times the steps between saves",
        "save_last_n_steps_state",
        limits=(("ge", 1),),
    ),
    _becomes("report_to", "str", "in the folder logs of --output_dir without --logging_dir", "log_with", "logging_dir"),
    _becomes(
        "push_to_hub",
        "flag",
        "upload to --hub_model_id, or to a repository of your own named like --output_dir",
        "huggingface_repo_id",
    ),
    _becomes("hub_model_id", "str", "counts with --push_to_hub", "huggingface_repo_id"),
    *(_becomes(name, "float", f"as {text}", "optimizer_args", limits=(("ge", 0),)) for name, text in ADAM.items()),
    _moot("center_crop", "flag", "crop in the middle", "pictures are cropped in the middle, and never squashed"),
    _moot("allow_tf32", "flag", "use TF32", "--mixed_precision says in which precision the base model runs"),
    _moot("only_save_embeds", "flag", "save no pipeline", "only embeddings are saved"),
    _moot("local_rank", "int", "number of the process", "the launcher tells each process its number"),
    _moot("no_safe_serialization", "flag", "save a .bin file", "--save_model_as says in which format files are"),
    _lost(
        "save_as_full_pipeline",
        "flag",
        "save the base model too",
        "only embeddings are saved; load them into a pipeline with its load_textual_inversion",
    ),
    _refused("tokenizer_name", "str", "another tokenizer", "every base model has CLIP's tokenizer; leave it out"),
    _refused(
        "revision", "str", "revision of the base model", "revisions can't be chosen; download it and give its folder"
    ),
    _refused("front_end", "flag", "ask for settings in a window", _GUI),
    _refused("gui", "flag", "ask for settings in a window", _GUI),
    _lost("root_dir", "str", "InvokeAI's folder", "models are files, folders and hub ids; no name is looked up there"),
)
OTHER_NAMES: Mapping[str, OtherName] = MappingProxyType({one.flag.name: one for one in _LIST})


def names_of_script(script: Script) -> Mapping[str, OtherName]:
    """The names that a script takes: those of flags that it has."""
    flags = flags_of_script(script.name)
    return {name: one for name, one in OTHER_NAMES.items() if all(target in flags for target in one.targets)}
