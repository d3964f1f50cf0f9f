"""Checks of how long a run is, where it starts, and what ends it."""

from collections.abc import Iterator

from library.errors import Problem
from library.options.embedding_checks import always_trains_vectors
from library.options.registry import Options

_STARTS = ("initial_step", "initial_epoch")


def _typed(options: Options, name: str) -> bool:
    """Whether a flag stands on the command line, not in a file."""
    return options.where(name).startswith("--")


def problems(options: Options) -> Iterator[Problem]:
    """Where a run can't start where it is told to, or nothing of the text encoders would be trained as told."""
    training, network = options.training, options.network
    for name in _STARTS:
        if options.value(name) is not None and training.resume is not None and _typed(options, name):
            wrong = "can't be combined with --resume, which goes on exactly where the state was saved"
            yield Problem(options.where(name), wrong, "leave out one of the two")
    stop = training.stop_text_encoder_training
    if stop == -1 and network.network_train_text_encoder_only:
        wrong = "-1 leaves the text encoders out, and --network_train_text_encoder_only the rest"
        yield Problem(options.where("stop_text_encoder_training"), wrong, "leave out one of the two")
    rates = options.optimizer
    unet = rates.learning_rate if rates.unet_lr is None else rates.unet_lr
    alone = network.network_train_text_encoder_only or not unet
    if stop > 0 and alone and not always_trains_vectors(options):
        wrong = "nothing would be trained after it, because the U-Net's part is left out"
        yield Problem(options.where("stop_text_encoder_training"), wrong, "end the run there: --max_train_steps")


def notices(options: Options) -> Iterator[str]:
    """Lines about flags that find nothing to work on."""
    training = options.training
    for name in _STARTS:
        if options.value(name) is not None and training.resume is not None and not _typed(options, name):
            yield f"{options.where(name)}: has no effect with --resume, which goes on where the state was saved"
    stop = training.stop_text_encoder_training
    if stop > 0 and options.network.network_train_unet_only:
        yield f"{options.where('stop_text_encoder_training')}: has no effect with --network_train_unet_only"
    elif isinstance(stop, int) and training.max_train_epochs is None and stop >= training.max_train_steps:
        yield f"{options.where('stop_text_encoder_training')}: has no effect, the run ends at or before step {stop}"
    if training.initial_epoch is not None and training.initial_step is not None:
        yield f"{options.where('initial_epoch')}: has no effect, because initial_step counts"
    sampling = options.sampling
    if sampling.sample_images_per_prompt > 1 and not (sampling.sample_prompts or sampling.preview_prompts):
        where = options.where("sample_images_per_prompt")
        yield f"{where}: has no effect without --sample_prompts or --preview_prompts"
