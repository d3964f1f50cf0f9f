"""Flags of the files that a run leaves behind, and of where they are sent."""

from pathlib import Path
from typing import Literal

from library.options.flags import Group, honoured


class Output(Group):
    """Output"""

    output_dir: Path | None = honoured(None, "folder for weights, states and previews")
    output_name: str | None = honoured(
        None, "name of the files (default: last; epoch or at for saves before the end)", metavar="NAME"
    )
    save_model_as: Literal["ckpt", "pt", "safetensors"] | None = honoured(
        "safetensors", "file format; only safetensors holds metadata"
    )
    save_precision: Literal["float", "fp16", "bf16"] | None = honoured(
        None, "precision of saved weights (default: float)"
    )
    save_every_n_epochs: int | None = honoured(None, "save every n epochs", zero_is_off=True)
    save_every_n_steps: int | None = honoured(None, "save every n steps", zero_is_off=True)
    save_n_epoch_ratio: int | None = honoured(None, "save about n times; sets --save_every_n_epochs", zero_is_off=True)
    save_last_n_epochs: int | None = honoured(None, "keep only the saves of the last n epochs", zero_is_off=True)
    save_last_n_steps: int | None = honoured(None, "keep only the saves of the last n steps", zero_is_off=True)
    save_last_n_epochs_state: int | None = honoured(None, "the same for states", zero_is_off=True)
    save_last_n_steps_state: int | None = honoured(None, "the same for states", zero_is_off=True)
    save_state: bool = honoured(False, "with every save, and at the end, also save what --resume needs")
    save_state_on_train_end: bool = honoured(False, "save what --resume needs at the end")
    no_metadata: bool = honoured(False, "write only the metadata that loaders need")
    training_comment: str | None = honoured(None, "a comment for the file's metadata", metavar="TEXT")
    metadata_title: str | None = honoured(None, "title in the file's metadata (default: --output_name)", metavar="TEXT")
    metadata_author: str | None = honoured(None, "author in the file's metadata", metavar="TEXT")
    metadata_description: str | None = honoured(None, "description in the file's metadata", metavar="TEXT")
    metadata_license: str | None = honoured(None, "license in the file's metadata", metavar="TEXT")
    metadata_tags: str | None = honoured(None, "tags in the file's metadata, comma-separated", metavar="TEXT")
    metadata_usage_hint: str | None = honoured(None, "usage hint in the file's metadata", metavar="TEXT")
    metadata_thumbnail: str | None = honoured(None, "thumbnail: a data URL, or a picture's path", metavar="TEXT")
    metadata_merged_from: str | None = honoured(None, "what the model was merged from", metavar="TEXT")
    metadata_trigger_phrase: str | None = honoured(None, "words that call up what was learned", metavar="TEXT")
    metadata_preprocessor: str | None = honoured(None, "preprocessor in the file's metadata", metavar="TEXT")
    metadata_is_negative_embedding: str | None = honoured(None, "negative embedding or not", metavar="TEXT")


class Hub(Group):
    """Hugging Face hub"""

    huggingface_repo_id: str | None = honoured(
        None,
        "repository that every saved file is uploaded to, such as me/my-lora; without a user, one of your own",
        metavar="USER/NAME",
    )
    huggingface_repo_type: str | None = honoured(
        None, "model (the default), dataset or space", metavar="TYPE", needs="huggingface_repo_id"
    )
    huggingface_path_in_repo: str | None = honoured(None, "folder in it", metavar="PATH", needs="huggingface_repo_id")
    huggingface_token: str | None = honoured(
        None, "access token (better: the variable HF_TOKEN, or `hf auth login`)", secret=True, metavar="TOKEN"
    )
    huggingface_repo_visibility: str | None = honoured(
        None,
        "public makes a new repository public; otherwise it is private",
        metavar="public|private",
        needs="huggingface_repo_id",
    )
    save_state_to_huggingface: bool = honoured(False, "upload states, too", needs="huggingface_repo_id")
    resume_from_huggingface: bool = honoured(
        False, "--resume names a state on the hub: user/repo/path, then :revision and :type if needed", needs="resume"
    )
    async_upload: bool = honoured(
        False, "upload while training; the last files are waited for", needs="huggingface_repo_id"
    )
