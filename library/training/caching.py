"""Latents made before training, in memory or beside the pictures, as a run's options ask for them."""

import os

from library.data.caches.latents import LatentCache, LatentStore
from library.data.plan import Plan
from library.models.model import Model
from library.options import Options
from library.training.distributed import Processes


def cache_latents(options: Options, plan: Plan, model: Model, processes: Processes) -> LatentStore:
    """The latents of all pictures of a plan; only what is missing is encoded.

    Raises:
        UserError: pictures can't be decoded, a file can't be written, or the VAE gave NaN.
    """
    caching = options.caching
    sampling = caching.latent_sampling
    return LatentCache.build(
        plan,
        lambda pixels: model.encode_images(pixels, moments=sampling == "sample"),
        vae_id=model.vae_id(),
        to_disk=caching.cache_latents_to_disk,
        vae_batch_size=caching.vae_batch_size,
        dtype=str(model.vae_dtype).removeprefix("torch."),
        channels=latent_channels(model),
        kind=model.family.latents_kind,
        sampling=sampling,
        trust_foreign=caching.trust_foreign_caches == "yes",
        skip_check=caching.skip_cache_check,
        threads=min(options.dataset.max_data_loader_n_workers, os.cpu_count() or 1),
        rank=processes.rank,
        world_size=processes.count,
        wait=processes.wait,
        exchange=processes.exchange,
    )


def latent_channels(model: Model) -> int:
    """Channels of the model's latents."""
    return int(model.info.vae_config.get("latent_channels", 4))
