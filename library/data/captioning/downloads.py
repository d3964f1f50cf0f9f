"""Models by their names on the Hugging Face hub, for captioning: from a folder of downloads, the hub's cache, the hub.

Base models come through library.models.hub; these are no base models.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from library.console import say
from library.errors import UserError

Choose = Callable[[Sequence[str]], list[str]]
"""Out of the names of all files of a model, those that are needed; none where it isn't what is looked for."""


def looks_like_id(name: str) -> bool:
    """Whether a name may be one of the hub's, `owner/name`, rather than a path that isn't there."""
    return 1 <= name.count("/") <= 2 and not name.startswith(("/", ".", "~")) and "\\" not in name


def download(name: str, choose: Choose, flag: str, *, folder: Path | None = None, force: bool = False) -> Path:
    """The folder that holds a model's files after what it lacks was downloaded.

    Args:
        name: `owner/name`.
        folder: where the files go; None: the hub's cache.
        force: download what is there already, too.

    Raises:
        UserError: no such model, no network, it isn't what is looked for, or it can't be written.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        wrong = f"{name} is not here, and HF_HUB_OFFLINE forbids to download it"
        raise UserError.single(flag, wrong, "unset HF_HUB_OFFLINE, or give the folder of a downloaded model")
    place = Path()
    try:
        api = HfApi()
        chosen = choose([sibling.rfilename for sibling in api.model_info(name).siblings or ()])
        if not chosen:
            raise UserError.single(flag, f"{name} on the hub holds none of the files that are needed")
        say(f"{flag} {name}: downloading what isn't here of {len(chosen)} files")
        more: dict[str, Any] = {} if folder is None else {"local_dir": folder}
        for file in chosen:
            here = Path(api.hf_hub_download(name, file, force_download=force, **more))
            place = here.parents[file.count("/")]
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        wrong = f"{name} is not here and can't be downloaded ({reason})"
        advice = "check the spelling and the network, or give the folder of a downloaded model"
        raise UserError.single(flag, wrong, advice) from error
    return place


def cached(name: str, file: str) -> Path | None:
    """The place of a model's file in the hub's cache; None if it isn't there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
