"""A loaded base model: pictures to latents, captions to conditioning, noisy latents to predictions.

What families share stands here; `sd1`, `sd2` and `sdxl` add what is special to each. Loss, noise and adapters are not
this module's business.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from library.conditioning import Conditioning
from library.console import say
from library.models import fp8, samplers
from library.models.checkpointing import checkpoint_text_encoder, checkpoint_unet
from library.models.compiling import compile_blocks, uncompiled
from library.models.families import Part, PredictionType
from library.models.info import ModelInfo
from library.models.joined import Vectors, checked, join, token_embedding
from library.models.memory import give_back
from library.models.offload import KeptInRam
from library.models.parts import load_part
from library.models.prompts import TextStates, encode_rows, token_rows, weighted_rows
from library.models.schedule import alphas_cumprod
from library.to_device import to_device
from library.tokenizer import WORDS
from library.tokenizer.vocabulary import PLAIN, Vocabulary

if TYPE_CHECKING:
    from library.models.preview import PreviewPipeline

_CHUNK_PIXELS = 2 * 512 * 512


class Model(ABC):
    """Frozen U-Net and text encoders in one dtype, VAE in another, all on one device but for what is kept in RAM.

    Attributes:
        latent_scale: what posterior means are multiplied by before noise is added.
        vae_factor: pixels per latent cell, along a side.
        alphas_cumprod: (1000,) float64, on the CPU, as trained; its last is 0 with zero terminal SNR.
        zero_terminal_snr: the schedule ends in pure noise.
        prediction_type: "epsilon" or "v_prediction".
        vae: None after `release_vae`; text_encoders: () after `release_text_encoders`.
        vocabulary: what captions' words are looked up in: CLIP's own, until `join_embeddings`.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        unet: torch.nn.Module,
        text_encoders: tuple[torch.nn.Module, ...],
        vae: torch.nn.Module | None,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        clip_skip: int | None,
        max_token_length: int | None,
        weighted: bool,
    ) -> None:
        self.info, self.family = info, info.family
        self.device, self.dtype, self.vae_dtype = device, dtype, vae_dtype
        self.unet, self.vae, self.text_encoders = unet, vae, text_encoders
        self.clip_skip, self.max_words, self.weighted = clip_skip, max_token_length or WORDS, weighted
        self.prediction_type: PredictionType = info.prediction_type or "epsilon"
        self.vae_factor = info.vae_factor
        self.latent_scale = float(info.vae_config.get("scaling_factor", self.family.latent_scale))
        self.alphas_cumprod = alphas_cumprod(info.scheduler_config)
        self.zero_terminal_snr = info.zero_terminal_snr
        self.text_widths = info.text_widths
        self._exact_vae: torch.nn.Module | None = None
        self._overflow_told = False
        self._autocasts = self._compiled = self._text_in_fp8 = self._text_in_ram = False
        self._checkpointing: int | None = None
        self._kept_text: KeptInRam | None = None
        self._ids: dict[str, str] = {}
        self.vocabulary: Vocabulary = PLAIN
        self._joined: Vectors = ((),) * len(self.text_widths)

    @property
    def base_model_version(self) -> str:
        """The family's name in metadata."""
        return self.family.versions[self.prediction_type]

    @property
    def native_side(self) -> int:
        """The side in pixels that it was made for: as a folder says; files don't, so their family decides."""
        told = self.info.unet_config.get("sample_size") if self.info.layout == "folder" else None
        return int(told) * self.vae_factor if told else self.family.sides[self.prediction_type]

    @property
    def network_text_encoder(self) -> torch.nn.Module | list[torch.nn.Module]:
        """What a network module's `create_network` gets as its text encoder: the bare module, or a list of several."""
        encoders = self.reload_text_encoders()
        return list(encoders) if len(encoders) > 1 else encoders[0]

    def enable_gradient_checkpointing(self, every: int = 1, attention_only: bool = False) -> None:
        """Recompute activations in the backward pass: all, or those of every n-th block, or of the U-Net's attention
        blocks only. Puts the modules into train mode, which nothing in them acts on but checkpointing: they are built
        without dropout."""
        self._checkpointing = every
        checkpoint_unet(self.unet, every, attention_only)
        for text_encoder in self.text_encoders:
            checkpoint_text_encoder(text_encoder, every)

    def store_in_fp8(self, *, unet: bool, text_encoders: bool) -> int:
        """Keep frozen weights in 8 bits from now on, also those that are read later; compute as before. Weights that
        are merged into the model must be in it by now. Returns the bytes saved."""
        saved = fp8.store(self.unet) if unet else 0
        self._text_in_fp8 = text_encoders
        if text_encoders:
            saved += sum(fp8.store(one) for one in self.text_encoders)
            self._ids.pop("text", None)
            self._settle_text_encoders()
        return saved

    def keep_text_encoders_in_ram(self) -> None:
        """Text encoders are on the device only from when they encode until something else computes. Not for those that
        train."""
        self._text_in_ram = True
        self._settle_text_encoders()

    def _settle_text_encoders(self) -> None:
        """Where text encoders are kept in RAM, take them there as they are now."""
        if self._text_in_ram and self.text_encoders:
            self._kept_text = KeptInRam(self.text_encoders, self.device)

    def compile_unet(self, backend: str) -> int:
        """Compile the U-Net's blocks, for what runs with gradients. Returns how many there are."""
        self._compiled = True
        return compile_blocks(self.unet, backend)

    def suit_foreign_networks(self) -> None:
        """Compute under autocast from now on, and lay weights out plainly: networks of other projects don't follow the
        dtype of what they are given, and write tensors to files as they lie in memory."""
        self._autocasts = True
        self.unet.to(memory_format=torch.contiguous_format)

    def _autocast(self) -> torch.autocast:
        wanted = self._autocasts and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if wanted else None, enabled=wanted)

    @abstractmethod
    def encode_prompts(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of captions in the model's dtype: states (b, n * 75 + 2, d) and, where the family has them,
        pooled outputs (b, p). Differentiable; released text encoders are read again."""

    def _text_states(
        self, index: int, captions: Sequence[str], layer: int, *, norm: bool
    ) -> tuple[TextStates, torch.Tensor]:
        """The states of one encoder as `encode_rows` has them, and the token rows (b, n, 77) on the device."""
        encoder, pad_id = self.reload_text_encoders()[index], self.family.text_encoders[index].pad_id
        if self._kept_text is not None:
            self._kept_text.bring()
        weights = None
        if self.weighted:
            rows, weights = weighted_rows(captions, self.max_words, pad_id, self.vocabulary)
            weights = to_device(weights, self.device)
        else:
            rows = token_rows(captions, self.max_words, pad_id, self.vocabulary)
        rows = to_device(rows, self.device)
        with self._autocast():
            return encode_rows(encoder, rows, layer, norm=norm, weights=weights), rows

    def predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor | None = None
    ) -> Tensor:
        """What the U-Net predicts (noise or velocity), (b, c, h, w) float32.

        Args:
            noisy: (b, c, h, w) of any dtype; timesteps: (b,) int64; conditioning: from `encode_prompts`.
            sizes: (b, 6) in pixels, of families that take sizes: original height and width, crop top and left, target
                height and width. None stands for a picture of the latents' size, not cropped.
        """
        self.done_encoding()
        eager = uncompiled() if self._compiled and not torch.is_grad_enabled() else nullcontext()
        with self._autocast(), eager:
            output = self.unet(
                noisy.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last),
                timesteps.to(self.device),
                encoder_hidden_states=conditioning.states.to(device=self.device, dtype=self.dtype),
                return_dict=False,
                **self._added(noisy, conditioning, sizes),
            )
        return cast(Tensor, output[0]).float()

    def done_encoding(self) -> None:
        """Text encoders that are kept in RAM leave the device, until the next prompts."""
        if self._kept_text is not None:
            self._kept_text.drop()

    def _added(self, noisy: Tensor, conditioning: Conditioning, sizes: Tensor | None) -> dict[str, Any]:
        """What the family's U-Net takes besides noise, time and text states."""
        return {}

    def encode_images(self, pixels: Tensor, *, moments: bool = False) -> Tensor:
        """Posterior means (b, c, H / factor, W / factor) float32, unscaled, of pictures (b, 3, H, W) in [-1, 1]; with
        `moments` the logarithms of the variances behind them, (b, 2 c, H / factor, W / factor).

        On the CPU pictures go through one by one: it costs nothing there, and a latent's bits don't depend on the
        batch it was made in. Elsewhere in chunks of about two 512 x 512 pictures. Where a 16-bit VAE gives values that
        are no finite numbers, its chunk is encoded again in float32; what is still not finite is returned as it is.
        """
        height, width = pixels.shape[-2:]
        size = 1 if self.device.type == "cpu" else max(1, _CHUNK_PIXELS // (height * width))
        with torch.inference_mode():
            work = _posterior_moments if moments else _posterior_mean
            found = [self._safely(work, chunk) for chunk in pixels.split(size)]
        return torch.cat(found).clone()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (b, 3, H, W) float32, about [-1, 1], of scaled latents (b, c, h, w); no gradient.

        In float32 where 16 bits overflow, as in `encode_images`.
        """
        with torch.no_grad():
            return self._safely(_decoded, latents / self.latent_scale)

    def _safely(self, work: Callable[[Any, Tensor], Tensor], inputs: Tensor) -> Tensor:
        """`work` by the VAE, and by one in float32 if a 16-bit one gives no finite numbers; (b, ...) float32."""
        self.done_encoding()
        vae = self.reload_vae()
        result = work(vae, inputs.to(self.device, self.vae_dtype, memory_format=torch.channels_last)).float()
        if self.vae_dtype == torch.float32 or bool(torch.isfinite(result).all()):
            return result
        if not self._overflow_told:
            say(f"the VAE overflows in {str(self.vae_dtype).removeprefix('torch.')}: float32 is used where it does")
            self._overflow_told = True
        if self._exact_vae is None:
            self._exact_vae = self._load("vae", torch.float32)
        return work(self._exact_vae, inputs.to(self.device, torch.float32, memory_format=torch.channels_last)).float()

    def _load(self, part: Part, dtype: torch.dtype, *, in_ram: bool = False) -> torch.nn.Module:
        with torch.inference_mode(False):
            return load_part(self.info, part, device=torch.device("cpu") if in_ram else self.device, dtype=dtype)

    def reload_vae(self) -> torch.nn.Module:
        """The VAE, read again if it was released."""
        if self.vae is None:
            self.vae = self._load("vae", self.vae_dtype)
        return self.vae

    def release_vae(self) -> None:
        """Give the VAE's memory back."""
        self.vae = self._exact_vae = None
        give_back(self.device)

    def reload_text_encoders(self) -> tuple[torch.nn.Module, ...]:
        """The text encoders, read again if they were released."""
        if not self.text_encoders:
            in_ram = self._text_in_ram
            parts = [encoder.part for encoder in self.family.text_encoders]
            self.text_encoders = tuple(self._load(part, self.dtype, in_ram=in_ram) for part in parts)
            self._join()
            for text_encoder in self.text_encoders:
                if self._text_in_fp8:
                    fp8.store(text_encoder)
                if self._checkpointing is not None:
                    checkpoint_text_encoder(text_encoder, self._checkpointing)
            self._settle_text_encoders()
        return self.text_encoders

    def release_text_encoders(self) -> None:
        """Give the text encoders' memory back. Not for text encoders that train or carry a network."""
        self.text_encoders, self._kept_text = (), None
        give_back(self.device)

    def join_embeddings(self, vocabulary: Vocabulary, vectors: Sequence[Sequence[Tensor]]) -> None:
        """Know new tokens from now on, in place of those that were joined before; also with text encoders that are
        read later.

        Args:
            vectors: by text encoder, in the family's order, and token: (n, d) float32 on any device, parameters where
                they train. They are looked up where they are, so that what changes in them counts at once.

        Raises:
            ValueError: vectors that don't fit the tokens or the text encoders, or tokens without ids of their own.
        """
        pad_ids = [encoder.pad_id for encoder in self.family.text_encoders]
        self._joined = checked(vocabulary, vectors, self.text_widths, pad_ids)
        self.vocabulary = vocabulary
        self._ids.pop("text", None)
        self._join()

    def _join(self) -> None:
        for index, text_encoder in enumerate(self.text_encoders):
            join(text_encoder, self._joined[index])

    def embedding_table(self, encoder: int) -> Tensor:
        """The frozen rows of a text encoder, (49,408, d) in its dtype, by number in the family's order; released text
        encoders are read again. It is the table itself: not to be changed."""
        table: Tensor = token_embedding(self.reload_text_encoders()[encoder]).weight
        return table.detach()

    def vae_id(self) -> str:
        """sha256 over what makes latents: names, dtypes, shapes and values of the VAE's encoder half."""
        if "vae" not in self._ids:
            made = (
                (name, tensor)
                for name, tensor in self.reload_vae().state_dict().items()
                if name.startswith(("encoder.", "quant_conv."))
            )
            self._ids["vae"] = _digest(made)
        return self._ids["vae"]

    def text_encoder_id(self) -> str:
        """sha256 over what makes a caption's conditioning: the text encoders' names, dtypes, shapes and values, new
        tokens and their vectors, clip skip, how many words count, and whether brackets weigh. Taken once: of the text
        encoders as they were read, and again when vectors are joined."""
        if "text" not in self._ids:
            settings = f"{self.family.name} {self.clip_skip} {self.max_words} {self.weighted}"
            values = [
                (f"{index}.{name}", tensor)
                for index, encoder in enumerate(self.reload_text_encoders())
                for name, tensor in encoder.state_dict().items()
            ]
            for index, each in enumerate(self._joined):
                names = [f"{index}.token {token.text}" for token in self.vocabulary.tokens]
                values += zip(names, each, strict=True)
            self._ids["text"] = _digest(values, settings)
        return self._ids["text"]

    def pipeline(
        self, sampler: str, encode: Callable[[Sequence[str]], Conditioning] | None = None, *, offload: bool = False
    ) -> "PreviewPipeline":
        """What draws previews with these very modules, adapters included.

        Args:
            sampler: a name of `samplers.SAMPLERS`.
            encode: prompts -> conditioning, `encode_prompts` where it is None.
            offload: have on the device only the part that works.

        Raises:
            UserError: no such sampler.
        """
        from library.models.preview import PreviewPipeline

        zero_snr = self.zero_terminal_snr
        scheduler = samplers.scheduler(sampler, self.info.scheduler_config, self.prediction_type, zero_snr=zero_snr)
        return PreviewPipeline(self, scheduler, encode or self.encode_prompts, offload=offload)


def _posterior_mean(vae: Any, pixels: Tensor) -> Tensor:
    return cast(Tensor, vae.encode(pixels).latent_dist.mean).contiguous()


def _posterior_moments(vae: Any, pixels: Tensor) -> Tensor:
    found = vae.encode(pixels).latent_dist
    return torch.cat([found.mean, found.logvar], dim=1)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    return cast(Tensor, vae.decode(latents, return_dict=False)[0])


def _digest(values: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(values, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
