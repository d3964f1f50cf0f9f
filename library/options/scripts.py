"""The training scripts, as far as their flags differ. What each does is their own business. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Script:
    """One script's command line.

    Attributes:
        name: of the file, without `.py`.
        about: what it does, in a sentence without its full stop.
        needs: flags that must be given, and what to do where one is missing.
        tracker: what trackers call its runs.
        without: groups of flags that it doesn't have; `lacks`: single flags that it doesn't have.
        defaults: of flags whose default is another one here.
    """

    name: str
    about: str
    needs: Mapping[str, str]
    tracker: str
    without: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The script as it is called."""
        return f"{self.name}.py"


_ALWAYS = {
    "pretrained_model_name_or_path": "give the base model: a checkpoint file, a diffusers folder or a hub id",
    "output_dir": "give the folder for the results",
}
TRAIN_NETWORK = Script(
    "train_network",
    "Train a LoRA or another network on a Stable Diffusion model, on its own or together with embeddings",
    _ALWAYS | {"network_module": "give the network to train, such as networks.lora"},
    "network_train",
)
TRAIN_TEXTUAL_INVERSION = Script(
    "train_textual_inversion",
    "Train embeddings (textual inversion) for a Stable Diffusion model: the vectors of new words",
    _ALWAYS | {"token_string": "give the new word to train, such as mycat"},
    "textual_inversion",
    without=("network",),
    lacks=("unet_lr", "text_encoder_lr", "stop_text_encoder_training"),
    defaults={"save_model_as": "pt"},
)
SCRIPTS: Mapping[str, Script] = {one.name: one for one in (TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION)}
