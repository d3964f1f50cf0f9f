"""A run that only makes caches, or looks after them: what tools/cache_*.py share.

They take the flags of train_network.py, so that a training with the same flags finds its caches. Under
`accelerate launch` several processes share the work.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from library import console
from library.data.caches.upkeep import TEXT_ENDINGS, Finding, endings, prune, report
from library.data.plan import Plan
from library.errors import UserError
from library.options import Options, parse
from library.training.embedding_plan import plan_embeddings
from library.training.launcher import available_cores, prepare_cpu_threads
from library.training.prepare_data import PreparedData, prepare_caching

What = Literal["latents", "text"]
_NEEDS = ("pretrained_model_name_or_path",)
_FLAGS: dict[What, tuple[str, ...]] = {
    "latents": ("--cache_latents_to_disk",),
    "text": ("--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"),
}


@dataclass(frozen=True)
class Job:
    """What to do with the caches of a kind; without `verify`, `prune` or `dry_run` they are made.

    `others`: prune also what only this command line doesn't want.
    """

    what: What
    verify: bool
    prune: bool
    others: bool
    dry_run: bool

    @property
    def makes(self) -> bool:
        """Whether caches are made."""
        return not (self.verify or self.prune or self.dry_run)


def main(what: What, arguments: Sequence[str], description: str) -> int:
    """Run a tool. Returns the exit code: 0, 1 (`--verify` found files that can't be used), 2 (bad input), 130."""
    parser = argparse.ArgumentParser(
        description=description, epilog="All other flags are those of train_network.py.", allow_abbrev=False
    )
    parser.add_argument(
        "--verify", action="store_true", help="read and judge every file that is wanted; change nothing"
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="delete files of lorasmith that no run can use any more: those of pictures that are gone or have changed, "
        "damaged ones, and temporary ones that were left. Files for other resolutions, models or captions of pictures "
        "that are there stay, and so do those of pictures that can't be read",
    )
    parser.add_argument(
        "--prune_others",
        action="store_true",
        help="with that, delete all other files of lorasmith, too, that a training with these very flags would not use",
    )
    parser.add_argument("--dry_run", action="store_true", help="only say what would be made, or deleted")
    old = parser.add_argument_group("flags of sd-scripts' tools")
    old.add_argument("--sdxl", action="store_true", help="checked: families are read")
    old.add_argument("--skip_existing", action="store_true", help="nothing to do: files that are good always stay")
    old.add_argument("--flux", action="store_true", help="refused: FLUX isn't trained here")
    if what == "text":
        old.add_argument("--t5xxl_dtype", metavar="DTYPE", help="nothing to do: no model here has a T5")
    own, rest = parser.parse_known_args(arguments)
    console.prepare_streams()
    job = Job(what, own.verify, own.prune or own.prune_others, own.prune_others, own.dry_run)
    try:
        if own.flux:
            raise UserError.single("--flux", "FLUX isn't trained here", "SD1, SD2 and SDXL are")
        options = parse([*rest, *_FLAGS[what]], _NEEDS)
        return _run(job, options, own)
    except UserError as error:
        return console.complain(error)
    except KeyboardInterrupt:
        console.say("stopped; what was cached stays")
        return 130


def _run(job: Job, options: Options, own: argparse.Namespace) -> int:
    first = os.environ.get("RANK", "0") == "0"
    console.set_level(options.config.console_log_level or "INFO" if first else "ERROR")
    prepared = prepare_caching(options)
    if own.sdxl and prepared.model.family.name != "sdxl":
        wrong = f"{options.model.pretrained_model_name_or_path} is an {prepared.model.family.title} model"
        raise UserError.single("--sdxl", wrong, "leave the flag out")
    if own.skip_existing:
        console.say("--skip_existing: nothing to do, files that are good always stay")
    if getattr(own, "t5xxl_dtype", None) is not None:
        console.say("--t5xxl_dtype: nothing to do, no model here has a T5")
    for line in prepared.notices:
        console.say(line)
    if not (job.makes or first):
        return 0
    prepare_cpu_threads()
    plan = prepared.data.everything
    work = _latents if job.what == "latents" else _texts
    findings, ending = work(job, prepared, plan)
    code = report(findings) if job.verify or not (job.makes or job.prune) else 0
    if job.prune:
        prune(plan, findings, ending, others=job.others, dry_run=job.dry_run)
    return code if job.verify else 0


def _latents(job: Job, prepared: PreparedData, plan: Plan) -> tuple[list[Finding], tuple[str, ...]]:
    from library.data.caches.slots import Recipe
    from library.data.caches.upkeep import look_at_latents
    from library.training.caching import cache_latents, latent_channels
    from library.training.distributed import join_processes
    from library.training.loading import load_model

    options, processes = prepared.options, join_processes()
    model = load_model(options, prepared.model, processes, with_unet=False, with_text_encoders=False)
    if job.makes:
        cache_latents(options, plan, model, processes)
        return [], ()
    recipe = Recipe(
        model.vae_id(),
        str(model.vae_dtype).removeprefix("torch."),
        latent_channels(model),
        model.family.latents_kind,
        options.caching.latent_sampling,
    )
    trust = options.caching.trust_foreign_caches == "yes"
    found = look_at_latents(plan, recipe, trust_foreign=trust, threads=available_cores(), afresh=job.verify)
    return found, endings(recipe.kind)


def _texts(job: Job, prepared: PreparedData, plan: Plan) -> tuple[list[Finding], tuple[str, ...]]:
    from library.data.caches.text import TextStore
    from library.data.caches.upkeep import look_at_texts
    from library.data.caption_plan import plan_captions
    from library.training.distributed import join_processes
    from library.training.embedding_vectors import make_vectors
    from library.training.loading import load_model
    from library.training.text import caption_files

    embeddings = plan_embeddings(prepared.options, prepared.model)
    processes = join_processes()
    model = load_model(prepared.options, prepared.model, processes, with_unet=False, with_vae=False)
    if embeddings is not None:
        make_vectors(embeddings, model, seed=0)
    captions = plan_captions(plan)
    files = caption_files(captions, model)
    if captions.varying:
        console.say(f"text: captions of {len(captions.varying)} pictures vary, so that no file can hold them")
    if not job.makes:
        return look_at_texts(files, threads=available_cores(), afresh=job.verify), TEXT_ENDINGS
    store = TextStore(model.encode_prompts, memo_bytes=0, files=files)
    store.fill(
        files.files,
        threads=available_cores(),
        rank=processes.rank,
        world_size=processes.count,
        wait=processes.wait,
    )
    console.say(f"text: {len(files.files)} captions in files, {store.encodings} encoded now")
    return [], ()
