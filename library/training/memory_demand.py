"""What of a run decides how much memory it needs, read from its options, its data and the base model's configs.

What that comes to is library.training.memory_plan's. Imports no torch.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from library.data.caption_plan import plan_captions
from library.data.custom import CustomPlan
from library.data.plan import Plan
from library.models.info import ModelInfo
from library.models.lora_targets import Shape, parameter_count, targets
from library.models.memory_tables import Checkpointing, unet_weights
from library.options import Options
from library.options.modules import pairs
from library.options.optimizer_checks import chosen_optimizer
from library.tokenizer import WORDS
from library.training.expected import expected_modules, vector_shapes
from library.training.learning_rates import LearningRates
from library.training.prepare import Prepared
from library.training.text_use import text_use

Device = Literal["cpu", "cuda"]

_ITEMS = {"no": 4, "fp16": 2, "bf16": 2}
_FOREIGN_DIM = 4
_WHOLE_WEIGHTS = {"no": 4.0, "fp16": 5.0, "bf16": 5.0}
"""Bytes that a network which remakes weights keeps for each number of them (measured with LyCORIS' LoRA)."""
STATE_BYTES: Mapping[str, float] = {
    **dict.fromkeys(("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adadelta", "Rprop", "PagedAdamW"), 8),
    **dict.fromkeys(("PagedAdamW32bit", "AdamWScheduleFree", "RAdamScheduleFree", "DAdaptLion"), 8),
    **dict.fromkeys(("Lion", "SGDNesterov", "Adagrad", "RMSprop", "Muon", "SGDScheduleFree"), 4),
    **dict.fromkeys(("ASGD",), 4),
    **dict.fromkeys(("AdamW8bit", "PagedAdamW8bit"), 2),
    **dict.fromkeys(("Lion8bit", "PagedLion8bit", "SGDNesterov8bit"), 1),
    **dict.fromkeys(("DAdaptAdam", "DAdaptAdaGrad", "DAdaptSGD", "DAdaptAdamPreprint"), 12),
    **dict.fromkeys(("DAdaptAdan", "DAdaptAdanIP"), 20),
    "Prodigy": 16,
    "SGD": 0,
    "Adafactor": 0.5,
}
"""Bytes of state that an optimizer keeps for each trained number, by `--optimizer_type`."""
_UNKNOWN_STATE = 8.0
_SAME_STATE = frozenset({"betas", "eps", "weight_decay"})
"""Settings of optimizers that make no difference to what they keep."""
_WHOLE_STATE_BELOW = 4096
"""Of tensors with fewer numbers, optimizers of 8 bits keep a state of 32 bits (bitsandbytes' `min_8bit_size`)."""


@dataclass(frozen=True)
class Demand:
    """What of a run decides how much memory it needs.

    Attributes:
        item, vae_item: bytes of a number in the frozen parts, and in the VAE.
        bucket: (width, height) in pixels of the batch that needs most, and `batch`: how many samples it has.
        fp8_unet, fp8_text: frozen matrices are kept in 8 bits.
        parameters: trained numbers of the network; `state_bytes` of the optimizer for each.
        vectors: trained numbers of new tokens' vectors, which stand in float32 whatever the rest is kept in.
        halves: what is trained is kept in 16 bits, too.
        rank, conv_rank: of the U-Net's adapters; 0 where it has none.
        whole_weights: bytes of the weights that the network makes anew in each forward pass, as those of other
            projects do, and keeps for the backward pass.
        outputs: its adapters keep their layers' results, as DoRA does.
        trains_text, releases_text: text encoders train, or vectors that go through them; they are let go before the
            first step. `adapts_text`: they have adapters.
        offloads_text: frozen text encoders are on the device only while they encode.
        offloads_previews: previews have the device for themselves but for what they need.
        cached_latents: the VAE is let go before the first step. `latents_bytes`, `text_bytes`: kept in main memory.
        largest: pixels of the largest picture that is encoded.
        preview: (width, height) in pixels of the largest preview; None without.
        vae_batch: pictures that the VAE encodes at a time, on a GPU.
        processes: on this machine.
    """

    model: ModelInfo
    device: Device
    item: int
    vae_item: int
    bucket: tuple[int, int]
    batch: int
    tokens: int
    parameters: int
    state_bytes: float
    rank: int
    conv_rank: int
    trains_text: bool
    releases_text: bool
    cached_latents: bool
    largest: int
    vectors: int = 0
    adapts_text: bool = False
    halves: bool = False
    whole_weights: int = 0
    outputs: bool = False
    checkpointing: Checkpointing = "none"
    every: int = 1
    fp8_unet: bool = False
    fp8_text: bool = False
    offloads_text: bool = False
    offloads_previews: bool = False
    latents_bytes: int = 0
    text_bytes: int = 0
    preview: tuple[int, int] | None = None
    vae_batch: int = 1
    processes: int = 1


def demand_of(prepared: Prepared) -> Demand:
    """What of a prepared run decides how much memory it needs."""
    options, model = prepared.options, prepared.model
    flags, caching, text = options.model, options.caching, text_use(prepared)
    item = _ITEMS[flags.mixed_precision]
    fragile = flags.mixed_precision == "fp16" and model.vae_fragile
    bucket, batch = _largest_batch(prepared.plan)
    pictures = prepared.data.everything
    largest = max((fit.bucket[0] * fit.bucket[1] for fit in pictures.fits), default=bucket[0] * bucket[1])
    shape = _shape(options, model, prepared.rates)
    steady = text.ahead and not text.to_disk
    kept = text.caption_bytes * len(pictures.records)
    return Demand(
        model=model,
        device=assumed_device(),
        item=item,
        vae_item=4 if flags.no_half_vae or fragile else item,
        bucket=bucket,
        batch=batch,
        tokens=(flags.max_token_length or WORDS) + 2,
        parameters=shape.parameters,
        state_bytes=STATE_BYTES.get(chosen_optimizer(options), _UNKNOWN_STATE),
        rank=shape.rank,
        conv_rank=shape.conv_rank,
        trains_text=text.trains,
        releases_text=text.ahead and not (options.network.base_weights or _captions_vary(prepared)),
        cached_latents=caching.cache_latents,
        largest=largest,
        adapts_text=any(prepared.rates.text_encoders),
        vectors=sum(map(prod, vector_shapes(model, prepared.embeddings))),
        halves=flags.full_bf16 or flags.full_fp16,
        whole_weights=shape.whole_weights,
        outputs=shape.outputs,
        checkpointing=_checkpointing(options),
        every=flags.gradient_checkpointing_every,
        fp8_unet=flags.fp8_base or flags.fp8_base_unet,
        fp8_text=flags.fp8_base,
        offloads_text=flags.offload_text_encoders and not text.trains,
        offloads_previews=flags.offload_during_sampling,
        latents_bytes=_latents_in_memory(options, model, pictures),
        text_bytes=0 if text.trains else kept if steady else min(text.memo_bytes, kept),
        preview=_largest_preview(prepared),
        vae_batch=caching.vae_batch_size,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def vector_state(options: Options, shapes: Sequence[Shape]) -> int | None:
    """Bytes of what the optimizer keeps for tensors of these shapes; None where that isn't known exactly, as with other
    projects' optimizers, factored states, and settings that may add to it."""
    name = chosen_optimizer(options)
    if name not in STATE_BYTES or STATE_BYTES[name] % 1:
        return None
    sizes = [prod(shape) for shape in shapes]
    given, _ = pairs(options.optimizer.optimizer_args or (), "--optimizer_args")
    in_8_bits = name.endswith("8bit")
    if given.keys() - _SAME_STATE or (in_8_bits and max(sizes, default=0) >= _WHOLE_STATE_BELOW):
        return None
    return int(sum(sizes) * STATE_BYTES[name] * (4 if in_8_bits else 1))


def assumed_device(
    environment: Mapping[str, str] | None = None, gpus: Path = Path("/proc/driver/nvidia/gpus")
) -> Device:
    """Where the run will compute, as far as that can be seen without torch: on an NVIDIA GPU where there is one."""
    known = os.environ if environment is None else environment
    if known.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return "cpu"
    if known.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return "cpu"
    return "cuda" if gpus.is_dir() and any(gpus.iterdir()) else "cpu"


def _captions_vary(prepared: Prepared) -> bool:
    return bool(plan_captions(prepared.data.everything, total_steps=prepared.clock.total_updates).varying)


def _checkpointing(options: Options) -> Checkpointing:
    if not options.model.gradient_checkpointing:
        return "none"
    return "attention" if options.model.gradient_checkpointing_attention_only else "all"


def _largest_batch(plan: Plan) -> tuple[tuple[int, int], int]:
    """The bucket whose largest batch has most pixels, and how many samples of it one process has."""
    found = [
        (bucket, -(-min(len(samples), plan.global_batch_size(number)) // plan.processes))
        for number, dataset in enumerate(plan.datasets)
        for bucket, samples in dataset.samples.items()
    ]
    if not found or isinstance(plan, CustomPlan):
        spec = plan.datasets[0].spec
        return spec.resolution, spec.batch_size
    return max(found, key=lambda one: one[0][0] * one[0][1] * one[1])


def _largest_preview(prepared: Prepared) -> tuple[int, int] | None:
    if not prepared.prompts:
        return None
    model = prepared.model
    side = int(model.unet_config.get("sample_size") or 0) * model.vae_factor if model.layout == "folder" else 0
    side = side or model.family.sides[model.prediction_type or "epsilon"]
    sizes = [(prompt.width or side, prompt.height or side) for prompt in prepared.prompts]
    return max(sizes, key=lambda size: size[0] * size[1])


def _latents_in_memory(options: Options, model: ModelInfo, plan: Plan) -> int:
    """Latents in float32, their mirror images and log-variances where a run wants them."""
    if not options.caching.cache_latents or options.caching.cache_latents_to_disk:
        return 0
    channels = int(model.vae_config.get("latent_channels", 4)) * (1 + (options.caching.latent_sampling == "sample"))
    total = 0
    for record, fit in zip(plan.records, plan.fits, strict=True):
        flips = plan.datasets[record.dataset].spec.subsets[record.subset].flip_aug
        cells = (fit.bucket[0] // model.vae_factor) * (fit.bucket[1] // model.vae_factor)
        total += cells * channels * 4 * (1 + flips)
    return total


@dataclass(frozen=True)
class _Shape:
    """Of a network: its trained numbers, its largest ranks in the U-Net, bytes of the weights that it remakes, and
    whether magnitudes are trained, for which it keeps results."""

    parameters: int
    rank: int
    conv_rank: int
    whole_weights: int
    outputs: bool = False


def _shape(options: Options, model: ModelInfo, rates: LearningRates) -> _Shape:
    network, parts = options.network, rates.trained
    found = expected_modules(options, model, rates)
    each = _WHOLE_WEIGHTS[options.model.mixed_precision]
    if found is None:
        chosen = targets(model.unet_config, model.text_encoder_configs, conv=False, unet_key=model.family.unet_key)
        dim = network.network_dim or _FOREIGN_DIM
        remade = unet_weights(model.unet_config).matrices if "unet" in parts else 0
        numbers = parameter_count([one for one in chosen if one.part in parts], dim)
        return _Shape(numbers, dim if "unet" in parts else 0, 0, int(remade * each))
    unet = [one for one in found if one.target.part == "unet"]
    own = network.network_module == "networks.lora"
    remade = sum(prod(one.target.shapes(1)[0]) * one.target.out_features for one in unet)
    return _Shape(
        sum(one.parameters for one in found),
        max((one.rank for one in unet if not one.target.conv_only), default=0),
        max((one.rank for one in unet if one.target.kernel == "3x3"), default=0),
        int(remade * each) if network.network_module == "networks.oft" else 0,
        any(one.parameters > sum(map(prod, one.target.shapes(one.rank))) for one in unet if own),
    )
