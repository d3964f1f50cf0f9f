"""What must hold between options, and what must exist before a run starts. Folders are checked, never made.

Datasets and their sizes are checked where they are read (options.datasets).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from library.errors import Problem
from library.options import (
    embedding_checks,
    logging_checks,
    loss_checks,
    module_checks,
    modules,
    optimizer_checks,
    precision_checks,
    run_checks,
    state_checks,
)
from library.options.embedding_checks import always_trains_vectors, embedding_rate, has_network
from library.options.registry import FLAGS, Options
from library.options.scripts import SCRIPTS, TRAIN_TEXTUAL_INVERSION

_PICTURES = ("train_data_dir", "dataset_config", "in_json", "dataset_class")
_NOT_WITH_A_CLASS = (
    *("dataset_config", "in_json", "train_data_dir", "reg_data_dir", "cache_latents", "latent_sampling"),
    *("cache_text_encoder_outputs", "validation_split", "debug_dataset"),
)
_OF_A_CLASS = (
    *("dataset_class", "resolution", "train_batch_size", "weighted_captions", "persistent_data_loader_workers"),
    *("exact_crop_conditioning", "max_data_loader_n_workers"),
)
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_PROMPT_FILES = (".txt", ".toml", ".json")


_MODULES = (
    embedding_checks,
    optimizer_checks,
    loss_checks,
    module_checks,
    precision_checks,
    logging_checks,
    state_checks,
    run_checks,
)


@dataclass
class Checked:
    """What is wrong, and lines to show."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def check(options: Options, bad: frozenset[str], needs: Sequence[str]) -> Checked:
    """All checks; flags in `bad` have been complained about already and are taken as absent and harmless.

    `needs` are the flags that must be given, besides one that names pictures.
    """
    found = Checked()
    mentioned = {place for name in bad for place in (options.where(name), f"--{name}")}
    others = [module.problems for module in _MODULES]
    every: list[Callable[[Options], Iterator[Problem]]] = [partial(_required, needs=needs), *_CHECKS, *others]
    for one in every:
        found.problems.extend(problem for problem in one(options) if problem.where not in mentioned)
    found.notices.extend(_notices(options))
    for module in _MODULES:
        found.notices.extend(module.notices(options))
    return found


def _required(options: Options, needs: Sequence[str]) -> Iterator[Problem]:
    for name in needs:
        if options.value(name) is None:
            yield Problem(f"--{name}", "is missing", SCRIPTS[options.script].needs[name])
    if all(options.value(name) is None for name in _PICTURES):
        advice = "give the folder that holds 10_name folders of pictures, or use --dataset_config"
        yield Problem("--train_data_dir", "is missing", advice)


def _paths(options: Options) -> Iterator[Problem]:
    for name in ("output_dir", "logging_dir"):
        folder = options.value(name)
        if folder is not None:
            yield from _makeable(folder, options.where(name))
    weights = options.network.network_weights
    if weights is not None and not weights.is_file():
        yield Problem(options.where("network_weights"), f"there is no file {weights}")
    if options.network.dim_from_weights and weights is None:
        yield Problem(options.where("dim_from_weights"), "needs --network_weights")
    title = options.output.output_name
    if title is not None and (Path(title).name != title or title in (".", "..") or "\0" in title):
        yield Problem(options.where("output_name"), f"{title!r} is no file name", "the folder is --output_dir")
    resume = options.training.resume
    local = resume is not None and not options.hub.resume_from_huggingface
    if local and resume != "latest" and not _is_folder(str(resume)):
        yield _no_state(str(resume), options)


def _no_state(text: str, options: Options) -> Problem:
    """`--resume` without a folder."""
    wrong, advice = f"there is no state folder {text}", "give its path, or `latest`"
    if Path(text).suffix.lower() in WEIGHT_FILES:
        wrong = f"{text} is a file of weights, not the folder of a state"
        flag = "--network_weights (embeddings: --weights)" if has_network(options) else "--weights"
        advice = f"to start from these weights, give them as {flag}; a state is a folder, which --save_state writes"
    return Problem(options.where("resume"), wrong, advice)


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def _makeable(folder: Path, where: str) -> Iterator[Problem]:
    """A problem if `folder` neither is a writable folder nor could be made."""
    for ancestor in (folder, *folder.absolute().parents):
        if os.path.lexists(ancestor):
            break
    if not ancestor.exists():
        yield Problem(where, f"{folder} can't be made: {ancestor} is a link to nothing")
    elif not ancestor.is_dir():
        made = "is a file" if ancestor == folder else f"can't be made: {ancestor} is a file"
        yield Problem(where, f"{folder} {made}", "give a folder")
    elif not os.access(ancestor, os.W_OK | os.X_OK):
        yield Problem(where, f"{folder} can't be written: no permission in {ancestor}")


def _what_is_trained(options: Options) -> Iterator[Problem]:
    """A network must have a part to train; vectors are options.embedding_checks'."""
    network, rates = options.network, options.optimizer
    if not has_network(options):
        return
    advice = f"for embeddings alone: {TRAIN_TEXTUAL_INVERSION.file}" if options.embeddings.token_string else ""
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        places = f"{options.where('network_train_unet_only')}, {options.where('network_train_text_encoder_only')}"
        wrong = "nothing would be left to train"
        yield Problem(places, f"{wrong} of the network" if advice else wrong, advice or "leave out one of the two")
        return
    unet = rates.learning_rate if rates.unet_lr is None else rates.unet_lr
    trained = {"U-Net": unet, "text encoder": max(_text_rates(options))}
    if network.network_train_unet_only or options.training.stop_text_encoder_training == -1:
        del trained["text encoder"]
    if network.network_train_text_encoder_only:
        del trained["U-Net"]
    if not any(trained.values()):
        parts = " and ".join(trained)
        wrong = f"the learning rate of {parts} is 0: nothing would be trained"
        yield Problem(options.where("learning_rate"), f"{wrong} of the network" if advice else wrong, advice)


def _text_rates(options: Options) -> tuple[float, ...]:
    """The learning rates of the text encoders, as far as they were given."""
    return options.optimizer.text_encoder_lr or (options.optimizer.learning_rate,)


def _text_encoders_train(options: Options) -> bool:
    """Whether a network is trained on them; vectors of embeddings are another matter."""
    left_out = options.network.network_train_unet_only or options.training.stop_text_encoder_training == -1
    return has_network(options) and not left_out and any(_text_rates(options))


def _text_cache(options: Options) -> Iterator[Problem]:
    vectors = bool(embedding_rate(options))
    if not options.caching.cache_text_encoder_outputs or not (vectors or _text_encoders_train(options)):
        return
    to_disk = options.caching.cache_text_encoder_outputs_to_disk
    where = options.where("cache_text_encoder_outputs" + ("_to_disk" if to_disk else ""))
    if vectors:
        wrong = "what text encoders make of captions can't be cached while the vectors of --token_string are trained"
        yield Problem(where, wrong, "leave the cache out")
        return
    advice = "add --network_train_unet_only, or leave the cache out"
    if options.network.network_train_text_encoder_only:
        advice = "leave the cache out"
    yield Problem(where, "the outputs of text encoders that are trained can't be cached", advice)


def _network(options: Options) -> Iterator[Problem]:
    flags = options.network
    if flags.network_module is not None:
        yield from modules.check_module(flags.network_module, options.where("network_module"))
    yield from modules.check_network_args(flags.network_module, flags.network_args or (), options.where("network_args"))


def _previews(options: Options) -> Iterator[Problem]:
    flags = options.sampling
    asked = [
        name for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first") if options.value(name)
    ]
    prompts = flags.sample_prompts
    if asked and prompts is None and not flags.preview_prompts:
        advice = "add --sample_prompts FILE or --preview_prompts TEXT"
        yield Problem(options.where(asked[0]), "previews need prompts", advice)
    if prompts is None or not asked:
        return
    if not prompts.is_file():
        yield Problem(options.where("sample_prompts"), f"there is no file {prompts}")
    elif prompts.suffix.lower() not in _PROMPT_FILES:
        yield Problem(options.where("sample_prompts"), f"{prompts} is none of {', '.join(_PROMPT_FILES)}")


def _dataset_class(options: Options) -> Iterator[Problem]:
    given = options.dataset.dataset_class
    if given is None:
        return
    where = options.where("dataset_class")
    if "." not in given or not all(part.isidentifier() for part in given.split(".")):
        yield Problem(where, f"{given} is no package.module.Class")
    for name in _NOT_WITH_A_CLASS:
        if options.value(name) != FLAGS[name].default:
            yield Problem(options.where(name), "can't be used with --dataset_class", "leave out one of the two")


def _notices(options: Options) -> Iterator[str]:
    warmup, steps = options.optimizer.lr_warmup_steps, options.training.max_train_steps
    if isinstance(warmup, int) and options.training.max_train_epochs is None and warmup > steps:
        yield f"{options.where('lr_warmup_steps')}: {warmup} steps of warmup are more than all {steps} steps"
    if options.training.max_train_epochs is not None and "max_train_steps" in options.explicit:
        yield f"{options.where('max_train_steps')}: has no effect, because max_train_epochs counts"
    if options.dataset.dataset_class is not None:
        for name in sorted(options.explicit):
            if FLAGS[name].group == "dataset" and name not in (*_OF_A_CLASS, *_NOT_WITH_A_CLASS):
                yield f"{options.where(name)}: has no effect with --dataset_class, which gives ready batches"
    if options.network.dim_from_weights and options.network.network_dim is not None:
        yield f"{options.where('network_dim')}: has no effect, because dim_from_weights counts"
    if options.output.save_n_epoch_ratio and options.output.save_every_n_epochs:
        yield f"{options.where('save_every_n_epochs')}: has no effect, because save_n_epoch_ratio counts"
    if options.network.network_dropout is not None and "dropout" in options.network_arguments():
        yield f"{options.where('network_args')}: dropout has no effect, because network_dropout counts"
    if options.network.network_train_unet_only and any(options.optimizer.text_encoder_lr or ()):
        yield f"{options.where('text_encoder_lr')}: has no effect with --network_train_unet_only"
    if options.training.resume_schedule is not None and options.training.resume is None:
        yield f"{options.where('resume_schedule')}: has no effect without --resume"
    always = options.training.stop_text_encoder_training == 0
    if "text_memo_mb" in options.explicit and _text_encoders_train(options) and always:
        yield f"{options.where('text_memo_mb')}: has no effect while text encoders are trained"
    elif "text_memo_mb" in options.explicit and always_trains_vectors(options):
        yield f"{options.where('text_memo_mb')}: has no effect while embeddings are trained"
    sampling = options.sampling
    if not (sampling.sample_every_n_steps or sampling.sample_every_n_epochs or sampling.sample_at_first):
        for name in ("sample_prompts", "preview_prompts"):
            if options.value(name):
                yield f"{options.where(name)}: has no effect without --sample_every_n_epochs or _steps"


_CHECKS: tuple[Callable[[Options], Iterator[Any]], ...] = (
    _paths,
    _network,
    _what_is_trained,
    _text_cache,
    _previews,
    _dataset_class,
)
