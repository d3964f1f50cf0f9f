"""Models by their name on the Hugging Face hub; torch-free. Models come through nothing else.

What the local cache holds is used without asking; only what is missing of the files that a run reads is downloaded.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from library.console import say
from library.errors import UserError
from library.models import folder

Wanted = Callable[[Collection[str], Mapping[str, Any]], list[str] | None]
_ELSEWHERE = "or download the model and give its folder or .safetensors file"


def fetch(name: str, wanted: Wanted, flag: str) -> Path:
    """The folder of a hub model in the hub's cache, after what it lacks was downloaded, with the client's bars.

    Whatever the hub's client raises, whose kinds differ by version and transport, becomes one message.

    Args:
        name: `owner/name`.
        wanted: out of the names of all files, those that are needed, with indexes of sharded weights; None where
            they don't make up a model. It also gets the cached `model_index.json`, which tells what should be there.

    Raises:
        UserError: no such model, no access, no network, or not what is wanted.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return _cached(name, wanted, flag) or _download(name, wanted, flag)
    except UserError:
        raise
    except GatedRepoError as error:
        wrong = f"the hub gives {name} only to people who accepted its terms"
        advice = f"accept them at {constants.ENDPOINT}/{name} and log in with `hf auth login`, {_ELSEWHERE}"
        raise UserError.single(flag, wrong, advice) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        wrong = f"{name} is neither a file nor a folder here, nor a model on the hub that is open to you"
        raise UserError.single(flag, wrong, "check the spelling; private models need `hf auth login`") from error
    except HfHubHTTPError as error:
        wrong = f"the hub answers {getattr(error.response, 'status_code', 'an error')} for {name}"
        raise UserError.single(flag, wrong, f"try again later, {_ELSEWHERE}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        wrong = f"{name} is not here and can't be downloaded ({reason})"
        raise UserError.single(flag, wrong, f"check the network and the disk's space, {_ELSEWHERE}") from error


def base_files(variant: str | None, skipped: Collection[str] = ()) -> Wanted:
    """What is wanted of a whole base model, without the parts `skipped`."""

    def wanted(names: Collection[str], index: Mapping[str, Any]) -> list[str] | None:
        if "unet/config.json" not in names or not _promised(index) <= set(names):
            return None
        found = [name for name in (folder.INDEX, folder.SCHEDULER) if name in names]
        for part in folder.PARTS:
            if f"{part}/config.json" in names:
                weights = folder.weight_file(_inside(names, part), part, variant)
                found.append(f"{part}/config.json")
                if part in skipped:
                    continue
                if weights is None:
                    return None
                found.append(f"{part}/{weights}")
        return found

    return wanted


def _promised(index: Mapping[str, Any]) -> set[str]:
    """The configs that a `model_index.json` tells of."""
    configs: dict[str, str] = {part: f"{part}/config.json" for part in folder.PARTS}
    configs["scheduler"] = folder.SCHEDULER
    return {config for part, config in configs.items() if (index.get(part) or [None])[0]}


def vae_files(names: Collection[str], _index: Mapping[str, Any]) -> list[str] | None:
    """What is wanted of a VAE, be it alone or within a whole model, whose U-Net's config tells the family."""
    place = "vae/" if "vae/config.json" in names else ""
    weights = folder.weight_file(_inside(names, place.rstrip("/")), "vae", None)
    if f"{place}config.json" not in names or weights is None:
        return None
    told = [name for name in ("unet/config.json",) if name in names]
    return [f"{place}config.json", f"{place}{weights}", *told]


def _inside(names: Collection[str], part: str) -> set[str]:
    """The names directly in one of a model's folders."""
    place = f"{part}/" if part else ""
    return {name.removeprefix(place) for name in names if name.startswith(place) and "/" not in name[len(place) :]}


def _cached(name: str, wanted: Wanted, flag: str) -> Path | None:
    """The folder in the cache, if it holds all that is wanted."""
    from huggingface_hub import try_to_load_from_cache

    for known in (folder.INDEX, "unet/config.json", "vae/config.json", "config.json"):
        found = try_to_load_from_cache(name, known)
        if isinstance(found, str):
            place = Path(found).parents[known.count("/")]
            files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
            chosen = wanted(files, folder.read_json(place / folder.INDEX, flag))
            return place if chosen and _with_shards(place, chosen, flag) <= files else None
    return None


def _with_shards(place: Path, chosen: list[str], flag: str) -> set[str]:
    """The chosen files, and those that chosen indexes name."""
    found = set(chosen)
    for index in (name for name in chosen if ".index" in name):
        found |= {(Path(index).parent / shard).as_posix() for shard in folder.shards(place / index, flag)}
    return found


def _download(name: str, wanted: Wanted, flag: str) -> Path:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        wrong = f"{name} is neither here nor complete in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
        raise UserError.single(flag, wrong, f"unset HF_HUB_OFFLINE, {_ELSEWHERE}")
    api = HfApi()
    names = {sibling.rfilename for sibling in api.model_info(name).siblings or ()}
    chosen = wanted(names, {})
    if chosen is None:
        raise _not_a_model(name, names, flag)
    say(f"{flag} {name}: downloading from the hub what its cache lacks of {len(chosen)} files")
    place = Path()
    for file in chosen:
        here = Path(api.hf_hub_download(name, file))
        place = here.parents[file.count("/")]
        if ".index" in file:
            for shard in folder.shards(here, flag):
                api.hf_hub_download(name, (Path(file).parent / shard).as_posix())
    return place


def _not_a_model(name: str, names: Collection[str], flag: str) -> UserError:
    weights = sorted(file for file in names if file.endswith((".safetensors", ".ckpt", ".bin")))
    there = f"there is {', '.join(weights[:6])}" if weights else "it holds no weights"
    return UserError.single(flag, f"{name} holds no diffusers model with the weights that are asked for", there)
